// Selection: the highest of many scores. A sample brackets the last that is chosen, and only what lies in the bracket is sorted.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace sparsify {

// The size of a score as an integer, which orders numbers as they are and NaN above them; the complement, if the lowest are chosen.
template <bool Lowest>
int32_t rank_of(float score) {
  const int32_t size = bits<int32_t>(score) & std::numeric_limits<int32_t>::max();
  return Lowest ? ~size : size;
}

struct Bracket {
  int32_t low = std::numeric_limits<int32_t>::min(), high = std::numeric_limits<int32_t>::max();
};

// Let a team go through `count` things: write(begin, end, list) adds to a list. Returns the lists behind each other.
template <typename T, typename Write>
std::vector<T> collect(int64_t count, int32_t threads, const Write &write) {
  std::vector<std::vector<T>> parts(std::max(threads, 1));
  in_team(threads, [&](int64_t thread, int64_t team) {
    write(count * thread / team, count * (thread + 1) / team, parts[thread]);
  });
  std::vector<T> all;
  for (const auto &part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

// The k-th highest of some ranks, from 1 to all of them: of the bucket that it is in, only that is sorted.
inline int32_t highest(const std::vector<int32_t> &ranks, int64_t k) {
  constexpr int kBuckets = 4096;
  const auto [low, high] = std::minmax_element(ranks.begin(), ranks.end());
  const int64_t least = *low;
  int shift = 0;
  while ((*high - least) >> shift >= kBuckets) ++shift;
  int32_t counts[kBuckets] = {};
  for (const int32_t rank : ranks) ++counts[(rank - least) >> shift];
  int64_t bucket = kBuckets - 1;
  for (; counts[bucket] < k; --bucket) k -= counts[bucket];
  std::vector<int32_t> inside;
  for (const int32_t rank : ranks)
    if ((rank - least) >> shift == bucket) inside.push_back(rank);
  std::nth_element(inside.begin(), inside.begin() + k - 1, inside.end(), std::greater<>());
  return inside[k - 1];
}

// Ranks between which the k-th highest should lie of those where mask[i] is `value`, by a sample. Larger samples take longer than
// what they leave out.
template <bool Lowest>
Bracket bracket(const float *scores, const uint8_t *mask, int64_t count, int64_t k, uint8_t value, int32_t threads) {
  Bracket found;
  if (count < 4096) return found;
  auto stride = static_cast<int64_t>(std::cbrt(count));
  while (std::gcd(stride, count) > 1) ++stride;  // else it could step through kernels always at the same place
  const auto sample = collect<int32_t>(count / stride, threads, [=](int64_t begin, int64_t end, std::vector<int32_t> &list) {
    list.resize(end - begin + 1);
    int64_t size = 0;
    for (int64_t i = begin; i < end; ++i) {
      list[size] = rank_of<Lowest>(scores[i * stride]);  // overwritten unless it counts: nothing to predict
      size += mask[i * stride] == value;
    }
    list.resize(size);
  });
  const double expected = static_cast<double>(k) / stride, margin = 4 * std::sqrt(expected) + 4;
  const auto before = static_cast<int64_t>(expected - margin), after = static_cast<int64_t>(expected + margin);
  const auto size = static_cast<int64_t>(sample.size());
  if (after <= size) found.low = highest(sample, after);
  if (before > 0 && before <= size) found.high = highest(sample, before);
  return found;
}

// Set chosen[i] to whether mask[i] is `value` and the rank of scores[i] lies above the bracket; list where it is and the rank lies
// within, from `begin` to before `end`. Returns how many are chosen.
template <bool Lowest>
int64_t split(const float *scores, const uint8_t *mask, int64_t begin, int64_t end, uint8_t value, Bracket bracket, uint8_t *chosen,
              std::vector<int64_t> &within) {
  constexpr int64_t kBlock = 64;
  int64_t found = 0, above = 0;
  for (; begin < end; begin += kBlock) {
    const int64_t size = std::min(kBlock, end - begin);
    uint8_t between[kBlock] = {}, some = 0, count = 0;
    for (int64_t i = 0; i < size; ++i) {
      const int32_t rank = rank_of<Lowest>(scores[begin + i]);
      const uint8_t inside = mask[begin + i] == value, over = rank > bracket.high, under = rank < bracket.low;
      chosen[begin + i] = inside & over;
      between[i] = inside & ~(over | under) & 1;
      some |= between[i];
      count += inside & over;
    }
    above += count;
    if (!some) continue;
    if (static_cast<int64_t>(within.size()) < found + kBlock) within.resize(2 * (found + kBlock));
    for (int64_t eight = 0; eight < size; eight += 8) {
      uint64_t any;
      std::memcpy(&any, between + eight, sizeof any);
      if (!any) continue;
      for (int64_t i = eight; i < std::min(eight + 8, size); ++i) {
        within[found] = begin + i;  // overwritten unless it counts: nothing to predict
        found += between[i];
      }
    }
  }
  within.resize(found);
  return above;
}

// Set chosen[i] where mask[i] is `value` and the rank of scores[i] is among the k highest of these, of equal ones the first. Returns
// whether there are so many.
template <bool Lowest>
bool select(const float *scores, const uint8_t *mask, int64_t count, int64_t k, uint8_t value, uint8_t *chosen, int32_t threads) {
  if (count <= kSerial) threads = 1;
  int64_t missing = 0;
  const auto split_by = [&](Bracket bracket) {
    std::atomic<int64_t> above{0};
    auto within = collect<int64_t>(count, threads, [&](int64_t begin, int64_t end, std::vector<int64_t> &list) {
      above += split<Lowest>(scores, mask, begin, end, value, bracket, chosen, list);
    });
    missing = k - above;
    return within;
  };
  auto within = split_by(bracket<Lowest>(scores, mask, count, k, value, threads));
  if (missing <= 0 || missing > static_cast<int64_t>(within.size())) within = split_by({});  // the sample misled
  if (missing > static_cast<int64_t>(within.size())) return false;
  std::vector<int32_t> ranks;
  for (const int64_t i : within) ranks.push_back(rank_of<Lowest>(scores[i]));
  const int32_t last = highest(ranks, missing);
  int64_t ties = missing - std::count_if(ranks.begin(), ranks.end(), [=](int32_t rank) { return rank > last; });
  for (size_t i = 0; i < ranks.size(); ++i)
    if (ranks[i] > last || (ranks[i] == last && ties-- > 0)) chosen[within[i]] = 1;
  return true;
}

}  // namespace sparsify
