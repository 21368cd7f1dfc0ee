// SPDX-License-Identifier: Apache-2.0
// What rows of tokens and their codes hold, made by the warp that has a head (csrc/head.cuh).
// Definitions: vllm_kcache/reference/{codes,write}.py.
#pragma once

#include "head.cuh"
#include "residency.cuh"

namespace kcache {

// Tokens of a row that a warp takes at once, where it has as many.
constexpr int kPieceTokens = 8;
constexpr float kLevels = 15.0f, kInt8Most = 127.0f;
// The least normal float16, and the largest: vllm_kcache/reference/codes.py.
constexpr float kLeastScale = 6.103515625e-5f, kMostHalf = 65504.0f;

__device__ inline unsigned half_scale(float scale) {
  return float_to_half(fminf(fmaxf(scale, kLeastScale), kMostHalf));
}

// x / y to the nearest, as the definition divides, with 1 / y at hand: that of many x is made once,
// and no quotient has a branch. Of what is finite and not tiny.
__device__ inline float divide(float x, float y, float inverse) {
  float quotient = x * inverse;
  quotient = fmaf(fmaf(-quotient, y, x), inverse, quotient);
  return fmaf(fmaf(-quotient, y, x), inverse, quotient);
}

// Where the parts of a row lie.
struct RowParts {
  int head_bytes, values, key_scales, value_scales;

  __device__ explicit RowParts(const LayerView& view)
      : head_bytes(view.head_size * (view.int8_rows ? 1 : view.value_bytes)),
        values(view.block_tokens * head_bytes),
        key_scales(2 * values),
        value_scales(2 * values + 2 * view.block_tokens) {}
};

__host__ __device__ inline int piece_tokens(const LayerView& view) {
  return view.block_tokens < kPieceTokens ? view.block_tokens : kPieceTokens;
}

// The runs of tokens that begin near a token: such as follow each other in a piece of a row.
struct Runs {
  int64_t place;  // of the token that the lane looks at
  // A bit of each of these tokens: it begins a run, or goes on with that of the one before.
  unsigned begins, going_on;

  // The lanes look at the tokens from `first` on, of which the first is only for the second.
  __device__ Runs(const LayerView& view, const WriteRows& write, int first) {
    const int token = first + static_cast<int>(threadIdx.x & 31);
    const bool exists = token >= 0 && token < static_cast<int>(write.num_tokens);
    place = exists ? write.slot_mapping[token] : -1;
    const bool in_piece = (place & (piece_tokens(view) - 1)) != 0;
    const bool goes_on = (place == __shfl_up_sync(kAllLanes, place, 1) + 1) & in_piece;
    going_on = __ballot_sync(kAllLanes, place >= 0 && goes_on);
    begins = __ballot_sync(kAllLanes, place >= 0 && !goes_on);
  }

  // Of the run that begins at the token of a lane, kPieceTokens at most.
  __device__ int tokens(int lane) const {
    return __ffs(static_cast<int>(~(going_on >> (lane + 1))));
  }
};

// k' of K in place.
template <int kParts>
struct Transform {
  float mean[kParts][4], deviation[kParts][4], inverse[kParts][4];

  __device__ void load(const LayerView& view, int head) {
    load_floats(mean, view.mean + head * view.head_size, view.head_size);
    load_floats(deviation, view.deviation + head * view.head_size, view.head_size);
  }

  __device__ void invert() {
    for_each(inverse, [&](int part, int i) { inverse[part][i] = 1.0f / deviation[part][i]; });
  }

  __device__ void apply(const LayerView& view, float (&x)[kParts][4]) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (first_value(part, view.head_size) < 0) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[part][i] = divide(x[part][i] - mean[part][i], deviation[part][i], inverse[part][i]);
    }
    rotate(x, view.head_size, view.rotation);
  }
};

// The least value of a head and its largest, in every lane.
struct Range {
  float least = INFINITY, most = -INFINITY;

  template <int kParts>
  __device__ Range(const float (&x)[kParts][4], int head_size) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (first_value(part, head_size) < 0) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        most = fmaxf(most, x[part][i]);
        least = fminf(least, x[part][i]);
      }
    }
    most = warp_max(most);
    least = -warp_max(-least);
  }

  __device__ float magnitude() const { return fmaxf(most, -least); }
};

// The largest magnitude of a head's values.
template <int kParts>
__device__ inline float magnitude_of(const float (&x)[kParts][4]) {
  float most = 0.0f;
  for_each(x, [&](int part, int i) { most = fmaxf(most, fabsf(x[part][i])); });
  return warp_max(most);
}

// A token's code: 4 bits a value, then scale and zero of all.
template <int kParts>
__device__ inline void write_code(const LayerView& view, const float (&x)[kParts][4],
                                  const Range& range, char* head, int offset) {
  const int lane = threadIdx.x & 31, words = (view.head_size + 31) / 32 * 4;
  const unsigned zero_bits = float_to_half(fminf(fmaxf(range.least, -kMostHalf), kMostHalf));
  const unsigned scale_bits = half_scale((range.most - range.least) / kLevels);
  const float zero = halves_to_floats(zero_bits).x, scale = halves_to_floats(scale_bits).x;
  const float inverse = 1.0f / scale;
  unsigned* codes = reinterpret_cast<unsigned*>(head) + offset * words;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    unsigned own = 0;
    if (first_value(part, view.head_size) >= 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float step = rintf(divide(x[part][i] - zero, scale, inverse));
        own |= static_cast<unsigned>(fminf(fmaxf(step, 0.0f), kLevels)) << (8 * i);
      }
    }
    // Low nibbles of a word are of the even lane, high ones of the odd.
    const unsigned other = __shfl_xor_sync(kAllLanes, own, 1);
    const int word = part * 16 + lane / 2;
    if (lane % 2 == 0 && word < words) codes[word] = own | other << 4;
  }
  if (lane == 0) {
    unsigned* scales = reinterpret_cast<unsigned*>(head) + view.page_tokens * words;
    scales[offset] = scale_bits | zero_bits << 16;
  }
}

// Where the codes of a head begin in a page.
__device__ inline char* codes_of(const LayerView& view, unsigned page, int head) {
  const int head_bytes = view.page_tokens * ((view.head_size + 31) / 32 * 16 + 4);
  return view.codes + page * view.code_page_bytes + static_cast<int64_t>(head) * head_bytes;
}

// A head of k' or V as int8, four values a word. Returns the scale, a float16.
template <int kParts>
__device__ inline uint16_t quantise_int8(unsigned (&words)[kParts], const float (&x)[kParts][4],
                                         float magnitude) {
  const unsigned bits = half_scale(magnitude / kInt8Most);
  const float scale = halves_to_floats(bits).x, inverse = 1.0f / scale;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    words[part] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value =
          fminf(fmaxf(rintf(divide(x[part][i], scale, inverse)), -kInt8Most), kInt8Most);
      words[part] |= (static_cast<unsigned>(static_cast<int>(value)) & 255u) << (8 * i);
    }
  }
  return static_cast<uint16_t>(bits);
}

// The slot of a row that a run is to be written to, found or taken; -1 without. In every lane. The
// run has `count` tokens from `token` on, the first at `in_row`.
__device__ inline int slot_of(const LayerView& view, const WriteRows& write,
                              const SlotSearch& search, int64_t owner, unsigned epoch,
                              int64_t token, int in_row, int count) {
  const bool evicts = token < write.allocate_tokens;
  // Where several runs have a part of a row, one may look for the slot before another takes it.
  const bool alone = count == view.block_tokens || count < kPieceTokens;
  const bool fills = write.fills && count == view.block_tokens;
  const bool allocates = in_row == 0 && ((evicts && alone) || fills);
  const bool first = (threadIdx.x & 31) == 0;
  const int found = search.slot();
  const int claimed = claim_slot(view, first && allocates && found < 0, owner, epoch, evicts);
  return __shfl_sync(kAllLanes, found >= 0 ? found : claimed, 0);
}

}  // namespace kcache
