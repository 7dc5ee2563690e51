// Zeroing: values that a mask drops, bit by bit, so that NaN goes too; and whether there is anything to zero.
#pragma once

#include <algorithm>
#include <atomic>

#include "threads.h"

namespace sparsify {

template <typename T>
void zero(void *data, const uint8_t *mask, int64_t count, int32_t threads) {
  T *values = static_cast<T *>(data);
  in_team(count > kSerial ? threads : 1, [=](int64_t thread, int64_t team) {
    constexpr int64_t kBlock = 64;
    const int64_t end = count * (thread + 1) / team;
    for (int64_t begin = count * thread / team; begin < end; begin += kBlock) {
      const int64_t last = std::min(begin + kBlock, end);
      uint8_t all = 1;
      for (int64_t i = begin; i < last; ++i) all &= mask[i];
      if (all) continue;  // where nothing is dropped, nothing is read or written
      for (int64_t i = begin; i < last; ++i) values[i] = mask[i] ? values[i] : T(0);
    }
  });
}

// Whether a float that a mask drops is neither 0 nor NaN nor infinite.
inline bool has_stray(const uint32_t *values, const uint8_t *mask, int64_t count, int32_t threads) {
  std::atomic<bool> found{false};
  in_team(count > kSerial ? threads : 1, [&](int64_t thread, int64_t team) {
    constexpr int64_t kBlock = 1024;
    const int64_t end = count * (thread + 1) / team;
    for (int64_t begin = count * thread / team; begin < end && !found; begin += kBlock) {
      const int64_t last = std::min(begin + kBlock, end);
      uint8_t some = 0;
      for (int64_t i = begin; i < last; ++i) some |= !mask[i] & ((values[i] & 0x7fffffffu) - 1 < 0x7f7fffffu);
      if (some) found = true;
    }
  });
  return found;
}

}  // namespace sparsify
