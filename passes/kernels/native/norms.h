// Norms: batch normalisation in training, with the addition and the ReLU that follow it, over tensors [images][channels][pixels].
#pragma once

#include <algorithm>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace sparsify {

struct Norm {
  int64_t images, channels, pixels;
};

// Call use(image, channel, first number) for all planes of a thread's images.
template <typename Use>
void planes_of(const Norm &n, int thread, int team, const Use &use) {
  for (int64_t image = n.images * thread / team; image < n.images * (thread + 1) / team; ++image)
    for (int64_t c = 0; c < n.channels; ++c) use(c, (image * n.channels + c) * n.pixels);
}

// Go along a plane, vector by vector; `one` gets what does not fill a vector.
template <typename Vectors, typename One>
void along(int64_t begin, int64_t pixels, const Vectors &vectors, const One &one) {
  int64_t i = begin;
  for (; i + kLanes <= begin + pixels; i += kLanes) vectors(i);
  for (; i < begin + pixels; ++i) one(i);
}

// Two sums a channel, of all threads, in double precision.
class Totals {
 public:
  Totals(int64_t channels, int32_t threads) : channels_(channels), sums_(2 * channels * threads) {}
  double *of(int thread) { return sums_.data() + 2 * channels_ * thread; }
  double total(int64_t which) const {
    double sum = 0;
    for (size_t i = which; i < sums_.size(); i += 2 * channels_) sum += sums_[i];
    return sum;
  }

 private:
  int64_t channels_;
  std::vector<double> sums_;
};

// Mean and biased variance of every channel. What is squared is the distance from the channel's first number, so that nothing
// cancels.
inline void norm_statistics(const Norm &n, const float *x, float *mean, float *variance, int32_t threads) {
  Totals totals(n.channels, threads);
  in_team(threads, [&](int thread, int team) {
    double *own = totals.of(thread);
    planes_of(n, thread, team, [&](int64_t c, int64_t begin) {
      const float first = x[c * n.pixels];
      Vector sum = {}, squares = {};
      float rest = 0, rest_squares = 0;
      along(
          begin, n.pixels,
          [&](int64_t i) {
            const Vector value = load(x + i) - first;
            sum += value;
            squares += value * value;
          },
          [&](int64_t i) {
            rest += x[i] - first;
            rest_squares += (x[i] - first) * (x[i] - first);
          });
      own[2 * c] += static_cast<double>(across(sum)) + rest;
      own[2 * c + 1] += static_cast<double>(across(squares)) + rest_squares;
    });
  });
  const double count = static_cast<double>(n.images * n.pixels);
  for (int64_t c = 0; c < n.channels; ++c) {
    const double shift = totals.total(2 * c) / count;
    mean[c] = static_cast<float>(x[c * n.pixels] + shift);
    variance[c] = static_cast<float>(std::max(0.0, totals.total(2 * c + 1) / count - shift * shift));
  }
}

// y = x * scale + shift + other, or 0 where that is negative and `relu` says so; `other` may be null.
inline void norm_apply(const Norm &n, const float *x, const float *other, const float *scale, const float *shift, float *y, bool relu,
                       int32_t threads) {
  in_team(threads, [&](int thread, int team) {
    planes_of(n, thread, team, [&](int64_t c, int64_t begin) {
      const Vector by = splat(scale[c]), plus = splat(shift[c]);
      along(
          begin, n.pixels,
          [&](int64_t i) {
            Vector value = load(x + i) * by + plus;
            if (other) value += load(other + i);
            store(y + i, relu ? larger(value, Vector{}) : value);
          },
          [&](int64_t i) {
            const float value = x[i] * scale[c] + shift[c] + (other ? other[i] : 0.f);
            y[i] = relu && value < 0.f ? 0.f : value;
          });
    });
  });
}

// What of a gradient comes through a ReLU: all without one, what is not 0 in its result `y`, or else what x * scale + shift says.
struct Gate {
  const float *y, *x, *scale, *shift;  // the last two are null where `y` is there or all comes through

  Vector vector(const float *gradient, int64_t c, int64_t i) const {
    const Vector g = load(gradient + i);
    if (y) return load(y + i) == 0.f ? Vector{} : g;
    return shift ? (load(x + i) * splat(scale[c]) + splat(shift[c]) > 0.f ? g : Vector{}) : g;
  }
  float one(const float *gradient, int64_t c, int64_t i) const {
    if (y) return y[i] == 0.f ? 0.f : gradient[i];
    return shift && !(x[i] * scale[c] + shift[c] > 0.f) ? 0.f : gradient[i];
  }
};

// Of the gradient g of y that comes through the gate: the sums of g and of g * (x - mean).
inline void norm_sums(const Norm &n, const float *gradient, const Gate &gate, const float *mean, float *sums, float *products,
                      int32_t threads) {
  Totals totals(n.channels, threads);
  in_team(threads, [&](int thread, int team) {
    double *own = totals.of(thread);
    planes_of(n, thread, team, [&](int64_t c, int64_t begin) {
      Vector sum = {}, product = {};
      float rest = 0, rest_product = 0;
      along(
          begin, n.pixels,
          [&](int64_t i) {
            const Vector g = gate.vector(gradient, c, i);
            sum += g;
            product += g * (load(gate.x + i) - mean[c]);
          },
          [&](int64_t i) {
            const float g = gate.one(gradient, c, i);
            rest += g;
            rest_product += g * (gate.x[i] - mean[c]);
          });
      own[2 * c] += static_cast<double>(across(sum)) + rest;
      own[2 * c + 1] += static_cast<double>(across(product)) + rest_product;
    });
  });
  for (int64_t c = 0; c < n.channels; ++c) {
    sums[c] = static_cast<float>(totals.total(2 * c));
    products[c] = static_cast<float>(totals.total(2 * c + 1));
  }
}

// of_x = g * by + x * times + plus, and of_other = g, if it is not null.
inline void norm_backward(const Norm &n, const float *gradient, const Gate &gate, const float *by, const float *times,
                          const float *plus, float *of_x, float *of_other, int32_t threads) {
  in_team(threads, [&](int thread, int team) {
    planes_of(n, thread, team, [&](int64_t c, int64_t begin) {
      along(
          begin, n.pixels,
          [&](int64_t i) {
            const Vector g = gate.vector(gradient, c, i);
            if (of_other) store(of_other + i, g);
            store(of_x + i, g * splat(by[c]) + load(gate.x + i) * splat(times[c]) + splat(plus[c]));
          },
          [&](int64_t i) {
            const float g = gate.one(gradient, c, i);
            if (of_other) of_other[i] = g;
            of_x[i] = g * by[c] + gate.x[i] * times[c] + plus[c];
          });
    });
  });
}

}  // namespace sparsify
