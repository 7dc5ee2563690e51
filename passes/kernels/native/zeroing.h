// Zeroing: values that a mask drops, bit by bit, so that NaN goes too.
#pragma once

#include "threads.h"

namespace sparsify {

constexpr int64_t kSerial = 32768;  // elements up to which threads cost more than they save

template <typename T>
void zero(void *data, const uint8_t *mask, int64_t count, int32_t threads) {
  T *values = static_cast<T *>(data);
  in_team(count > kSerial ? threads : 1, [=](int64_t thread, int64_t team) {
    for (int64_t i = count * thread / team; i < count * (thread + 1) / team; ++i) values[i] = mask[i] ? values[i] : T(0);
  });
}

}  // namespace sparsify
