// Plan: steps that run one after the other for every image of a batch, without going back to Python between them.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <new>
#include <sys/mman.h>
#include <vector>

#include "convolution.h"
#include "threads.h"

namespace sparsify {

inline void run_item(const Step &step, float *arena, const float *const *inputs, float *const *outputs, int64_t image, int64_t item) {
  const int64_t begin = item * step.grain, end = std::min(begin + step.grain, step.channels);
  switch (step.kind) {
    case kRead: return copy_planes(step, inputs[step.outside] + image * step.image_stride, arena, begin, end);
    case kMove: return copy_planes(step, arena, arena, begin, end);
    case kWrite: return write_planes(step, arena, outputs[step.outside] + image * step.image_stride, begin, end);
    case kConvolve: return convolve(step, arena, item);
    case kDots: return dots(step, arena, item);
    case kPool: return pool_planes(step, arena, begin, end);
    case kMean: return mean_planes(step, arena, begin, end);
    case kNormalize: return normalize_pixels(step, arena, begin, begin + step.grain);
    default: return combine_planes(step, arena, begin, end);
  }
}

// Memory for the activations of one image, on large pages where the system has them: planes are far apart.
class Arena {
 public:
  explicit Arena(int64_t floats) : bytes_((floats * 4 + kPage - 1) / kPage * kPage) {
    if (posix_memalign(&data_, kPage, bytes_)) throw std::bad_alloc();
    madvise(data_, bytes_, MADV_HUGEPAGE);
    std::memset(data_, 0, bytes_);
  }
  ~Arena() { std::free(data_); }
  Arena(const Arena &) = delete;
  float *data() const { return static_cast<float *>(data_); }

 private:
  static constexpr size_t kPage = 1 << 21;
  size_t bytes_;
  void *data_ = nullptr;
};

class Plan {
  using Clock = std::chrono::steady_clock;

 public:
  Plan(const Step *steps, int64_t count, int64_t floats) : steps_(steps, steps + count), floats_(floats) {}

  // Each thread takes whole images while there are enough for all; for the last ones all threads share the work of every step.
  void run(const float *const *inputs, float *const *outputs, int64_t images, int32_t threads, double *seconds) {
    const int64_t alone = threads > 1 ? images / threads * threads : 0;
    std::vector<std::unique_ptr<Arena>> arenas;
    for (int i = 0; i < (alone ? threads : 1); ++i) arenas.push_back(take());
    std::atomic<int64_t> next_image{0};
    std::vector<std::atomic<int64_t>> next_item(steps_.size() * (images - alone));
    Barrier barrier;
    in_team(threads, [&](int thread, int team) {
      if (alone)
        for (int64_t image; (image = next_image.fetch_add(1)) < alone;)
          for (const Step &step : steps_)
            for (int64_t item = 0; item < step.items; ++item)
              run_item(step, arenas[thread]->data(), inputs, outputs, image, item);
      auto *next = next_item.data();
      for (int64_t image = alone; image < images; ++image)
        for (const Step &step : steps_) {
          if (team > 1) barrier.wait(team);
          const auto begin = seconds ? Clock::now() : Clock::time_point();
          for (int64_t item; (item = next->fetch_add(1)) < step.items;)
            run_item(step, arenas[0]->data(), inputs, outputs, image, item);
          if (seconds && team > 1) barrier.wait(team);
          if (seconds && !thread) seconds[&step - steps_.data()] += std::chrono::duration<double>(Clock::now() - begin).count();
          ++next;
        }
    });
    for (auto &arena : arenas) give_back(std::move(arena));
  }

 private:
  std::unique_ptr<Arena> take() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) {
        auto arena = std::move(free_.back());
        free_.pop_back();
        return arena;
      }
    }
    return std::make_unique<Arena>(floats_);
  }
  void give_back(std::unique_ptr<Arena> arena) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(arena));
  }

  std::vector<Step> steps_;
  int64_t floats_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Arena>> free_;  // of calls that have ended, for the next
};

}  // namespace sparsify
