// Selection: which of many scores lie above a bracket, and which in it. In the caller's thread: layers are selected side by side.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace sparsify {

// Set chosen[i] to whether among[i] is set and the rank of scores[i] exceeds `high`; write where ranks lie from `low` to `high`,
// NaN too, and return how many. The rank is |score|, or -|score| where the lowest come first.
template <bool Lowest>
int64_t split(const float *scores, const uint8_t *among, int64_t count, float low, float high, uint8_t *chosen, int64_t *positions) {
  constexpr int64_t kBlock = 64;
  int64_t found = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = std::min(kBlock, count - begin);
    uint8_t between[kBlock] = {}, some = 0;
    for (int64_t i = 0; i < size; ++i) {
      const float size_of = std::fabs(scores[begin + i]), rank = Lowest ? -size_of : size_of;
      const uint8_t inside = among[begin + i], above = rank > high, below = rank < low;
      chosen[begin + i] = inside & above;
      between[i] = inside & ~(above | below) & 1;
      some |= between[i];
    }
    if (!some) continue;
    for (int64_t eight = 0; eight < size; eight += 8) {
      uint64_t any;
      std::memcpy(&any, between + eight, sizeof any);
      if (!any) continue;
      for (int64_t i = eight; i < std::min(eight + 8, size); ++i) {
        positions[found] = begin + i;  // overwritten unless it counts: nothing to predict
        found += between[i];
      }
    }
  }
  return found;
}

}  // namespace sparsify
