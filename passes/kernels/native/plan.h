// Plan: steps that run one after the other for every image of a batch, without going back to Python between them.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <new>
#include <sys/mman.h>
#include <vector>

#include "attention.h"
#include "convolution.h"
#include "pooling.h"
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
    case kAttend: return attend(step, arena, item);
    default: return combine_planes(step, arena, begin, end);
  }
}

// Memory for the activations of one image, on large pages where the system has them: planes are far apart.
class Arena {
 public:
  explicit Arena(int64_t floats) : floats_(floats) {
    const size_t bytes = (floats * 4 + kPage - 1) / kPage * kPage;
    if (posix_memalign(&data_, kPage, bytes)) throw std::bad_alloc();
    madvise(data_, bytes, MADV_HUGEPAGE);
    std::memset(data_, 0, bytes);
  }
  ~Arena() { std::free(data_); }
  Arena(const Arena &) = delete;
  float *data() const { return static_cast<float *>(data_); }
  int64_t floats() const { return floats_; }

 private:
  static constexpr size_t kPage = 1 << 21;
  int64_t floats_;
  void *data_ = nullptr;
};

// Arenas that no call uses. All plans share them, so that what one plan used last, and is in the cache, is used by the next.
class Arenas {
 public:
  // Return those of the plans that there are; they go with the last of these.
  static std::shared_ptr<Arenas> shared() {
    static std::mutex mutex;
    static std::weak_ptr<Arenas> current;
    const std::lock_guard<std::mutex> lock(mutex);
    auto found = current.lock();
    if (!found) current = found = std::make_shared<Arenas>();
    return found;
  }

  std::unique_ptr<Arena> take(int64_t floats) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto arena = free_.rbegin(); arena != free_.rend(); ++arena)
        if ((*arena)->floats() >= floats) {
          auto found = std::move(*arena);
          free_.erase(std::next(arena).base());
          return found;
        }
      if (!free_.empty()) free_.erase(free_.begin());  // a larger one takes the place of one that is too small
    }
    return std::make_unique<Arena>(floats);
  }

  void give_back(std::unique_ptr<Arena> arena) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(arena));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Arena>> free_;  // the last one used is the last
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
    std::vector<std::unique_ptr<Arena>> own;
    for (int64_t i = 0; i < std::min(images, kGroup); ++i) own.push_back(arenas_->take(floats_));
    for (int64_t first = 0; first < images; first += kGroup) {
      Work work{inputs, outputs, own, first, std::min(images - first, kGroup), seconds};
      work.alone = work.count / threads * threads;
      if (work.count == 1) work.alone = 0;
      const int64_t shared = split_ * (work.count - work.alone) + static_cast<int64_t>(steps_.size()) - split_;
      std::vector<std::atomic<int64_t>> taken(shared * threads);
      work.taken = taken.data();
      in_team(threads, [&](int thread, int team) { run_group(work, thread, team); });
    }
    for (auto &arena : own) arenas_->give_back(std::move(arena));
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
    std::atomic<int64_t> *taken = nullptr;  // pieces of each step and each thread's share, where threads share its work
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
      for (int64_t i = 0; i < split_; ++i, taken += team) share(work, i, image, 1, taken, thread, team);
    for (int64_t i = split_; i < count; ++i, taken += team) share(work, i, 0, work.count, taken, thread, team);
  }

  // Run a step on some images with all threads. Pieces are a table, of chunks of weights by tiles of pixels. Every thread begins
  // with a share of the tiles, about that whose input it wrote, chunk by chunk, and then takes what others have left.
  void share(Work &work, int64_t number, int64_t image, int64_t images, std::atomic<int64_t> *taken, int thread, int team) const {
    const Step &step = steps_[number];
    if (team > 1) work.barrier.wait(team);
    const auto begin = work.seconds ? Clock::now() : Clock::time_point();
    const int64_t tiles = step.kind == kConvolve ? step.items / step.chunks : 1, rows = step.items / tiles, columns = tiles * images;
    const bool wide = columns >= team;  // else threads share the chunks
    for (int i = 0; i < team; ++i) {
      const int64_t owner = (thread + i) % team, all = wide ? columns : rows;
      const int64_t first = all * owner / team, own = all * (owner + 1) / team - first, pieces = own * (wide ? rows : columns);
      for (int64_t next; (next = taken[owner].fetch_add(1)) < pieces;) {
        const int64_t row = wide ? next / own : first + next / columns, column = wide ? first + next % own : next % columns;
        work.piece(step, image + column / tiles, row * tiles + column % tiles);
      }
    }
    if (work.seconds && team > 1) work.barrier.wait(team);
    if (work.seconds && !thread) work.seconds[number] += std::chrono::duration<double>(Clock::now() - begin).count();
  }

  std::vector<Step> steps_;
  int64_t floats_, split_;
  std::shared_ptr<Arenas> arenas_ = Arenas::shared();
};

}  // namespace sparsify
