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
  Plan(const Step *steps, int64_t count, int64_t floats, int64_t split)
      : steps_(steps, steps + count), floats_(floats), split_(split) {}

  // The first steps, whose activations are larger than their weights, run depth first: each thread takes whole images while
  // there are enough for all, so that activations stay in its cache. The others run layer by layer for a group of images, so
  // that weights do. All threads share the work of a step there, and of the last images of the first part.
  void run(const float *const *inputs, float *const *outputs, int64_t images, int32_t threads, double *seconds) {
    std::vector<std::unique_ptr<Arena>> arenas;
    for (int64_t i = 0; i < std::min(images, kGroup); ++i) arenas.push_back(take());
    for (int64_t first = 0; first < images; first += kGroup) {
      Work work{inputs, outputs, arenas, first, std::min(images - first, kGroup), seconds};
      work.alone = work.count / threads * threads;
      if (work.count == 1) work.alone = 0;
      std::vector<std::atomic<int64_t>> taken(split_ * (work.count - work.alone) + static_cast<int64_t>(steps_.size()) - split_);
      work.taken = taken.data();
      in_team(threads, [&](int thread, int team) { run_group(work, thread, team); });
    }
    for (auto &arena : arenas) give_back(std::move(arena));
  }

 private:
  static constexpr int64_t kGroup = 8;  // images

  struct Work {
    const float *const *inputs;
    float *const *outputs;
    const std::vector<std::unique_ptr<Arena>> &arenas;
    int64_t first, count;
    double *seconds;
    int64_t alone = 0;
    std::atomic<int64_t> next_image{0};
    std::atomic<int64_t> *taken = nullptr;  // pieces of each step, where threads share its work
    Barrier barrier;

    void piece(const Step &step, int64_t image, int64_t item) const {
      run_item(step, arenas[image]->data(), inputs, outputs, first + image, item);
    }
  };

  void run_group(Work &work, int thread, int team) const {
    const int64_t count = static_cast<int64_t>(steps_.size());
    for (int64_t image; (image = work.next_image.fetch_add(1)) < work.alone;)
      for (int64_t i = 0; i < split_; ++i)
        for (int64_t item = 0; item < steps_[i].items; ++item) work.piece(steps_[i], image, item);
    std::atomic<int64_t> *taken = work.taken;
    for (int64_t image = work.alone; image < work.count; ++image)
      for (int64_t i = 0; i < split_; ++i) share(work, i, image, 1, taken++, thread, team);
    for (int64_t i = split_; i < count; ++i) share(work, i, 0, work.count, taken++, thread, team);
  }

  // Run a step on some images with all threads: pieces of the same weights one after the other.
  void share(Work &work, int64_t number, int64_t image, int64_t images, std::atomic<int64_t> *taken, int thread, int team) const {
    const Step &step = steps_[number];
    if (team > 1) work.barrier.wait(team);
    const auto begin = work.seconds ? Clock::now() : Clock::time_point();
    const int64_t tiles = step.kind == kConvolve ? step.items / step.chunks : 1;
    for (int64_t next; (next = taken->fetch_add(1)) < step.items * images;) {
      const int64_t chunk = next / (tiles * images), rest = next % (tiles * images);
      work.piece(step, image + rest / tiles, chunk * tiles + rest % tiles);
    }
    if (work.seconds && team > 1) work.barrier.wait(team);
    if (work.seconds && !thread) work.seconds[number] += std::chrono::duration<double>(Clock::now() - begin).count();
  }

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
  int64_t floats_, split_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Arena>> free_;  // of calls that have ended, for the next
};

}  // namespace sparsify
