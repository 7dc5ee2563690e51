// Vectors: as wide as the processor's, in the compiler's own notation, and the functions of activations on them.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

namespace sparsify {

#define UNROLLED _Pragma("GCC unroll 32")  // what is in registers must be known by name

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;  // floats in a vector
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

constexpr int kLargest = 14;  // vectors of pixels in a tile, at most

// Vectors of pixels in a tile whose sums stay in registers, beside the weights of a group and a vector of pixels, or else beside
// those pixels and a weight.
constexpr int tile_size(int group) {
  const int weights = (kRegisters - 1 - group) / group, pixels = (kRegisters - 1) / (group + 1);
  const int most = weights > pixels ? weights : pixels;
  return most < kLargest ? most : kLargest;
}

// What a function returns for the number of outputs that share a pattern, 1, 2 or 4, as a constant.
template <typename Function>
auto by_group(int64_t group, Function function) {
  if (group == 4) return function(std::integral_constant<int, 4>());
  return group == 2 ? function(std::integral_constant<int, 2>()) : function(std::integral_constant<int, 1>());
}

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef float Unaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));

inline Vector load(const float *from) { return *reinterpret_cast<const Unaligned *>(from); }
inline void store(float *to, Vector value) { *reinterpret_cast<Unaligned *>(to) = value; }
inline Vector splat(float value) { return value - Vector{}; }
inline Vector larger(Vector a, Vector b) { return a < b ? b : a; }  // NaN in a stays
inline Vector smaller(Vector a, Vector b) { return a > b ? b : a; }

// A vector that so many products take. It stays in a register then: GCC would read it from memory once more for every product.
template <int Products>
Vector load_for(const float *from) {
  Vector value = load(from);
#if defined(__x86_64__) && !defined(EMULATED)  // vectors that the processor does not have are in several registers
  if constexpr (Products > 1) asm("" : "+v"(value));
#elif defined(__aarch64__)
  if constexpr (Products > 1) asm("" : "+w"(value));
#endif
  return value;
}

template <typename To, typename From>
inline To bits(From value) {
  To result;
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// Where numbers come from, in memory: GCC builds what a loop says anew for every use.
struct Places {
  alignas(64) int32_t evens[kLanes] = {};  // of a vector, and of one that begins where that one ends
  alignas(64) int32_t turned[kLanes][kLanes] = {};  // by 1, 2, 4 and so on numbers, each half with the other

  constexpr Places() {
    for (int i = 0; i < kLanes; ++i) evens[i] = 2 * i + (i >= kLanes / 2);
    for (int half = 1; half < kLanes; half *= 2)
      for (int i = 0; i < kLanes; ++i) turned[half][i] = i ^ half;
  }
};
constexpr Places kPlaces;

inline Integers places_at(const int32_t *from) {
  Integers places;
  std::memcpy(&places, from, sizeof places);
  return places;
}

// A vector of every other number; the last one is the last that is read.
inline Vector evens(const float *from) {
  const Vector a = load(from), b = load(from + kLanes - 1);
#if defined(__clang__)
  if constexpr (kLanes == 4) return __builtin_shufflevector(a, b, 0, 2, 5, 7);
  if constexpr (kLanes == 8) return __builtin_shufflevector(a, b, 0, 2, 4, 6, 9, 11, 13, 15);
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31);
#else
  return __builtin_shuffle(a, b, places_at(kPlaces.evens));
#endif
}

// The sum of the numbers of a vector.
inline float across(Vector x) {
#if defined(__clang__)
  float numbers[kLanes], sum = 0;
  store(numbers, x);
  UNROLLED for (int i = 0; i < kLanes; ++i) sum += numbers[i];
  return sum;
#else
  UNROLLED for (int half = kLanes / 2; half; half /= 2) x += __builtin_shuffle(x, places_at(kPlaces.turned[half]));
  return x[0];
#endif
}

// exp(x) = 2^n exp(r), |r| <= log(2)/2, by the Taylor series of degree 7: relative error below 2e-7.
inline Vector exponential(Vector x) {
  const Vector bounded = smaller(larger(x, splat(-87.f)), splat(88.f));
  const Vector rounder = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vector n = (bounded * 1.44269504f + rounder) - rounder;
  const Vector r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  Vector sum = splat(1.f / 5040);
  for (float term : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) sum = sum * r + term;
  const Vector power = bits<Vector>((__builtin_convertvector(n, Integers) + 127) << 23);
  return x != x ? x : sum * power;
}

inline Vector sigmoid(Vector x) { return 1.f / (1.f + exponential(-x)); }
inline Vector hyperbolic(Vector x) { return 2.f * sigmoid(2.f * x) - 1.f; }

// erf(x) / x as a polynomial of 2 (x / 3.92)^2 - 1, fitted with least weighted error: absolute error below 2e-7.
inline Vector error_function(Vector x) {
  constexpr float most = 3.92f;  // from here on it is 1 to a float
  const Vector bounded = smaller(larger(x, splat(-most)), splat(most)), s = bounded * bounded * (2 / (most * most)) - 1.f;
  Vector sum = splat(-7.7534176e-4f);
  for (float term : {2.0457376e-3f, -1.6189424e-3f, 2.0872145e-3f, -7.3715965e-3f, 1.4004776e-2f, -2.0180687e-2f, 2.9820908e-2f,
                     -4.3374587e-2f, 5.8358472e-2f, -7.4030191e-2f, 9.0602316e-2f, -1.0917850e-1f, 1.3408427e-1f, -1.8010864e-1f,
                     3.6073682e-1f})
    sum = sum * s + term;
  return x >= most ? splat(1.f) : x <= -most ? splat(-1.f) : sum * bounded;
}

// The order of passes/kernels/steps.py.
enum Activation : int64_t { kNone, kRelu, kClamp, kSigmoid, kSilu, kHardSigmoid, kHardSwish, kGelu, kGeluTanh, kTanh };

inline Vector activate(Vector x, int64_t activation, float low, float high) {
  switch (activation) {
    case kRelu: return larger(x, Vector{});
    case kClamp: return smaller(larger(x, splat(low)), splat(high));
    case kSigmoid: return sigmoid(x);
    case kSilu: return x * sigmoid(x);
    case kHardSigmoid: return smaller(larger(x + 3.f, Vector{}), splat(6.f)) / 6.f;
    case kHardSwish: return x * smaller(larger(x + 3.f, Vector{}), splat(6.f)) / 6.f;
    case kGelu: return 0.5f * x * (1.f + error_function(x * 0.70710678f));
    case kGeluTanh: return 0.5f * x * (1.f + hyperbolic(0.79788456f * (x + 0.044715f * x * x * x)));
    case kTanh: return hyperbolic(x);
    default: return x;
  }
}

// Not inline: it is short beside what calls it, and would be there once for every tile.
__attribute__((noinline)) inline void activate_all(float *to, int64_t vectors, int64_t activation, float low, float high) {
  const auto each = [&](auto kind) {
    for (int64_t v = 0; v < vectors * kLanes; v += kLanes) store(to + v, activate(load(to + v), kind, low, high));
  };
  switch (activation) {
    case kGelu: return each(std::integral_constant<int64_t, kGelu>());
    case kSilu: return each(std::integral_constant<int64_t, kSilu>());
    default: return each(activation);
  }
}

inline float activate_one(float x, int64_t activation, float low, float high) {
  return activate(splat(x), activation, low, high)[0];
}

}  // namespace sparsify
