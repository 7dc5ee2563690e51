// Attention: of every query, the values of all keys, weighted by the softmax of their products with it.
#pragma once

#include <array>
#include <cmath>

#include "steps.h"
#include "threads.h"

namespace sparsify {

constexpr int kQueries = 4, kKeys = (kRegisters - 1) / (kQueries + 1);  // vectors of queries by keys, or features, in registers

// [r][v]: the sum over i of one(i, r) * many(i)[v].
template <int Rows, int Wide, typename One, typename Many>
std::array<std::array<Vector, Wide>, Rows> sum_products(int64_t count, const One &one, const Many &many) {
  std::array<std::array<Vector, Wide>, Rows> sums = {};
  for (int64_t i = 0; i < count; ++i) {
    const float *from = many(i);
    Vector factors[Rows];
    UNROLLED for (int r = 0; r < Rows; ++r) factors[r] = splat(one(i, r));
    UNROLLED for (int v = 0; v < Wide; ++v) {
      const Vector x = load(from + v * kLanes);
      UNROLLED for (int r = 0; r < Rows; ++r) sums[r][v] += factors[r] * x;
    }
  }
  return sums;
}

// Call work(row, constant) for `rows` rows, as many together as stay in registers.
template <typename Work>
void by_rows(int64_t rows, const Work &work) {
  int64_t row = 0;
  for (; row + kKeys <= rows; row += kKeys) work(row, std::integral_constant<int, kKeys>());
  for (; row < rows; ++row) work(row, std::integral_constant<int, 1>());
}

// The queries of a head from `begin` on. Planes are tokens, rows of planes features: queries, keys and values of all heads.
template <int Wide>
void attend_tile(const Step &step, float *arena, int64_t head, int64_t begin) {
  const int64_t features = step.channels / step.heads, tokens = length(step);
  const int32_t *queries = step.source + head * features, *keys = queries + step.channels, *values = keys + step.channels;
  float *scores = scratch(0, tokens * Wide * kLanes);  // [keys][queries]
  const int64_t shift = step.source_columns == 1 ? 0 : begin;  // one bias for all queries, or one for each
  const float *bias = step.other ? arena + step.other[step.even ? 0 : head] + shift : nullptr;  // rows of keys
  Vector most[Wide], whole[Wide] = {};
  UNROLLED for (int v = 0; v < Wide; ++v) most[v] = splat(-INFINITY);
  by_rows(tokens, [&](int64_t key, auto rows) {
    constexpr int kRows = rows;
    const auto sums = sum_products<kRows, Wide>(
        features, [&](int64_t i, int r) { return arena[keys[i] + key + r]; },
        [&](int64_t i) { return arena + queries[i] + begin; });
    UNROLLED for (int r = 0; r < kRows; ++r) {
      UNROLLED for (int v = 0; v < Wide; ++v) {
        Vector score = sums[r][v] * step.scaling;
        if (bias) {
          const float *added = bias + (key + r) * step.source_pitch;
          score += step.source_columns == 1 ? splat(*added) : load(added + v * kLanes);
        }
        most[v] = larger(score, most[v]);
        store(scores + ((key + r) * Wide + v) * kLanes, score);
      }
    }
  });
  for (int64_t key = 0; key < tokens; ++key) {
    UNROLLED for (int v = 0; v < Wide; ++v) {
      float *to = scores + (key * Wide + v) * kLanes;
      const Vector score = load(to), weight = score == -INFINITY ? Vector{} : exponential(score - most[v]);
      store(to, weight);
      whole[v] += weight;
    }
  }
  UNROLLED for (int v = 0; v < Wide; ++v) whole[v] = whole[v] == 0.f ? Vector{} : 1.f / whole[v];  // where all is masked
  by_rows(features, [&](int64_t feature, auto rows) {
    constexpr int kRows = rows;
    const auto sums = sum_products<kRows, Wide>(
        tokens, [&](int64_t i, int r) { return arena[values[feature + r] + i]; },
        [&](int64_t i) { return scores + i * Wide * kLanes; });
    UNROLLED for (int r = 0; r < kRows; ++r) {
      float *plane = arena + step.target[head * features + feature + r];
      UNROLLED for (int v = 0; v < Wide; ++v) store_within(step, plane + begin + v * kLanes, sums[r][v] * whole[v]);
      frame(step, plane, begin, begin + Wide * kLanes);
    }
  });
}

// One piece: a head, and at most `kQueries` vectors of queries.
inline void attend(const Step &step, float *arena, int64_t item) {
  const int64_t tiles = step.items / step.heads, vectors = (length(step) + kLanes - 1) / kLanes, tile = item % tiles;
  const int64_t first = vectors * tile / tiles, size = vectors * (tile + 1) / tiles - first;
  constexpr decltype(&attend_tile<1>) sizes[] = {attend_tile<1>, attend_tile<2>, attend_tile<3>, attend_tile<4>};
  static_assert(kQueries == 4, "as many as there are sizes");
  sizes[size - 1](step, arena, item / tiles, first * kLanes);
}

}  // namespace sparsify
