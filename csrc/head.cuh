// SPDX-License-Identifier: Apache-2.0
// The values of one head in a warp: lane `l` has values 4 l to 4 l + 3 of each 128. Every lane of
// the warp must call these; past the head's size a lane has zeros.
#pragma once

#include "layer_view.h"
#include "ptx.cuh"
#include "warp.cuh"

namespace kcache {

constexpr int parts_of(int head_size) {
  return (head_size + 127) / 128;
}

// Where a lane's four values of a part begin; -1 past the head's size.
__device__ inline int first_value(int part, int head_size) {
  const int first = part * 128 + static_cast<int>(threadIdx.x & 31) * 4;
  return first < head_size ? first : -1;
}

template <int kParts, typename Visit>
__device__ inline void for_each(const float (&)[kParts][4], const Visit& visit) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int i = 0; i < 4; ++i) visit(part, i);
  }
}

template <int kParts>
__device__ inline void load_floats(float (&x)[kParts][4], const float* head, int head_size) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int first = first_value(part, head_size);
    float4 four{};
    if (first >= 0) four = *reinterpret_cast<const float4*>(head + first);
    x[part][0] = four.x;
    x[part][1] = four.y;
    x[part][2] = four.z;
    x[part][3] = four.w;
  }
}

template <int kParts>
__device__ inline void store_floats(const float (&x)[kParts][4], float* head, int head_size) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int first = first_value(part, head_size);
    if (first < 0) continue;
    *reinterpret_cast<float4*>(head + first) =
        float4{x[part][0], x[part][1], x[part][2], x[part][3]};
  }
}

// Where head `head` of row `row` begins.
__device__ inline char* head_of(const Heads& heads, int head_size, int64_t row, int head) {
  const int bytes = heads.dtype == Dtype::kFloat32 ? 4 : 2;
  return heads.data + row * heads.stride + static_cast<int64_t>(head) * head_size * bytes;
}

template <int kParts>
__device__ inline void load_head(float (&x)[kParts][4], const Heads& heads, int head_size,
                                 int64_t row, int head) {
  const char* from = head_of(heads, head_size, row, head);
  if (heads.dtype == Dtype::kFloat32) {
    return load_floats(x, reinterpret_cast<const float*>(from), head_size);
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int first = first_value(part, head_size);
    uint2 four{};
    if (first >= 0) four = *reinterpret_cast<const uint2*>(from + 2 * first);
    const bool is_half = heads.dtype == Dtype::kFloat16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned two = i == 0 ? four.x : four.y;
      const float2 halves = halves_to_floats(two);
      x[part][2 * i] = is_half ? halves.x : __uint_as_float(two << 16);
      x[part][2 * i + 1] = is_half ? halves.y : __uint_as_float(two & 0xffff0000u);
    }
  }
}

template <int kParts>
__device__ inline void store_head(const float (&x)[kParts][4], const Heads& heads, int head_size,
                                  int64_t row, int head) {
  char* to = head_of(heads, head_size, row, head);
  if (heads.dtype == Dtype::kFloat32) {
    return store_floats(x, reinterpret_cast<float*>(to), head_size);
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int first = first_value(part, head_size);
    if (first < 0) continue;
    unsigned bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bits[i] = heads.dtype == Dtype::kFloat16 ? float_to_half(x[part][i])
                                               : float_to_bfloat16(x[part][i]);
    }
    *reinterpret_cast<uint2*>(to + 2 * first) =
        make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
  }
}

// H x, as `rotate` of vllm_kcache/reference/codes.py, bit by bit: `factor` is not fused with what
// is done to the result.
template <int kParts>
__device__ inline void rotate(float (&x)[kParts][4], int head_size, float factor) {
  const int block = head_size & -head_size, lane = static_cast<int>(threadIdx.x & 31);
  const auto butterfly = [](float& low, float& high) {
    const float sum = low + high;
    high = low - high;
    low = sum;
  };
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    butterfly(x[part][0], x[part][1]);
    butterfly(x[part][2], x[part][3]);
    butterfly(x[part][0], x[part][2]);
    butterfly(x[part][1], x[part][3]);
  }
  for (int lanes = 1; lanes < min(block / 4, 32); lanes *= 2) {
    for_each(x, [&](int part, int i) {
      const float other = __shfl_xor_sync(kAllLanes, x[part][i], lanes);
      x[part][i] = lane & lanes ? other - x[part][i] : x[part][i] + other;
    });
  }
  if constexpr (kParts == 2) {
    if (block == 256) {
#pragma unroll
      for (int i = 0; i < 4; ++i) butterfly(x[0][i], x[1][i]);
    }
  }
  for_each(x, [&](int part, int i) { x[part][i] = __fmul_rn(x[part][i], factor); });
}

// cap * tanh(score / cap) of a base-2 score: vllm_kcache/reference/soft_cap.py. Within 2^-20 of the
// cap (2^-11 with tanh.approx, which is 0.02 of a cap of 50).
__device__ inline float cap_score(const SoftCap& cap, float score) {
  // 1 - 2 / (exp(2 x) + 1) is tanh(x), at both ends of the range, too.
  const float share = fast_reciprocal(fast_exp2(score * cap.slope) + 1.0f);
  return fmaf(-2.0f * cap.most, share, cap.most);
}

// Words that are read once, in the widest loads that their number allows; they begin where those
// may.
template <int kWords>
__device__ inline void load_words(unsigned* words, const char* from) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 four = __ldcs(reinterpret_cast<const uint4*>(from) + i);
      words[4 * i] = four.x;
      words[4 * i + 1] = four.y;
      words[4 * i + 2] = four.z;
      words[4 * i + 3] = four.w;
    }
  } else if constexpr (kWords % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i) {
      const uint2 two = __ldcs(reinterpret_cast<const uint2*>(from) + i);
      words[2 * i] = two.x;
      words[2 * i + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[i] = __ldcs(reinterpret_cast<const unsigned*>(from) + i);
    }
  }
}

}  // namespace kcache
