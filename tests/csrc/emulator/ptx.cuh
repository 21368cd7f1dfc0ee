// SPDX-License-Identifier: Apache-2.0
// Takes the place of csrc/ptx.cuh.
#pragma once

#include "cuda_runtime.h"

namespace kcache {

inline float fast_exp2(float value) {
  return value < -126.0f ? 0.0f : exp2f(value);
}

inline int load_acquire(const int* pointer) {
  return __atomic_load_n(pointer, __ATOMIC_ACQUIRE);
}

inline long long now_ns() {
  return emulator::now_ns();
}

}  // namespace kcache
