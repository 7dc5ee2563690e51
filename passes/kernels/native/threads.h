// Threads: torch's own, by GOMP_parallel of the libgomp that torch has loaded. A second pool would spin against the first.
#pragma once

#include <atomic>
#include <cstdint>
#include <dlfcn.h>
#include <sched.h>
#include <vector>

namespace sparsify {

constexpr int64_t kSerial = 32768;  // elements up to which threads cost more than they save

using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
using Number = int (*)();

inline Parallel parallel = nullptr;
inline Number thread_index = nullptr, thread_count = nullptr;

inline bool use_threads_of(const char *path) {
  void *library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
  if (!library) return false;
  thread_index = reinterpret_cast<Number>(dlsym(library, "omp_get_thread_num"));
  thread_count = reinterpret_cast<Number>(dlsym(library, "omp_get_num_threads"));
  if (thread_index && thread_count) parallel = reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel"));
  return parallel != nullptr;
}

// Call work(thread, threads) in every thread of a team of at most `threads`.
template <typename Work>
void in_team(int32_t threads, const Work &work) {
  if (threads < 2 || !parallel) return work(0, 1);
  parallel([](void *data) { (*static_cast<const Work *>(data))(thread_index(), thread_count()); },
           const_cast<Work *>(&work), static_cast<unsigned>(threads), 0);
}

// Memory of a thread, which it keeps for the next call.
inline float *scratch(int which, int64_t floats) {
  thread_local std::vector<float> memory[3];
  if (static_cast<int64_t>(memory[which].size()) < floats + 16) memory[which] = std::vector<float>(floats + 16);
  return reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(memory[which].data()) + 63) & ~uintptr_t(63));
}

// Where all threads of a team wait for each other. The wait is short as a rule; where a thread has no core, others yield.
class Barrier {
 public:
  void wait(int threads) {
    const int turn = turn_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      waiting_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
      if (spins > 2000) sched_yield();
#if defined(__x86_64__)
      else __builtin_ia32_pause();
#endif
    }
  }

 private:
  alignas(64) std::atomic<int> waiting_{0};
  alignas(64) std::atomic<int> turn_{0};
};

}  // namespace sparsify
