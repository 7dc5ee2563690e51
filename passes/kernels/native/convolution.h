// Convolution: for every output, the sum of kept weights times runs of input pixels; what a weight is kept of is in its offset.
#pragma once

#include <array>
#include <utility>

#include "steps.h"

namespace sparsify {

// Sums of `Group` outputs over `Size` vectors of pixels.
template <int Group, int Size>
struct Sums {
  Vector values[Group][Size];

  // What there is less of, weights or pixels, stays in registers beside the sums.
  void add(const float *weights, const float *pixels) {
    if constexpr (Group <= Size) {
      Vector weight[Group];
      UNROLLED for (int r = 0; r < Group; ++r) weight[r] = splat(weights[r]);
      UNROLLED for (int v = 0; v < Size; ++v) {
        const Vector x = load_for<Group>(pixels + v * kLanes);
        UNROLLED for (int r = 0; r < Group; ++r) values[r][v] += weight[r] * x;
      }
    } else {
      Vector x[Size];
      UNROLLED for (int v = 0; v < Size; ++v) x[v] = load_for<Group>(pixels + v * kLanes);
      UNROLLED for (int r = 0; r < Group; ++r) {
        const Vector weight = splat(weights[r]);
        UNROLLED for (int v = 0; v < Size; ++v) values[r][v] += weight * x[v];
      }
    }
  }
};

template <int Group, int Size>
void convolve_tile(const Step &given, float *arena, int64_t chunk, int64_t begin) {
  constexpr int turns = Group * Size < 3 ? 4 : Group * Size < 6 ? 2 : 1;  // few sums wait for each other: so many sets of them
  const Step step = given;  // which no store can change
  const int64_t end = begin + Size * kLanes, last = step.chunk_groups[chunk + 1];
  const Gaps gaps(step, begin, end);
  const int32_t *start = step.starts + step.chunk_groups[chunk] * step.blocks;
  const float *pixels = arena + begin;
  for (int64_t block = 0; block < step.blocks; ++block)
    for (int64_t group = step.chunk_groups[chunk]; group < last; ++group, ++start) {
      const bool finished = block == step.blocks - 1;
      if (!finished && start[0] == start[1] && block) continue;
      Sums<Group, Size> sums[turns] = {};
      const int32_t *targets = step.target + group * Group;
      UNROLLED for (int r = 0; r < Group; ++r) {
        if (block) {
          UNROLLED for (int v = 0; v < Size; ++v) sums[0].values[r][v] = load(pixels + targets[r] + v * kLanes);
        } else {
          UNROLLED for (int v = 0; v < Size; ++v) sums[0].values[r][v] = splat(step.bias[group * Group + r]);
          if (step.other) {  // it may be the target itself, and comes from far away: the lines of the next outputs are asked for
            const float *other = pixels + step.other[group * Group + r];
            UNROLLED for (int v = 0; v < Size; ++v) sums[0].values[r][v] += load(other + v * kLanes);
            const float *next = pixels + step.other[std::min((group + 1) * Group + r, step.channels - 1)];
            UNROLLED for (int v = 0; v < Size * kLanes; v += 16) __builtin_prefetch(next + v);
          }
        }
      }
      int32_t k = start[0];
      for (; k + turns <= start[1]; k += turns) {
        UNROLLED for (int i = 0; i < turns; ++i) sums[i].add(step.values + (k + i) * Group, pixels + step.offsets[k + i]);
      }
      if constexpr (turns > 1)
        for (; k < start[1]; ++k) sums[0].add(step.values + k * Group, pixels + step.offsets[k]);
      UNROLLED for (int r = 0; r < Group; ++r) {
        float *to = arena + targets[r] + begin;
        UNROLLED for (int v = 0; v < Size; ++v) {
          Vector sum = sums[0].values[r][v];
          UNROLLED for (int i = 1; i < turns; ++i) sum += sums[i].values[r][v];
          sums[0].values[r][v] = sum;
        }
        if (finished && step.activation == kRelu) {
          UNROLLED for (int v = 0; v < Size; ++v) store(to + v * kLanes, larger(sums[0].values[r][v], Vector{}));
        } else {
          UNROLLED for (int v = 0; v < Size; ++v) store(to + v * kLanes, sums[0].values[r][v]);
        }
        if (!finished) continue;
        if (step.activation > kRelu) activate_all(to, Size, step.activation, step.low, step.high);
        frame(step, to - begin, begin, end, gaps);
      }
    }
}

using Tile = void (*)(const Step &, float *, int64_t, int64_t);

template <int Group, int... Sizes>
constexpr std::array<Tile, sizeof...(Sizes)> tiles_of(std::integer_sequence<int, Sizes...>) {
  return {convolve_tile<Group, Sizes + 1>...};
}

template <int Group>
constexpr auto kTiles = tiles_of<Group>(std::make_integer_sequence<int, tile_size(Group)>());

// One piece: a chunk of outputs, and `grain` vectors of pixels.
inline void convolve(const Step &step, float *arena, int64_t item) {
  const int64_t vectors = (length(step) + kLanes - 1) / kLanes, tiles = (vectors + step.grain - 1) / step.grain;
  const int64_t begin = item % tiles * step.grain, size = std::min(step.grain, vectors - begin);
  const Tile tile = by_group(step.group, [&](auto group) { return kTiles<group>[size - 1]; });
  tile(step, arena, item / tiles, begin * kLanes);
}

// The same where a plane is one pixel: nothing to go along, so weights are multiplied one by one.
inline void dots(const Step &step, float *arena, int64_t chunk) {
  for (int64_t c = step.chunk_groups[chunk]; c < step.chunk_groups[chunk + 1]; ++c) {
    float sums[4] = {step.bias[c]};
    int32_t k = step.starts[c];
    for (; k + 4 <= step.starts[c + 1]; k += 4)
      for (int i = 0; i < 4; ++i) sums[i] += step.values[k + i] * arena[step.offsets[k + i]];
    for (; k < step.starts[c + 1]; ++k) sums[0] += step.values[k] * arena[step.offsets[k]];
    const float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]) + (step.other ? arena[step.other[c]] : 0.f);
    arena[step.target[c]] = activate_one(sum, step.activation, step.low, step.high);
  }
}

}  // namespace sparsify
