// SPDX-License-Identifier: Apache-2.0
// Reductions over the lanes of a warp; every lane must call them.
#pragma once

namespace kcache {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ inline float warp_max(float value) {
  for (int i = 16; i; i >>= 1) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, i));
  return value;
}
template <typename T>
__device__ inline T warp_sum(T value) {
  for (int i = 16; i; i >>= 1) value += __shfl_xor_sync(kAllLanes, value, i);
  return value;
}
__device__ inline int warp_inclusive(int value, int lane) {
  for (int i = 1; i < 32; i <<= 1) {
    const int other = __shfl_up_sync(kAllLanes, value, i);
    if (lane >= i) value += other;
  }
  return value;
}

}  // namespace kcache
