// Zeroing: values that a mask drops, bit by bit, so that NaN goes too.
#pragma once

#include <algorithm>

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

}  // namespace sparsify
