// Native loops with a plain C interface and without torch's headers, so that they compile in a second.
//
// Threads are torch's own: GOMP_parallel of the libgomp that torch has loaded. A second pool would spin against the first.

#include <cstdint>
#include <dlfcn.h>

namespace {

using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
using Number = int (*)();

Parallel parallel = nullptr;
Number thread_index = nullptr, thread_count = nullptr;

constexpr int64_t kSerial = 32768;  // elements up to which threads cost more than they save

template <typename T>
struct Zeroing {
  T *values;
  const uint8_t *mask;
  int64_t count;
};

template <typename T>
void zero_range(const Zeroing<T> &job, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) job.values[i] = job.mask[i] ? job.values[i] : T(0);
}

template <typename T>
void zero_part(void *data) {
  const auto &job = *static_cast<Zeroing<T> *>(data);
  const int64_t index = thread_index(), threads = thread_count();
  zero_range(job, job.count * index / threads, job.count * (index + 1) / threads);
}

template <typename T>
void zero(void *values, const uint8_t *mask, int64_t count, int32_t threads) {
  Zeroing<T> job{static_cast<T *>(values), mask, count};
  if (threads > 1 && parallel && count > kSerial)
    parallel(zero_part<T>, &job, static_cast<unsigned>(threads), 0);
  else
    zero_range(job, 0, count);
}

}  // namespace

extern "C" {

// Use the threads of a libgomp that is loaded already; returns whether it is. Without it, loops run in the caller's thread.
int32_t use_threads_of(const char *path) {
  void *library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
  if (!library) return 0;
  thread_index = reinterpret_cast<Number>(dlsym(library, "omp_get_thread_num"));
  thread_count = reinterpret_cast<Number>(dlsym(library, "omp_get_num_threads"));
  if (thread_index && thread_count) parallel = reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel"));
  return parallel != nullptr;
}

// Set values to 0, bit by bit, where the mask is 0. `width` is the size of one in bytes: 2, 4 or 8.
void zero_dropped(void *values, const uint8_t *mask, int64_t count, int32_t width, int32_t threads) {
  if (width == 2) zero<uint16_t>(values, mask, count, threads);
  if (width == 4) zero<uint32_t>(values, mask, count, threads);
  if (width == 8) zero<uint64_t>(values, mask, count, threads);
}
}
