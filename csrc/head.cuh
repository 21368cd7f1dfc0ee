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

// Several heads, which begin where `from` says, all on their way at once; zeros where it is null.
template <int kHeads, int kParts>
__device__ inline void load_heads(float (&x)[kHeads][kParts][4], const char* const (&from)[kHeads],
                                  Dtype dtype, int head_size) {
  if (dtype == Dtype::kFloat32) {
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      const bool is_there = from[head] != nullptr;
      load_floats(x[head], reinterpret_cast<const float*>(from[head]), is_there ? head_size : 0);
    }
    return;
  }
  uint2 four[kHeads][kParts];
#pragma unroll
  for (int head = 0; head < kHeads; ++head) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int first = first_value(part, from[head] != nullptr ? head_size : 0);
      four[head][part] = uint2{};
      if (first >= 0) four[head][part] = *reinterpret_cast<const uint2*>(from[head] + 2 * first);
    }
  }
  const bool is_half = dtype == Dtype::kFloat16;
#pragma unroll
  for (int head = 0; head < kHeads; ++head) {
    for_each(x[head], [&](int part, int i) {
      const unsigned two = i < 2 ? four[head][part].x : four[head][part].y;
      const float2 halves = halves_to_floats(two);
      const unsigned bits = i % 2 == 0 ? two << 16 : two & 0xffff0000u;
      x[head][part][i] = is_half ? (i % 2 == 0 ? halves.x : halves.y) : __uint_as_float(bits);
    });
  }
}

template <int kParts>
__device__ inline void load_head(float (&x)[kParts][4], const Heads& heads, int head_size,
                                 int64_t row, int head) {
  const char* const from[1] = {head_of(heads, head_size, row, head)};
  load_heads(reinterpret_cast<float (&)[1][kParts][4]>(x), from, heads.dtype, head_size);
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

// H x of several heads, as `rotate` of vllm_kcache/reference/codes.py, bit by bit: `factor` is not
// fused with what is done to the result.
template <int kHeads, int kParts>
__device__ inline void rotate(float (&x)[kHeads][kParts][4], int head_size, float factor) {
  const int block = head_size & -head_size, lane = static_cast<int>(threadIdx.x & 31);
  const auto butterfly = [](float& low, float& high) {
    const float sum = low + high;
    high = low - high;
    low = sum;
  };
  const auto for_all = [&](const auto& visit) {
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      for_each(x[head], [&](int part, int i) { visit(x[head][part][i]); });
    }
  };
#pragma unroll
  for (int head = 0; head < kHeads; ++head) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      butterfly(x[head][part][0], x[head][part][1]);
      butterfly(x[head][part][2], x[head][part][3]);
      butterfly(x[head][part][0], x[head][part][2]);
      butterfly(x[head][part][1], x[head][part][3]);
    }
  }
  for (int lanes = 1; lanes < min(block / 4, 32); lanes *= 2) {
    const float sign = lane & lanes ? -1.0f : 1.0f;
    for_all(
        [&](float& value) { value = fmaf(value, sign, __shfl_xor_sync(kAllLanes, value, lanes)); });
  }
  if constexpr (kParts == 2) {
    if (block == 256) {
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
#pragma unroll
        for (int i = 0; i < 4; ++i) butterfly(x[head][0][i], x[head][1][i]);
      }
    }
  }
  for_all([&](float& value) { value = __fmul_rn(value, factor); });
}

template <int kParts>
__device__ inline void rotate(float (&x)[kParts][4], int head_size, float factor) {
  rotate(reinterpret_cast<float (&)[1][kParts][4]>(x), head_size, factor);
}

// cap * tanh(score / cap) of a base-2 score: vllm_kcache/reference/soft_cap.py. Within 2^-20 of the
// cap (2^-11 with tanh.approx, which is 0.02 of a cap of 50).
__device__ inline float cap_score(const SoftCap& cap, float score) {
  // 1 - 2 / (exp(2 x) + 1) is tanh(x), at both ends of the range, too.
  const float share = fast_reciprocal(fast_exp2(score * cap.slope) + 1.0f);
  return fmaf(-2.0f * cap.most, share, cap.most);
}

}  // namespace kcache
