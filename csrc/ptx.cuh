// SPDX-License-Identifier: Apache-2.0
// Instructions that CUDA C++ has no name for.
#pragma once

namespace kcache {

// For masses and for terms of their sums, where 1 is much: what is below 2^-126 may be 0, so that
// such masses are equal.
__device__ inline float fast_exp2(float value) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
  return power;
}

__device__ inline int load_acquire(const int* pointer) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
  return value;
}

__device__ inline long long now_ns() {
  long long time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return time;
}

}  // namespace kcache
