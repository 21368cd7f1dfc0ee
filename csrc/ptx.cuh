// SPDX-License-Identifier: Apache-2.0
// Instructions that CUDA C++ has no name for.
#pragma once

#include <cuda_runtime.h>

namespace kcache {

// For masses and for terms of their sums, where 1 is much: what is below 2^-126 may be 0, so that
// such masses are equal.
__device__ inline float fast_exp2(float value) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
  return power;
}

__device__ inline float fast_log2(float value) {
  float log;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log) : "f"(value));
  return log;
}

// Within 2^-23 of it.
__device__ inline float fast_reciprocal(float value) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(value));
  return reciprocal;
}

// The lesser; NaN where one is, which fminf would hide.
__device__ inline float min_or_nan(float x, float y) {
  float least;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(x), "f"(y));
  return least;
}

// What other thread blocks see of this thread's stores, and it of theirs: in the order of the
// atomics between. __threadfence() orders more, and takes longer.
__device__ inline void fence_gpu() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
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

// Words from where such a load may begin; left alone unless `wanted`. The compiler would put
// another load behind a branch that may end the thread.
__device__ inline void load_now(bool wanted, unsigned (&words)[4], const char* from) {
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.b32 wanted, %5, 0;\n\t"
      "@wanted ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
      : "l"(from), "r"(static_cast<int>(wanted)));
}
__device__ inline void load_now(bool wanted, unsigned (&words)[2], const char* from) {
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.b32 wanted, %3, 0;\n\t"
      "@wanted ld.volatile.global.v2.u32 {%0, %1}, [%2];\n\t}"
      : "+r"(words[0]), "+r"(words[1])
      : "l"(from), "r"(static_cast<int>(wanted)));
}

// The compiler would make it where it is used first.
__device__ inline void make_now(const char*& pointer) {
  asm volatile("" : "+l"(pointer));
}

// To the second-level cache.
__device__ inline void prefetch(const void* pointer) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(pointer));
}

// Of the lower and the upper 16 bits.
__device__ inline float2 halves_to_floats(unsigned bits) {
  float2 values;
  asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %2;\n\tcvt.f32.f16 %0, low;\n\t"
      "cvt.f32.f16 %1, high;\n\t}"
      : "=f"(values.x), "=f"(values.y)
      : "r"(bits));
  return values;
}

// To the nearest, half to even.
__device__ inline unsigned float_to_half(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ inline unsigned float_to_bfloat16(float value) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// Two floats as float16, to the nearest: the first in the lower bits.
__device__ inline unsigned floats_to_halves(float low, float high) {
  unsigned bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// One of each of two words' four bytes, by selectors 0 to 7 of four bits.
__device__ inline unsigned permute_bytes(unsigned low, unsigned high, unsigned selectors) {
  return __byte_perm(low, high, selectors);
}

// Difference of pairs of float16.
__device__ inline unsigned subtract_halves(unsigned x, unsigned y) {
  unsigned difference;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(x), "r"(y));
  return difference;
}

// Products of a warp, added to 16 x 8 sums: 16 rows of 32 int8, and eight columns. What a lane has
// of each: PTX ISA, "Matrix Fragments for mma.m16n8k32".
__device__ inline void multiply_add(int (&sums)[4], const unsigned (&rows)[4],
                                    const unsigned (&columns)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(columns[0]), "r"(columns[1]));
}

// The same of 16 rows of 16 float16: "Matrix Fragments for mma.m16n8k16".
__device__ inline void multiply_add(float (&sums)[4], const unsigned (&rows)[4],
                                    const unsigned (&columns)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(columns[0]), "r"(columns[1]));
}

// Words that are read once, from where such a load may begin; left alone unless `wanted`. Loads
// behind a branch would be waited for where it ends.
__device__ inline void load_if(bool wanted, unsigned (&words)[4], const char* from) {
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.b32 wanted, %5, 0;\n\t"
      "@wanted ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
      : "l"(from), "r"(static_cast<int>(wanted)));
}
__device__ inline void load_if(bool wanted, unsigned (&words)[2], const char* from) {
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.b32 wanted, %3, 0;\n\t"
      "@wanted ld.global.cs.v2.u32 {%0, %1}, [%2];\n\t}"
      : "+r"(words[0]), "+r"(words[1])
      : "l"(from), "r"(static_cast<int>(wanted)));
}
__device__ inline void load_if(bool wanted, unsigned (&words)[1], const char* from) {
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.b32 wanted, %2, 0;\n\t"
      "@wanted ld.global.cs.u32 %0, [%1];\n\t}"
      : "+r"(words[0])
      : "l"(from), "r"(static_cast<int>(wanted)));
}

// A store alone, and its place worked out before: the compiler would put both behind a branch, and
// nothing goes past that.
__device__ inline void store_if(bool wanted, float* to, float value) {
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.b32 wanted, %0, 0;\n\t"
      "@wanted st.global.f32 [%1], %2;\n\t}" ::"r"(static_cast<int>(wanted)),
      "l"(to), "f"(value)
      : "memory");
}

// From shared memory each time: not kept in registers for the next.
__device__ inline void load_shared(unsigned (&words)[2], const unsigned* from) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(from))));
}

// 16 bytes to shared memory that are read once; none unless `wanted`. They are there, for the
// thread that asked for them, when it has waited for the group that they were committed in.
__device__ inline void copy_async(bool wanted, char* to, const char* from) {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.b32 wanted, %0, 0;\n\t"
      "@wanted cp.async.cg.shared.global.L2::cache_hint [%1], [%2], 16, %3;\n\t}" ::"r"(
          static_cast<int>(wanted)),
      "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), "l"(from), "l"(policy)
      : "memory");
}
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// For all groups but the last so many.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 8 x 8 values of 16 bits, of which a lane has two of a row: after it, of a column. What a lane
// has: PTX ISA, "movmatrix".
__device__ inline unsigned transpose(unsigned two) {
  unsigned of_column;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(of_column) : "r"(two));
  return of_column;
}

}  // namespace kcache
