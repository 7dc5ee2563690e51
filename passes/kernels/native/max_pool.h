// Max pooling in training: the largest pixel of every window, which one it was, and the gradient, which goes to that one.
#pragma once

#include <cmath>
#include <vector>

#include "pooling.h"
#include "threads.h"

namespace sparsify {

struct MaxPool {
  int64_t planes, rows, columns, out_rows, out_columns;
  int64_t kernel[2], stride[2], padding[2];  // of rows, of columns; windows have at most 256 pixels
};

// Where a window begins, whose part outside of the plane is no part of it.
inline int64_t begin_of(const MaxPool &p, int64_t at, int side) { return at * p.stride[side] - p.padding[side]; }

// A plane; as in torch the first of equal pixels is chosen, but the last that is NaN. `line` holds a row with its padding, -inf.
template <int Stride>
void largest_of(const MaxPool &p, const float *x, float *y, uint8_t *chosen, std::vector<float> &line, std::vector<float> &most,
                std::vector<int32_t> &taps) {
  for (int64_t row = 0; row < p.out_rows; ++row) {
    const int64_t top = begin_of(p, row, 0), first = std::max(-top, int64_t(0)), last = std::min(p.kernel[0], p.rows - top);
    std::fill(most.begin(), most.end(), -INFINITY);
    std::fill(taps.begin(), taps.end(), static_cast<int32_t>(first * p.kernel[1]));
    for (int64_t ky = first; ky < last; ++ky) {
      std::copy_n(x + (top + ky) * p.columns, p.columns, line.data() + p.padding[1]);
      for (int64_t at = 0; at < p.out_columns; at += kLanes) {
        Vector best = load(most.data() + at);
        Integers tap = places_at(taps.data() + at);
        for (int64_t kx = 0; kx < p.kernel[1]; ++kx) {
          const Vector value = load_strided<Stride>(line.data() + at * p.stride[1] + kx, p.stride[1]);
          const Integers more = (value > best) | (value != value);
          best = more ? value : best;
          tap = more ? Integers{} + static_cast<int32_t>(ky * p.kernel[1] + kx) : tap;
        }
        store(most.data() + at, best);
        std::memcpy(taps.data() + at, &tap, sizeof tap);
      }
    }
    std::copy_n(most.data(), p.out_columns, y + row * p.out_columns);
    std::copy_n(taps.data(), p.out_columns, chosen + row * p.out_columns);
  }
}

inline void max_pool_forward(const MaxPool &p, const float *x, float *y, uint8_t *chosen, int32_t threads) {
  const int64_t wide = (p.out_columns + kLanes - 1) / kLanes * kLanes, pixels = p.out_rows * p.out_columns;
  const auto pool = by_stride(p.stride[1], [](auto stride) { return &largest_of<stride>; });
  in_team(threads, [&](int64_t thread, int64_t team) {
    std::vector<float> line(std::max(p.columns + p.padding[1], (wide + kLanes) * p.stride[1] + p.kernel[1]), -INFINITY), most(wide);
    std::vector<int32_t> taps(wide);
    for (int64_t plane = p.planes * thread / team; plane < p.planes * (thread + 1) / team; ++plane)
      pool(p, x + plane * p.rows * p.columns, y + plane * pixels, chosen + plane * pixels, line, most, taps);
  });
}

inline void max_pool_backward(const MaxPool &p, const float *gradient, const uint8_t *chosen, float *of_x, int32_t threads) {
  std::vector<int64_t> rows, columns;  // of a window, of what may be chosen
  for (int64_t tap = 0; tap < p.kernel[0] * p.kernel[1]; ++tap) {
    rows.push_back(tap / p.kernel[1]);
    columns.push_back(tap % p.kernel[1]);
  }
  in_team(threads, [&](int64_t thread, int64_t team) {
    for (int64_t plane = p.planes * thread / team; plane < p.planes * (thread + 1) / team; ++plane) {
      float *to = of_x + plane * p.rows * p.columns;
      std::fill(to, to + p.rows * p.columns, 0.f);
      for (int64_t row = 0, at = plane * p.out_rows * p.out_columns; row < p.out_rows; ++row)
        for (int64_t column = 0; column < p.out_columns; ++column, ++at) {
          // Where all of a window is -inf, its first pixel is chosen, which may be outside: then it is the first inside.
          const int64_t x = std::max(begin_of(p, column, 1) + columns[chosen[at]], int64_t(0));
          to[(begin_of(p, row, 0) + rows[chosen[at]]) * p.columns + x] += gradient[at];
        }
    }
  });
}

}  // namespace sparsify
