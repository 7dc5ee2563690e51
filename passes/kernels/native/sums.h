// Sums for training: over kept weights of runs of pixels, and for kept weights of products of two runs.
//
// Tensors lie as torch has them. A piece, some images or some rows of one, is copied into planes that fit the cache, with what
// convolutions see around pixels set to 0: rows are `pitch` floats apart, images `height` rows, so that all positions of a piece,
// and what lies between them, are one run of numbers that vectors go along. passes/kernels/sums.py has the same fields.
#pragma once

#include <vector>

#include "convolution.h"
#include "threads.h"
#include "zeroing.h"

namespace sparsify {

struct Sum {
  int64_t images, rows, columns, last_columns;  // of the target; its last row may be shorter
  int64_t channels, source_rows, source_columns, source_image, source_channel, source_row, source_column;
  int64_t outputs, target_image, target_channel, target_row, target_column;
  int64_t stride_rows, stride_columns, phases;
  const int32_t *shifts;  // [phases][2] first row and column of the source that is in the planes of a phase
  int64_t above, below;   // rows that weights reach over
  int64_t lead, pitch, height, distance;  // floats before the first pixel; to the next row; rows to the next image; plane
  int64_t together, band;                 // images of a piece; rows of a piece, all where it is several images
  int64_t tile;                           // vectors of positions
  int64_t group, blocks, chunks, widest;  // outputs that share a pattern; blocks of inputs; chunks of groups, of at most so many
  int64_t by_chunk;                       // threads take chunks of all pieces, not pieces
  const int32_t *chunk_groups;            // [chunks + 1] first group
  const int32_t *starts;                  // chunk by chunk, block by block, group by group: where its weights start
  const int32_t *offsets;                 // [weights / group] of the pixel that a group's weights multiply, in the planes
  const int32_t *index;                   // [weights] of their numbers in the dense weight, ascending
  const int32_t *place;                   // [weights] where each of these is in the order of `offsets`, group by group
  int64_t weights, elements;              // kept, and in the dense weight
  int64_t shift;                          // floats before the first of the target
};

struct Piece {
  int64_t image, images, row, rows, run;

  // Of the sum `s`, which may have fewer rows than `first`, whose pieces are counted.
  Piece(const Sum &s, const Sum &first, int64_t number) {
    image = number / bands(first) * s.together;
    images = std::min(s.together, s.images - image);
    row = number % bands(first) * s.band;
    rows = std::max(std::min(s.band, s.rows - row), int64_t(0));
    run = rows ? ((images - 1) * s.height + rows - 1) * s.pitch + s.columns : 0;
  }

  static int64_t bands(const Sum &s) { return (s.rows + s.band - 1) / s.band; }

  static int64_t count(const Sum &s) { return bands(s) * ((s.images + s.together - 1) / s.together); }
};

constexpr int64_t kAhead = 3;  // channels that copies ask for before they come to them

// Copy numbers that are `step` apart. What lies `ahead` of what is far away, which is read or else `Written`, is asked for.
template <bool Written = false>
void copy_run(const float *from, int64_t step, float *to, int64_t count, int64_t ahead = 0) {
  if (step == 2) return copy_evens(from, to, count);
  if (step != 1 || count < 4) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * step];
    return;
  }
  const auto copy = [&](auto lanes) {  // the last vector begins where it ends with the last number
    const auto one = [&](int64_t at) { std::memcpy(to + at, from + at, sizeof(float) * lanes); };
    for (int64_t i = 0; i + lanes <= count; i += lanes) {
      __builtin_prefetch((Written ? to : from) + i + ahead, Written);
      one(i);
    }
    if (count % lanes) one(count - lanes);
  };
  if (count >= kLanes)
    copy(std::integral_constant<int64_t, kLanes>());
  else
    copy(std::integral_constant<int64_t, 4>());
}

// Copy a piece of the source into planes; what is around pixels is 0 already.
inline void pack(const Sum &s, const Piece &p, const float *source, float *planes) {
  const bool part = s.band < s.rows;
  for (int64_t phase = 0; phase < s.phases; ++phase) {
    const int64_t y0 = s.shifts[2 * phase], x0 = s.shifts[2 * phase + 1], step = s.stride_columns * s.source_column;
    const int64_t high = (s.source_rows - y0 + s.stride_rows - 1) / s.stride_rows;
    const int64_t wide = (s.source_columns - x0 + s.stride_columns - 1) / s.stride_columns;
    const int64_t top = part ? -s.above : 0, bottom = part ? p.rows + s.below : high;
    const auto width = [&](int64_t row) { return row == s.rows - 1 ? wide - s.columns + s.last_columns : wide; };
    const bool last = s.source_channel == 1 && step != 1;  // channels lie innermost
    const bool one_run = s.pitch == wide && step == 1 && s.source_row == wide && s.stride_rows == 1;
    for (int64_t i = 0; i < p.images; ++i) {
      const float *image = source + (p.image + i) * s.source_image + y0 * s.source_row + x0 * s.source_column;
      float *plane = planes + phase * s.distance + s.lead + i * s.height * s.pitch;
      for (int64_t c = 0; c < (last ? 1 : s.channels); ++c, plane += s.phases * s.distance, image += s.source_channel) {
        if (one_run && top == 0 && p.row + bottom <= high) {
          copy_run(image + p.row * wide, 1, plane, (bottom - 1) * wide + width(p.row + bottom - 1), kAhead * s.source_channel);
          continue;
        }
        const int64_t first = std::min(std::max(top, -p.row), bottom), end = std::max(std::min(bottom, high - p.row), first);
        const auto clear = [&](int64_t y, int64_t last_one) {  // rows that are not there
          for (; y < last_one; ++y)
            for (int64_t other = 0; other < (last ? s.channels : 1); ++other)
              std::fill_n(plane + y * s.pitch + other * s.phases * s.distance, wide, 0.f);
        };
        clear(top, first);
        for (int64_t y = first; y < end; ++y) {
          const float *from = image + (p.row + y) * s.stride_rows * s.source_row;
          float *to = plane + y * s.pitch;
          if (last)
            transpose(from, step, width(p.row + y), s.channels, to, s.phases * s.distance);
          else
            copy_run(from, step, to, width(p.row + y), kAhead * s.source_channel);
        }
        clear(end, bottom);
      }
    }
  }
}

// What of a tile is in the target, run by run.
struct Runs {
  struct One {
    int64_t from, to, count;
  };
  One runs[kLargest * kLanes];
  int count = 0;

  Runs(const Sum &s, const Piece &p, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t line = at / s.pitch, column = at % s.pitch, image = line / s.height, row = line % s.height;
      const int64_t next = std::min(end, (line + 1) * s.pitch);
      const int64_t columns = p.row + row == s.rows - 1 ? s.last_columns : s.columns;
      if (row < p.rows && column < columns) {
        const int64_t to = (p.image + image) * s.target_image + (p.row + row) * s.target_row + column * s.target_column;
        const int64_t size = std::min(columns - column, next - at);
        One *before = count ? runs + count - 1 : nullptr;
        if (before && before->from + before->count == at - begin && before->to + before->count * s.target_column == to)
          before->count += size;
        else
          runs[count++] = {at - begin, to, size};
      }
      at = next;
    }
  }
};

// Copy the positions of a tile, [outputs][stride], to the target, or from it.
template <bool Out>
void exchange(const Sum &s, const Piece &p, float *target, float *tile, int64_t stride, int64_t outputs, int64_t begin, int64_t end) {
  const Runs runs(s, p, begin, end);
  const int64_t step = s.target_column;
  const bool last = s.target_channel == 1 && step != 1;  // channels lie innermost
  for (int64_t o = 0; o < (last ? 1 : outputs); ++o, target += s.target_channel, tile += stride)
    for (int i = 0; i < runs.count; ++i) {
      const auto &run = runs.runs[i];
      float *to = target + run.to, *from = tile + run.from;
      if (last && Out)
        transpose(from, stride, outputs, run.count, to, step);
      else if (last)
        transpose(to, step, run.count, outputs, from, stride);
      else if (!Out)
        copy_run(to, step, from, run.count, kAhead * s.target_channel);
      else if (step == 1)
        copy_run<true>(from, 1, to, run.count, kAhead * s.target_channel);
      else
        for (int64_t x = 0; x < run.count; ++x) to[x * step] = from[x];
    }
}

// Add up what the weights of a block give to a tile.
template <int Group, int Size>
void sum_tile(const float *pixels, float *tile, int64_t stride, const float *values, const float *bias, const int32_t *start,
              const int32_t *offsets, int64_t groups, bool first) {
  constexpr int turns = Group * Size < 3 ? 4 : Group * Size < 6 ? 2 : 1;  // few sums wait for each other: so many sets of them
  for (int64_t g = 0; g < groups; ++g, ++start, tile += Group * stride) {
    if (!first && start[0] == start[1]) continue;
    Sums<Group, Size> sums[turns] = {};
    UNROLLED for (int r = 0; r < Group; ++r) {
      UNROLLED for (int v = 0; v < Size; ++v)
        sums[0].values[r][v] = first ? splat(bias ? bias[g * Group + r] : 0.f) : load(tile + r * stride + v * kLanes);
    }
    int32_t k = start[0];
    for (; k + turns <= start[1]; k += turns) {
      UNROLLED for (int i = 0; i < turns; ++i) sums[i].add(values + (k + i) * Group, pixels + offsets[k + i]);
    }
    if constexpr (turns > 1)
      for (; k < start[1]; ++k) sums[0].add(values + k * Group, pixels + offsets[k]);
    UNROLLED for (int r = 0; r < Group; ++r) {
      UNROLLED for (int v = 0; v < Size; ++v) {
        UNROLLED for (int i = 1; i < turns; ++i) sums[0].values[r][v] += sums[i].values[r][v];
        store(tile + r * stride + v * kLanes, sums[0].values[r][v]);
      }
    }
  }
}

// The products of `Weights` runs of the source with those of the gradients of a group's outputs, lane by lane.
template <int Group, int Weights>
std::array<Vector, Weights * Group> products(const float *gradients, int64_t stride, int64_t size, const float *pixels,
                                             const int32_t *offsets) {
  constexpr int sums = Weights * Group, turns = sums < 8 ? 8 / sums : 1;  // few sums wait for each other: so many sets of them
  std::array<Vector, sums> found[turns] = {};
  const auto add = [&](std::array<Vector, sums> &own, int64_t at) {
    Vector gradient[Group];
    UNROLLED for (int r = 0; r < Group; ++r) gradient[r] = load(gradients + r * stride + at);
    UNROLLED for (int w = 0; w < Weights; ++w) {
      const Vector x = load_for<Group>(pixels + offsets[w] + at);
      UNROLLED for (int r = 0; r < Group; ++r) own[w * Group + r] += gradient[r] * x;
    }
  };
  int64_t v = 0;
  for (; v + turns <= size; v += turns) {
    UNROLLED for (int i = 0; i < turns; ++i) add(found[i], (v + i) * kLanes);
  }
  for (; turns > 1 && v < size; ++v) add(found[0], v * kLanes);
  UNROLLED for (int i = 1; i < turns; ++i) {
    UNROLLED for (int w = 0; w < sums; ++w) found[0][w] += found[i][w];
  }
  return found[0];
}

// For every weight of a block, add the products of a tile: lane by lane to `partial`, or all together to `found` without one.
template <int Group>
void gradient_tile_of(const float *pixels, const float *tile, int64_t stride, int64_t size, float *partial, float *found,
                      const int32_t *start, const int32_t *offsets, int64_t groups) {
  const int32_t base = start[0];
  for (int64_t g = 0; g < groups; ++g, ++start, tile += Group * stride) {
    int32_t k = start[0];
    const auto add = [&](auto weights) {
      const auto sums = products<Group, weights>(tile, stride, size, pixels, offsets + k);
      UNROLLED for (size_t i = 0; i < sums.size(); ++i) {
        const int64_t place = (k - base) * Group + i;
        float *to = partial + place * kLanes;
        if (partial)
          store(to, load(to) + sums[i]);
        else
          found[place] += across(sums[i]);
      }
      k += weights;
    };
    constexpr int most = 8 / Group;
    while (k + most <= start[1]) add(std::integral_constant<int, most>());
    if constexpr (most > 4)
      if (k + 4 <= start[1]) add(std::integral_constant<int, 4>());
    if constexpr (most > 2)
      if (k + 2 <= start[1]) add(std::integral_constant<int, 2>());
    if (k < start[1]) add(std::integral_constant<int, 1>());
  }
}

template <int Group, int... Sizes>
constexpr auto sum_tiles(std::integer_sequence<int, Sizes...>) {
  return std::array{sum_tile<Group, Sizes + 1>...};
}
template <int Group>
constexpr auto kSumTiles = sum_tiles<Group>(std::make_integer_sequence<int, tile_size(Group)>());

inline auto sum_tile_of(const Sum &s, int64_t size) {
  return by_group(s.group, [&](auto group) { return kSumTiles<group>[size - 1]; });
}

// What a thread does is the same in every call with as many threads, so that results are the same to the bit.
struct Range {
  int64_t begin, end;

  Range(int64_t all, bool shared, int64_t thread, int64_t team)
      : begin(shared ? all * thread / team : 0), end(shared ? all * (thread + 1) / team : all) {}
};

inline Range pieces_of(const Sum &s, int thread, int team) { return {Piece::count(s), !s.by_chunk, thread, team}; }
inline Range chunks_of(const Sum &s, int thread, int team) { return {s.chunks, s.by_chunk != 0, thread, team}; }

// The values of kept weights in the order of the sum.
inline std::vector<float> values_of(const Sum &s, const float *weight, int32_t threads) {
  std::vector<float> values(s.weights);
  in_team(s.weights > kSerial ? threads : 1, [&](int64_t thread, int64_t team) {
    for (int64_t i = s.weights * thread / team; i < s.weights * (thread + 1) / team; ++i)
      values[s.place[i]] = weight[s.index[i]];
  });
  return values;
}

// The sums of a piece whose planes are there.
inline void sum_piece(const Sum &s, const Piece &p, const Range &chunks, const float *planes, float *target,
                      const std::vector<float> &values, const float *bias) {
  const int64_t stride = s.tile * kLanes, most = tile_size(static_cast<int>(s.group));
  float *tile = scratch(1, s.widest * s.group * stride);
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const int64_t first = s.chunk_groups[chunk], groups = s.chunk_groups[chunk + 1] - first, output = first * s.group;
    for (int64_t at = 0; at < p.run; at += stride) {
      const int64_t end = std::min(at + stride, p.run), size = (end - at + kLanes - 1) / kLanes;
      const int32_t *start = s.starts + first * s.blocks;
      for (int64_t b = 0; b < s.blocks; ++b, start += groups)
        for (int64_t v = 0; v < size; v += most)
          sum_tile_of(s, std::min(most, size - v))(planes + at + v * kLanes, tile + v * kLanes, stride, values.data(),
                                                   bias ? bias + output : nullptr, start, s.offsets, groups, b == 0);
      exchange<true>(s, p, target + s.shift + output * s.target_channel, tile, stride, groups * s.group, at, end);
    }
  }
}

// target = bias + the sum over kept weights of weight * source, for `count` parts of a target that are sums over the same planes.
inline void sum(const Sum *sums, int64_t count, const float *source, float *target, const float *weight, const float *bias,
                int32_t threads) {
  std::vector<std::vector<float>> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(values_of(sums[i], weight, threads));
  in_team(threads, [&](int thread, int team) {
    const Sum &s = sums[0];
    const Range pieces = pieces_of(s, thread, team);
    const int64_t floats = s.channels * s.phases * s.distance;
    float *planes = scratch(0, floats);
    std::fill(planes, planes + floats, 0.f);
    for (int64_t number = pieces.begin; number < pieces.end; ++number) {
      pack(s, Piece(s, s, number), source, planes);
      for (int64_t i = 0; i < count; ++i)
        sum_piece(sums[i], Piece(sums[i], s, number), chunks_of(sums[i], thread, team), planes, target, values[i], bias);
    }
  });
}

// The gradient of the dense weight, which is 0 where nothing is kept.
inline void sum_gradient(const Sum &s, const float *source, const float *target, float *weight, int32_t threads) {
  std::vector<std::vector<float>> found(threads);
  in_team(threads, [&](int thread, int team) {
    const Range pieces = pieces_of(s, thread, team), chunks = chunks_of(s, thread, team);
    const int64_t floats = s.channels * s.phases * s.distance, step = s.tile * kLanes;
    float *planes = scratch(0, floats);
    std::fill(planes, planes + floats, 0.f);
    found[thread].assign(s.weights, 0.f);
    for (int64_t number = pieces.begin; number < pieces.end; ++number) {
      const Piece p(s, s, number);
      const int64_t stride = (p.run + kLanes - 1) / kLanes * kLanes;
      pack(s, p, source, planes);
      for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
        const int64_t first = s.chunk_groups[chunk], groups = s.chunk_groups[chunk + 1] - first, outputs = groups * s.group;
        float *gradients = scratch(1, outputs * stride);
        std::fill(gradients, gradients + outputs * stride, 0.f);
        for (int64_t at = 0; at < p.run; at += step)
          exchange<false>(s, p, const_cast<float *>(target) + first * s.group * s.target_channel, gradients + at, stride, outputs,
                          at, std::min(at + step, p.run));
        const int32_t *start = s.starts + first * s.blocks;
        const auto gradient_tile = by_group(s.group, [](auto group) { return &gradient_tile_of<group>; });
        for (int64_t b = 0; b < s.blocks; ++b, start += groups) {
          const int64_t base = start[0] * s.group, lanes = (start[groups] * s.group - base) * kLanes;
          float *own = found[thread].data() + base, *partial = stride > step ? scratch(2, lanes) : nullptr;
          if (partial) std::fill(partial, partial + lanes, 0.f);
          for (int64_t at = 0; at < stride; at += step)
            gradient_tile(planes + at, gradients + at, stride, std::min(step, stride - at) / kLanes, partial, own, start,
                          s.offsets, groups);
          for (int64_t k = 0; partial && k < lanes / kLanes; ++k) own[k] += across(load(partial + k * kLanes));
        }
      }
    }
  });
  in_team(s.elements > kSerial ? threads : 1, [&](int64_t thread, int64_t team) {
    const int64_t begin = s.elements * thread / team, end = s.elements * (thread + 1) / team;
    std::fill(weight + begin, weight + end, 0.f);
    for (int64_t i = std::lower_bound(s.index, s.index + s.weights, begin) - s.index; i < s.weights && s.index[i] < end; ++i) {
      float total = 0;
      for (const auto &own : found) total += own.empty() ? 0.f : own[s.place[i]];
      weight[s.index[i]] = total;
    }
  });
}

}  // namespace sparsify
