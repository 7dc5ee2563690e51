// Norms: batch normalisation in training, with the addition and the ReLU that follow it, over tensors [images][channels][pixels].
//
// Numbers of a channel are read twice. Threads take blocks of channels that are still in the cache for the second time.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace sparsify {

struct Norm {
  int64_t images, channels, pixels, relu;  // whether a ReLU follows
  double epsilon;
  const float *weight, *bias;  // [channels]
};

constexpr int64_t kNear = 1 << 16;  // floats that stay in the cache of a core

// Call work(first channel, end) for blocks of channels, of which so many tensors are read twice.
template <typename Work>
void in_blocks(const Norm &n, int64_t tensors, int32_t threads, const Work &work) {
  const int64_t fitting = std::max(kNear / (tensors * n.images * n.pixels), int64_t(1));
  const int64_t turns = (n.channels + fitting - 1) / fitting;
  const int64_t blocks = std::min(n.channels, (turns + threads - 1) / threads * threads);
  in_team(threads, [&](int64_t thread, int64_t team) {
    for (int64_t block = blocks * thread / team; block < blocks * (thread + 1) / team; ++block)
      work(n.channels * block / blocks, n.channels * (block + 1) / blocks);
  });
}

// Call use(channel, image, first number) for all planes of some channels.
template <typename Use>
void planes_of(const Norm &n, int64_t first, int64_t end, const Use &use) {
  for (int64_t image = 0; image < n.images; ++image)
    for (int64_t c = first; c < end; ++c) use(c, image, (image * n.channels + c) * n.pixels);
}

// Go along a plane, vector by vector; `one` gets what does not fill a vector. The same plane of the next image, which lies far
// away, is asked for: of what is read and, with `written`, of what is written.
template <typename Vectors, typename One>
void along(const Norm &n, int64_t image, int64_t begin, std::initializer_list<const float *> read,
           std::initializer_list<const float *> written, const Vectors &vectors, const One &one) {
  const int64_t ahead = image + 1 < n.images ? n.channels * n.pixels : 0;
  int64_t i = begin;
  for (; i + kLanes <= begin + n.pixels; i += kLanes) {
    for (const float *from : read)
      if (from) __builtin_prefetch(from + i + ahead);
    for (const float *to : written)
      if (to) __builtin_prefetch(to + i + ahead, 1);
    vectors(i);
  }
  for (; i < begin + n.pixels; ++i) one(i);
}

using Pair = std::array<Vector, 2>;

// Two sums over all pixels of some channels; vectors(pair, channel, number) and one(...) add to them. In float lane by lane for
// some images, then in double.
template <typename Vectors, typename One>
std::vector<std::array<double, 2>> sums_of(const Norm &n, int64_t first, int64_t end, std::initializer_list<const float *> read,
                                           const Vectors &vectors, const One &one) {
  std::vector<Pair> sums(end - first);
  std::vector<std::array<double, 2>> found(end - first);
  const int64_t turns = std::max(64 * kLanes / n.pixels, int64_t(1));
  planes_of(n, first, end, [&](int64_t c, int64_t image, int64_t begin) {
    Pair own = sums[c - first];
    along(
        n, image, begin, read, {}, [&](int64_t i) { vectors(own, c, i); }, [&](int64_t i) { one(own, c, i); });
    if ((image + 1) % turns == 0 || image + 1 == n.images)
      for (int k = 0; k < 2; ++k) {
        found[c - first][k] += across(own[k]);
        own[k] = Vector{};
      }
    sums[c - first] = own;
  });
  return found;
}

// What a channel is multiplied by, and what is added.
struct Line {
  float scale, shift;

  Line(const Norm &n, int64_t c, float mean, float variance)
      : scale(static_cast<float>(n.weight[c] / std::sqrt(variance + n.epsilon))), shift(n.bias[c] - mean * scale) {}
};

// y = the normalised x, plus `other` if it is not null, and mean and biased variance of every channel. What is squared is the
// distance from the channel's first number, so that nothing cancels.
inline void norm_forward(const Norm &n, const float *x, const float *other, float *y, float *mean, float *variance, int32_t threads) {
  const double count = static_cast<double>(n.images * n.pixels);
  in_blocks(n, 1, threads, [&](int64_t first, int64_t end) {
    const auto sums = sums_of(
        n, first, end, {x},
        [&](Pair &own, int64_t c, int64_t i) {
          const Vector value = load(x + i) - x[c * n.pixels];
          own[0] += value;
          own[1] += value * value;
        },
        [&](Pair &own, int64_t c, int64_t i) {
          const float value = x[i] - x[c * n.pixels];
          own[0][0] += value;
          own[1][0] += value * value;
        });
    std::vector<Line> lines;
    for (int64_t c = first; c < end; ++c) {
      const auto [sum, square] = sums[c - first];
      const double shift = sum / count;
      mean[c] = static_cast<float>(x[c * n.pixels] + shift);
      variance[c] = static_cast<float>(std::max(0.0, square / count - shift * shift));
      lines.emplace_back(n, c, mean[c], variance[c]);
    }
    planes_of(n, first, end, [&](int64_t c, int64_t image, int64_t begin) {
      const Line line = lines[c - first];
      along(
          n, image, begin, {other}, {y},
          [&](int64_t i) {
            Vector value = load(x + i) * line.scale + line.shift;
            if (other) value += load(other + i);
            store(y + i, n.relu ? larger(value, Vector{}) : value);
          },
          [&](int64_t i) {
            const float value = x[i] * line.scale + line.shift + (other ? other[i] : 0.f);
            y[i] = n.relu && value < 0.f ? 0.f : value;
          });
    });
  });
}

// What of a gradient comes through a ReLU: all without one, what is not 0 in its result `y`, or else where x lies on a line's
// upper side.
struct Gate {
  const float *gradient, *x, *y;
  bool relu;
  Line line;

  Vector vector(int64_t i) const {
    const Vector g = load(gradient + i);
    if (!relu) return g;
    return y ? (load(y + i) == 0.f ? Vector{} : g) : (load(x + i) * line.scale + line.shift > 0.f ? g : Vector{});
  }
  float one(int64_t i) const {
    if (!relu) return gradient[i];
    return (y ? y[i] == 0.f : !(x[i] * line.scale + line.shift > 0.f)) ? 0.f : gradient[i];
  }
};

// The gradients of x, of weight and bias, and of what was added if `of_other` is not null; `y` is null where nothing was added.
inline void norm_backward(const Norm &n, const float *gradient, const float *x, const float *y, const float *mean, const float *variance,
                          float *of_x, float *of_other, float *of_weight, float *of_bias, int32_t threads) {
  const double count = static_cast<double>(n.images * n.pixels);
  in_blocks(n, y ? 3 : 2, threads, [&](int64_t first, int64_t end) {
    std::vector<float> slopes(end - first), added(end - first);  // what x is multiplied by, and what is added
    std::vector<Gate> gates;
    for (int64_t c = first; c < end; ++c) gates.push_back({gradient, x, y, n.relu != 0, Line(n, c, mean[c], variance[c])});
    const auto sums = sums_of(  // of what comes through the gate, and of it and x - mean
        n, first, end, {x, gradient, y},
        [&](Pair &own, int64_t c, int64_t i) {
          const Vector g = gates[c - first].vector(i);
          own[0] += g;
          own[1] += g * (load(x + i) - mean[c]);
        },
        [&](Pair &own, int64_t c, int64_t i) {
          const float g = gates[c - first].one(i);
          own[0][0] += g;
          own[1][0] += g * (x[i] - mean[c]);
        });
    for (int64_t c = first; c < end; ++c) {
      const int64_t i = c - first;
      const double inverse = 1 / std::sqrt(variance[c] + n.epsilon);
      const float scale = gates[i].line.scale;
      const auto [sum, product] = sums[i];
      of_bias[c] = static_cast<float>(sum);
      of_weight[c] = static_cast<float>(product * inverse);
      slopes[i] = static_cast<float>(-scale * inverse * inverse * product / count);
      added[i] = static_cast<float>(-scale * sum / count) - slopes[i] * mean[c];
    }
    planes_of(n, first, end, [&](int64_t c, int64_t image, int64_t begin) {
      const Gate gate = gates[c - first];
      const float slope = slopes[c - first], plus = added[c - first];
      along(
          n, image, begin, {}, {of_x, of_other},
          [&](int64_t i) {
            const Vector g = gate.vector(i);
            if (of_other) store(of_other + i, g);
            store(of_x + i, g * gate.line.scale + load(x + i) * slope + plus);
          },
          [&](int64_t i) {
            const float g = gate.one(i);
            if (of_other) of_other[i] = g;
            of_x[i] = g * gate.line.scale + x[i] * slope + plus;
          });
    });
  });
}

}  // namespace sparsify
