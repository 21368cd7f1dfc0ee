// SPDX-License-Identifier: Apache-2.0
// 16 tokens of a list of int8 rows in a warp, from memory to scores.
//
// Of K a lane has a run of channels of two tokens, of V the same channels of two pairs of tokens:
// any channel may be any column of a product, so nothing crosses lanes between a row in memory and
// the tensor cores. q' are two int8 numbers, high and low, in the upper and the lower eight rows of
// a product.
#pragma once

#include "head.cuh"
#include "layer_view.h"
#include "ptx.cuh"
#include "warp.cuh"

namespace kcache {

constexpr int kTileTokens = 16;  // of a warp, at once

// The query heads of a lane's group of four, as a product takes them.
template <int kSteps>
struct Query {
  unsigned rows[kSteps][4];
  float unit, bias;  // base-2 logarithms, of a weight in one step, and of what every weight has

  __device__ Query(const LayerView& view, const AttendRows& attend, int64_t list, int head) {
    const int first = (threadIdx.x & 3) * 8 * kSteps;
    const bool there = head < view.group;
    const float* from = attend.query + (list * view.group + head) * view.head_size;
    float x[8 * kSteps];
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      float4 four{};
      if (there && first + 4 * i < view.head_size) {
        four = *reinterpret_cast<const float4*>(from + first + 4 * i);
      }
      x[4 * i] = four.x;
      x[4 * i + 1] = four.y;
      x[4 * i + 2] = four.z;
      x[4 * i + 3] = four.w;
    }
    float most = 1e-20f;
#pragma unroll
    for (int i = 0; i < 8 * kSteps; ++i) most = fmaxf(most, fabsf(x[i]));
    for (int bit = 1; bit < 4; bit *= 2) {
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, bit));
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Digits digits(x + 8 * step + 4 * half, 127.0f / most);
        rows[step][2 * half] = digits.high;
        rows[step][2 * half + 1] = digits.low;
      }
    }
    unit = unit_of(attend.scale, most);
    bias = there ? attend.bias[list * view.group + head] * kLog2E : 0.0f;
  }
};

// Of a power of two.
__device__ inline int shift_of(int tokens) {
  return __popc(tokens - 1);
}

// A list of rows, by tiles.
class ListRows {
 public:
  __device__ ListRows(const LayerView& view, const Step& step, int64_t list, int count,
                      int num_tokens)
      : view_(view),
        blocks_(step.blocks + list * step.columns),
        rows_(step.rows + list * step.columns),
        count_(count),
        num_tokens_(num_tokens),
        shift_(shift_of(view.block_tokens)) {}

  __device__ int tiles() const { return ((count_ << shift_) + kTileTokens - 1) / kTileTokens; }

  // Which row has one of the lane's tokens of a tile, and which token of the request it is. Past
  // the end of the list: the last row, and no token.
  struct Place {
    int row, token;
  };
  __device__ Place place(int tile) const {
    const int token = tile * kTileTokens + of_lane(), column = token >> shift_;
    const int there = min(column, count_ - 1);
    const int in_request = (blocks_[there] << shift_) + in_row(token);
    return {rows_[there], column < count_ ? in_request : num_tokens_};
  }
  __device__ bool exists(Place place) const { return place.token < num_tokens_; }

  // The lane's token: where its K begins, and both its scales.
  struct Token {
    const char* key;
    unsigned scales;
    bool exists;
  };
  __device__ Token find(int tile, Place place) const {
    const int in = in_row(tile * kTileTokens + of_lane());
    const char* row =
        place.row >= 0 ? view_.slots + static_cast<int64_t>(place.row) * view_.row_bytes
                       : view_.host_rows + static_cast<int64_t>(-2 - place.row) * view_.row_bytes;
    const char* scales = row + (view_.head_size << (shift_ + 1)) + 2 * in;
    const unsigned of_key = *reinterpret_cast<const unsigned short*>(scales);
    const unsigned of_value = *reinterpret_cast<const unsigned short*>(scales + (2 << shift_));
    return {row + in * view_.head_size, of_key | of_value << 16, exists(place)};
  }

  __device__ int value_distance() const { return view_.head_size << shift_; }

 private:
  __device__ static int of_lane() { return threadIdx.x & (kTileTokens - 1); }
  __device__ int in_row(int token) const { return token & (view_.block_tokens - 1); }

  const LayerView& view_;
  const int *blocks_, *rows_;
  const int count_, num_tokens_, shift_;
};

// Of an address, that of another lane.
__device__ inline const char* of_lane(const char* address, int lane) {
  return reinterpret_cast<const char*>(
      __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(address), lane));
}

// K of a tile: of two tokens a quarter each.
template <int kSteps>
struct Keys {
  unsigned words[2][2 * kSteps];

  __device__ void load(const ListRows::Token& token) {
    const int lane = threadIdx.x & 31, group = lane / 4, quarter = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_words<2 * kSteps>(words[i], of_lane(token.key, 8 * i + group) + quarter * 8 * kSteps);
    }
  }
};

// Which token of a tile is number i of a lane's: two pairs.
__device__ inline int token_of_lane(int i) {
  return 2 * static_cast<int>(threadIdx.x & 3) + (i & 1) + 4 * (i & 2);
}

// V of a tile: of four tokens an eighth each.
template <int kSteps>
struct Values {
  unsigned words[4][kSteps];

  __device__ void load(const ListRows::Token& token, int distance) {
    const int group = (threadIdx.x & 31) / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const char* from = of_lane(token.key, token_of_lane(i)) + distance;
      load_words<kSteps>(words[i], from + group * 4 * kSteps);
    }
  }
};

// What scores need of a tile beside K, for the lane's four tokens.
struct Scales {
  float key[4], value[4];
  bool exists[4];

  __device__ void take(const ListRows::Token& token) {
    const unsigned there = __ballot_sync(kAllLanes, token.exists);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 both = halves_to_floats(__shfl_sync(kAllLanes, token.scales, token_of_lane(i)));
      exists[i] = there >> token_of_lane(i) & 1;
      // Past the length a row may hold anything, NaN too.
      key[i] = exists[i] ? both.x : 0.0f;
      value[i] = exists[i] ? both.y : 0.0f;
    }
  }
};

// Base-2 scores of the lane's four tokens with its query head; -infinity where there is no token.
template <int kSteps>
__device__ inline void multiply(float (&scores)[4], const Query<kSteps>& query,
                                const Keys<kSteps>& keys, const Scales& scales) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int products[4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const unsigned columns[2] = {keys.words[half][2 * step], keys.words[half][2 * step + 1]};
      multiply_add(products, query.rows[step], columns);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 2 * half + i;
      const float product = static_cast<float>(products[i] * kLowSteps + products[2 + i]);
      const float score = fmaf(product * query.unit, scales.key[token], query.bias);
      scores[token] = scales.exists[token] ? score : -INFINITY;
    }
  }
}

// Words of two tokens, four channels each, as four columns of a product: pairs of float16.
__device__ inline void widen(unsigned (&pairs)[4], unsigned one, unsigned other) {
  // 0x6400 | (x + 128) is 1152 + x.
  constexpr unsigned kSigns = 0x80808080u, kExponents = 0x64646464u, kOffset = 0x64806480u;
  const unsigned first = permute_bytes(one, other, 0x5140) ^ kSigns;
  const unsigned second = permute_bytes(one, other, 0x7362) ^ kSigns;
  pairs[0] = subtract_halves(permute_bytes(first, kExponents, 0x4140), kOffset);
  pairs[1] = subtract_halves(permute_bytes(first, kExponents, 0x4342), kOffset);
  pairs[2] = subtract_halves(permute_bytes(second, kExponents, 0x4140), kOffset);
  pairs[3] = subtract_halves(permute_bytes(second, kExponents, 0x4342), kOffset);
}

}  // namespace kcache
