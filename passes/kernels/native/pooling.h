// Pooling: the largest of the pixels in a window, plane by plane, first of rows, then of columns.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "steps.h"

namespace sparsify {

// The larger of two; NaN in either stays.
inline Vector most(Vector a, Vector b) { return a != a ? a : larger(b, a); }

// Numbers that are `Stride` apart, or `stride` where that is 0.
template <int Stride>
Vector load_strided(const float *from, int64_t stride) {
  if constexpr (Stride == 1) return load(from);
  if constexpr (Stride == 2) return evens(from);
  Vector found;
  for (int i = 0; i < kLanes; ++i) found[i] = from[i * stride];
  return found;
}

// What a function returns for a stride of 1 or 2, as a constant, or for 0, which is any other.
template <typename Function>
auto by_stride(int64_t stride, Function function) {
  if (stride == 1) return function(std::integral_constant<int, 1>());
  return stride == 2 ? function(std::integral_constant<int, 2>()) : function(std::integral_constant<int, 0>());
}

// Pool a plane; `line` holds a row with its padding, which is -inf.
template <int Stride>
void pool_plane(const Step &step, const float *source, float *plane, float *line) {
  const int32_t *w = step.window;  // of rows and columns: kernel, stride, padding, dilation
  for (int64_t row = 0; row < step.rows; ++row) {
    const int64_t top = row * w[1] - w[2];
    int64_t first = 0, last = w[0];
    while (top + first * w[3] < 0) ++first;
    while (top + (last - 1) * w[3] >= step.source_rows) --last;
    for (int64_t x = 0; x < step.source_columns; x += kLanes) {
      Vector value = splat(-INFINITY);
      for (int64_t ky = first; ky < last; ++ky) value = most(value, load(source + (top + ky * w[3]) * step.source_pitch + x));
      store(line + w[6] + x, value);
    }
    store(line + w[6] + step.source_columns, splat(-INFINITY));  // what the last vector wrote behind the row
    for (int64_t x = 0; x < step.columns; x += kLanes) {
      Vector value = splat(-INFINITY);
      for (int64_t kx = 0; kx < w[4]; ++kx) value = most(value, load_strided<Stride>(line + x * w[5] + kx * w[7], w[5]));
      store_within(step, plane + row * step.pitch + x, value);
    }
  }
  frame(step, plane);
}

inline void pool_planes(const Step &step, float *arena, int64_t begin, int64_t end) {
  const int32_t *w = step.window;
  const int64_t reach = (step.columns + kLanes) * w[5] + w[4] * w[7];
  std::vector<float> line(std::max(step.source_columns + w[6], reach) + 2 * kLanes, -INFINITY);
  const auto pool = by_stride(w[5], [](auto stride) { return &pool_plane<stride>; });
  for (int64_t c = begin; c < end; ++c) pool(step, arena + step.source[c], arena + step.target[c], line.data());
}

}  // namespace sparsify
