// Native loops: a plain C interface and none of torch's headers, so that they compile in seconds.

#include <cstdlib>
#include <unistd.h>

#include "max_pool.h"
#include "norms.h"
#include "order.h"
#include "plan.h"
#include "selection.h"
#include "sums.h"
#include "zeroing.h"

using namespace sparsify;

extern "C" {

// Use the threads of a libgomp that is loaded already; returns whether it is. Without it, loops run in the caller's thread.
int32_t sparsify_use_threads_of(const char *path) { return use_threads_of(path); }

int32_t sparsify_lanes() { return kLanes; }
int32_t sparsify_tile(int32_t group) { return tile_size(group); }

// Bytes of a cache of one core, 0 where the system does not say.
int64_t sparsify_cache(int32_t level) {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  return std::max(0L, sysconf(level == 1 ? _SC_LEVEL1_DCACHE_SIZE : _SC_LEVEL2_CACHE_SIZE));
#else
  return level * 0;
#endif
}

// Set values to 0, bit by bit, where the mask is 0. `width` is the size of one in bytes: 2, 4 or 8.
void sparsify_zero_dropped(void *values, const uint8_t *mask, int64_t count, int32_t width, int32_t threads) {
  if (width == 2) zero<uint16_t>(values, mask, count, threads);
  if (width == 4) zero<uint32_t>(values, mask, count, threads);
  if (width == 8) zero<uint64_t>(values, mask, count, threads);
}

// Return 1 if a float, given by its bits, that the mask drops is neither 0 nor NaN nor infinite, else 0.
int32_t sparsify_has_stray(const uint32_t *values, const uint8_t *mask, int64_t count, int32_t threads) {
  return has_stray(values, mask, count, threads);
}

// Select the k highest, or lowest, of scores by their size, where the mask is `value`: see selection.h. Returns 1, or 0 where there
// are fewer.
int32_t sparsify_select(const float *scores, const uint8_t *mask, int64_t count, int64_t k, int32_t value, int32_t lowest,
                        uint8_t *chosen, int32_t threads) {
  return (lowest ? select<true> : select<false>)(scores, mask, count, k, static_cast<uint8_t>(value), chosen, threads);
}

// Find the order of kept weights: see order.h.
void sparsify_order(Order *of, int32_t threads) { order(*of, threads); }

// Make a plan of steps, whose tables must outlive it; `floats` is the size of an arena, `split` the first step that runs layer
// by layer.
void *sparsify_plan(const Step *steps, int64_t count, int64_t floats, int64_t split) {
  return new Plan(steps, count, floats, split);
}

void sparsify_forget(void *plan) { delete static_cast<Plan *>(plan); }

// Run a plan on images that lie behind each other; returns 0, or 1 where there is not enough memory. The seconds of every step
// are added to `seconds`, if it is not null, of images that all threads work on together.
int32_t sparsify_run(void *plan, const float *const *inputs, float *const *outputs, int64_t images, int32_t threads,
                     double *seconds) {
  try {
    static_cast<Plan *>(plan)->run(inputs, outputs, images, threads, seconds);
    return 0;
  } catch (const std::bad_alloc &) {
    return 1;
  }
}

// target = bias + the sum over kept weights of weight * source, in `count` parts; `bias` may be null. Returns 1 where there is
// not enough memory.
int32_t sparsify_sum(const Sum *sums, int64_t count, const float *source, float *target, const float *weight, const float *bias,
                     int32_t threads) {
  try {
    sparsify::sum(sums, count, source, target, weight, bias, threads);
    return 0;
  } catch (const std::bad_alloc &) {
    return 1;
  }
}

// The gradient of the dense weight, of that of the target: 0 where nothing is kept.
int32_t sparsify_sum_gradient(const Sum *sum, const float *source, const float *target, float *weight, int32_t threads) {
  try {
    sum_gradient(*sum, source, target, weight, threads);
    return 0;
  } catch (const std::bad_alloc &) {
    return 1;
  }
}

// Batch normalisation: see norms.h.
void sparsify_norm_forward(const Norm *norm, const float *x, const float *other, float *y, float *mean, float *variance,
                           int32_t threads) {
  norm_forward(*norm, x, other, y, mean, variance, threads);
}

void sparsify_norm_backward(const Norm *norm, const float *gradient, const float *x, const float *y, const float *mean,
                            const float *variance, float *of_x, float *of_other, float *of_weight, float *of_bias, int32_t threads) {
  norm_backward(*norm, gradient, x, y, mean, variance, of_x, of_other, of_weight, of_bias, threads);
}

// Max pooling: see max_pool.h.
void sparsify_max_pool_forward(const MaxPool *pool, const float *x, float *y, uint8_t *chosen, int32_t threads) {
  max_pool_forward(*pool, x, y, chosen, threads);
}

void sparsify_max_pool_backward(const MaxPool *pool, const float *gradient, const uint8_t *chosen, float *of_x, int32_t threads) {
  max_pool_backward(*pool, gradient, chosen, of_x, threads);
}
}
