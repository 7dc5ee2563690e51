// Steps: what a plan is made of. passes/kernels/steps.py has the same fields in the same order.
//
// Activations of one image lie in an arena of floats. A plane holds one channel: `rows` rows of `columns` pixels, `pitch` floats
// apart, so that a row of pixels, and what lies between it and the next, is one run of numbers that vectors go along. What is
// around the pixels is the padding of steps that look there, if there are any: then the step that writes them sets it to 0.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace sparsify {

enum Kind : int64_t { kRead, kMove, kWrite, kConvolve, kDots, kPool, kAdd, kMultiply, kActivate, kMean, kNormalize, kAttend };

struct Step {
  int64_t kind;
  int64_t items;     // pieces of work that threads take
  int64_t grain;     // channels of a piece, where a piece is channels; vectors of a piece of a convolution
  int64_t channels, rows, columns, pitch;
  int64_t lead, tail;     // floats before the first pixel and after the last row that belong to the plane
  int64_t framed;         // what is around the pixels of what is written is looked at
  const int32_t *target;  // [channels] where pixel (0, 0) is, in floats from the start of the arena
  const int32_t *source;  // [channels] likewise of what is read
  const int32_t *other;   // [channels] of a second operand, or null
  int64_t activation;
  float low, high, epsilon;
  float scaling;          // of the products of an attention
  int64_t even;           // the second operand has one number a plane, or one plane for all heads; planes that are written to a
                          // tensor are evenly apart
  // Of what is read and has a grid of its own, and of tensors outside the arena: distances in floats.
  int64_t outside;        // which tensor
  int64_t image_stride, channel_stride, row_stride, column_stride;
  const int32_t *boxes;   // [channels][4] first and last + 1 row, and column, that are read; others are 0
  int64_t source_rows, source_columns, source_pitch;
  const int32_t *window;  // [8] kernel, stride, padding and dilation of rows, then of columns
  // Convolutions: sums over kept weights. `group` outputs, 1, 2 or 4, that share a pattern follow each other in target and bias.
  int64_t group, blocks, chunks;
  const int32_t *chunk_groups;  // [chunks + 1] first group
  const int32_t *starts;        // chunk by chunk, block by block, group by group: where its weights start
  const int32_t *offsets;       // [weights] where pixel (0, 0) of the input that a weight multiplies is
  const float *values;          // [weights][group]
  const float *scale;           // [channels] of a normalisation, or null
  const float *bias;            // [channels], or null
  int64_t heads;                // of an attention
};

// What lies between the positions of a tile and is no pixel, besides what is before the first and after the last row.
struct Gaps {
  int32_t places[kLargest * kLanes];
  int count = 0;

  Gaps(const Step &step, int64_t begin, int64_t end) {
    if (!step.framed || step.pitch == step.columns) return;
    for (int64_t row = begin / step.pitch; row < step.rows; ++row)
      for (int64_t at = row * step.pitch + step.columns; at < (row + 1) * step.pitch; ++at) {
        if (at >= end) return;
        if (at >= begin) places[count++] = static_cast<int32_t>(at);
      }
  }
};

// How far pixels reach. Vectors that begin among them may end in the tail, unless a plane is one number.
inline int64_t length(const Step &step) { return (step.rows - 1) * step.pitch + step.columns; }

inline void store_within(const Step &step, float *to, Vector value) {
  if (step.tail)
    store(to, value);
  else
    *to = value[0];
}

// Set what is around the pixels between two positions, if it is looked at.
inline void frame(const Step &step, float *plane, int64_t begin, int64_t end, const Gaps &gaps) {
  if (!step.framed) return;
  if (begin == 0) std::fill(plane - step.lead, plane, 0.f);
  for (int i = 0; i < gaps.count; ++i) plane[gaps.places[i]] = 0.f;
  if (end >= length(step)) std::fill(plane + length(step), plane + step.rows * step.pitch + step.tail, 0.f);
}

// The same for positions that may be many.
inline void frame(const Step &step, float *plane, int64_t begin, int64_t end) {
  if (!step.framed) return;
  if (begin == 0) std::fill(plane - step.lead, plane, 0.f);
  for (int64_t row = begin / step.pitch; row + 1 < step.rows && row * step.pitch < end; ++row) {
    const int64_t from = std::max(row * step.pitch + step.columns, begin), to = std::min((row + 1) * step.pitch, end);
    if (from < to) std::fill(plane + from, plane + to, 0.f);
  }
  if (end >= length(step)) std::fill(plane + length(step), plane + step.rows * step.pitch + step.tail, 0.f);
}

inline void frame(const Step &step, float *plane) { frame(step, plane, 0, length(step)); }

// Copy every other number. The last vector begins where it ends with the last number.
inline void copy_evens(const float *from, float *to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, evens(from + 2 * i));
  if (i < count && i) store(to + count - kLanes, evens(from + 2 * (count - kLanes)));
  for (; i < count && count < kLanes; ++i) to[i] = from[2 * i];
}

typedef float Four __attribute__((vector_size(16)));
typedef float UnalignedFour __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t FourIntegers __attribute__((vector_size(16)));
#if defined(__clang__)
#define CHOSEN(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define CHOSEN(a, b, ...) __builtin_shuffle(a, b, FourIntegers{__VA_ARGS__})
#endif

// Copy a matrix whose columns become rows, four by four.
inline void transpose(const float *from, int64_t from_stride, int64_t rows, int64_t columns, float *to, int64_t to_stride) {
  const int64_t even_rows = rows / 4 * 4, even_columns = columns / 4 * 4;
  for (int64_t x = 0; x < even_columns; x += 4) {
    for (int64_t y = 0; y < even_rows; y += 4) {
      Four lines[4];
      for (int i = 0; i < 4; ++i) lines[i] = *reinterpret_cast<const UnalignedFour *>(from + (y + i) * from_stride + x);
      const Four low = CHOSEN(lines[0], lines[1], 0, 4, 1, 5), high = CHOSEN(lines[0], lines[1], 2, 6, 3, 7);
      const Four next_low = CHOSEN(lines[2], lines[3], 0, 4, 1, 5), next_high = CHOSEN(lines[2], lines[3], 2, 6, 3, 7);
      *reinterpret_cast<UnalignedFour *>(to + x * to_stride + y) = CHOSEN(low, next_low, 0, 1, 4, 5);
      *reinterpret_cast<UnalignedFour *>(to + (x + 1) * to_stride + y) = CHOSEN(low, next_low, 2, 3, 6, 7);
      *reinterpret_cast<UnalignedFour *>(to + (x + 2) * to_stride + y) = CHOSEN(high, next_high, 0, 1, 4, 5);
      *reinterpret_cast<UnalignedFour *>(to + (x + 3) * to_stride + y) = CHOSEN(high, next_high, 2, 3, 6, 7);
    }
    for (int64_t y = even_rows; y < rows; ++y)
      for (int64_t i = 0; i < 4; ++i) to[(x + i) * to_stride + y] = from[y * from_stride + x + i];
  }
  for (int64_t x = even_columns; x < columns; ++x)
    for (int64_t y = 0; y < rows; ++y) to[x * to_stride + y] = from[y * from_stride + x];
}

// Read planes from a tensor, or from other planes of the arena, at another distance of rows and columns.
inline void copy_planes(const Step &step, const float *from, float *arena, int64_t begin, int64_t end) {
  if (step.column_stride != 1 && step.channel_stride == 1 && step.kind == kRead) {  // channels last
    const int64_t distance = step.channels > 1 ? step.target[1] - step.target[0] : 0;
    for (int64_t row = 0; row < step.rows; ++row)
      transpose(from + row * step.row_stride + begin, step.column_stride, step.columns, end - begin,
                arena + step.target[begin] + row * step.pitch, distance);
    for (int64_t c = begin; c < end; ++c) frame(step, arena + step.target[c]);
    return;
  }
  for (int64_t c = begin; c < end; ++c) {
    float *plane = arena + step.target[c];
    const float *source = from + step.source[c];
    const int32_t *box = step.boxes + 4 * c;
    for (int64_t row = 0; row < step.rows; ++row) {
      float *to = plane + row * step.pitch;
      if (row < box[0] || row >= box[1]) {
        std::fill(to, to + step.columns, 0.f);
        continue;
      }
      const float *line = source + row * step.row_stride;
      std::fill(to, to + box[2], 0.f);
      if (step.column_stride == 1)
        std::copy(line + box[2], line + box[3], to + box[2]);
      else if (step.column_stride == 2)
        copy_evens(line + 2 * box[2], to + box[2], box[3] - box[2]);
      else
        for (int64_t column = box[2]; column < box[3]; ++column) to[column] = line[column * step.column_stride];
      std::fill(to + box[3], to + step.columns, 0.f);
    }
    frame(step, plane);
  }
}

// Write planes to a tensor.
inline void write_planes(const Step &step, const float *arena, float *to, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < step.rows; ++row) {
    float *line = to + row * step.row_stride;
    if (step.column_stride == 1)
      for (int64_t c = begin; c < end; ++c) {
        const float *plane = arena + step.source[c] + row * step.pitch;
        std::copy(plane, plane + step.columns, line + c * step.channel_stride);
      }
    else if (step.even)  // planes that are evenly apart
      transpose(arena + step.source[begin] + row * step.pitch, step.source[1] - step.source[0], end - begin, step.columns,
                line + begin, step.column_stride);
    else
      for (int64_t c = begin; c < end; ++c)
        for (int64_t x = 0; x < step.columns; ++x)
          line[x * step.column_stride + c * step.channel_stride] = arena[step.source[c] + row * step.pitch + x];
  }
}

// Element by element: the sum or product of two planes, then an activation.
inline void combine_planes(const Step &step, float *arena, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    const float *source = arena + step.source[c], *other = step.other ? arena + step.other[c] : nullptr;
    float *plane = arena + step.target[c];
    for (int64_t at = 0; at < length(step); at += kLanes) {
      Vector value = load(source + at);
      if (step.kind != kActivate) {
        const Vector second = step.even ? splat(*other) : load(other + at);
        value = step.kind == kAdd ? value + second : value * second;
      }
      store_within(step, plane + at, activate(value, step.activation, step.low, step.high));
    }
    frame(step, plane);
  }
}

// The mean of the pixels of a plane.
inline void mean_planes(const Step &step, float *arena, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    double sum = 0;
    for (int64_t row = 0; row < step.source_rows; ++row) {
      const float *line = arena + step.source[c] + row * step.source_pitch;
      float part = 0;
      for (int64_t column = 0; column < step.source_columns; ++column) part += line[column];
      sum += part;
    }
    const double mean = sum / static_cast<double>(step.source_rows * step.source_columns);
    arena[step.target[c]] = activate_one(static_cast<float>(mean), step.activation, step.low, step.high);
  }
}

// Every pixel over its channels: (x - mean) / sqrt(variance + epsilon) * scale + bias. A piece is `grain` vectors of pixels.
inline void normalize_pixels(const Step &step, float *arena, int64_t begin, int64_t end) {
  for (int64_t at = begin * kLanes; at < std::min(end * kLanes, length(step)); at += kLanes) {
    Vector sum = {}, squares = {};
    const Vector shift = load(arena + step.source[0] + at);  // of the first channel, so that squares do not cancel
    for (int64_t c = 0; c < step.channels; ++c) {
      const Vector x = load(arena + step.source[c] + at) - shift;
      sum += x;
      squares += x * x;
    }
    const float count = static_cast<float>(step.channels);
    const Vector mean = sum / count, variance = larger(squares / count - mean * mean, Vector{});
    Vector inverse;
    for (int i = 0; i < kLanes; ++i) inverse[i] = 1.f / __builtin_sqrtf(variance[i] + step.epsilon);
    for (int64_t c = 0; c < step.channels; ++c) {
      const Vector x = (load(arena + step.source[c] + at) - shift - mean) * inverse;
      store_within(step, arena + step.target[c] + at, x * (step.scale ? step.scale[c] : 1.f) + (step.bias ? step.bias[c] : 0.f));
    }
  }
  for (int64_t c = 0; c < step.channels; ++c) frame(step, arena + step.target[c], begin * kLanes, end * kLanes);
}

}  // namespace sparsify
