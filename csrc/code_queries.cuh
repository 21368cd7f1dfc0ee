// SPDX-License-Identifier: Apache-2.0
// Query heads of a list as products with K codes take them. Definition:
// vllm_kcache/reference/codes.py.
//
// `Z`, a size that the kernel is compiled for: `kHeads` query heads in `kProducts` products of
// `kSteps` steps, in `kParts` of 128 values; `kJoint`: of several rows of the batch.
#pragma once

#include "code_runs.cuh"
#include "head.cuh"
#include "warp.cuh"

namespace kcache {

constexpr int kTileHeads = kWarps;  // query heads of every other column of a product
// Sums of products begin at an int whose bits are this float: then their bits are this float plus
// the sum, up to 2^22, and nothing converts them. A sum is at most 256 * 15 * 127.
constexpr int kFirstSum = 0x4b400000;
constexpr float kFirstFloat = 12582912.0f;

// A KV head's, of a row of the batch.
struct List {
  int row, head;

  // The first of its query heads, of those of the batch.
  __device__ int64_t first_head(const LayerView& view) const {
    return (static_cast<int64_t>(row) * view.num_kv_heads + head) * view.group;
  }
};

// What a lane needs of its query head to leave its scores.
struct alignas(16) QueryHead {
  float unit;  // base-2 logarithm of a weight in one step of q' times one code
  float bias;  // scale * (q . mean)
  int row;     // of scores, from the list's first query head
  int tokens;  // of the head's row of the batch; 0 without such a head
};

// The queries of a list, made once by a thread block.
template <typename Z>
struct PreparedQueries {
  unsigned columns[Z::kProducts * Z::kSteps * 32][2];  // operands as lanes take them
  QueryHead heads[Z::kHeads];
  float sum[Z::kHeads];  // of q', in steps
};

// q' of the query heads of a list, some with each warp; heads past the group are zeros.
template <typename Z>
class Queries {
 public:
  // All that is read of them, and before codes are on their way: who waits for the one would wait
  // for the other, too.
  __device__ Queries(const LayerView& view, const ScoreCodes& score, List list, int rows)
      : list_(list), rows_(rows), of_group_(Z::kJoint ? 65536 / view.group + 1 : 0) {
    const int first_head = list.head * view.group;
    float mean[Z::kParts][4], deviation[Z::kParts][4];
    load_floats(mean, view.mean + list.head * view.head_size, view.head_size);
    load_floats(deviation, view.deviation + list.head * view.head_size, view.head_size);
    const char* from[kOfWarp];
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) {
      const int head = head_of_warp(i), row = row_of(i);
      heads_[i] = head + row * (view.num_kv_heads - 1) * view.group;
      from[i] = head_of(score.query, view.head_size, list.row + row,
                        first_head + head - row * view.group);
      if (!is_there(view, i)) from[i] = nullptr;
    }
    load_heads(x_, from, score.query.dtype, view.head_size);
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) {
      for_each(x_[i], [&](int p, int value) {
        bias_[i] += x_[i][p][value] * mean[p][value];
        x_[i][p][value] *= deviation[p][value];
      });
    }
  }

  // `num_tokens`: of the last row, each of which has one more than the row before.
  __device__ void prepare(const LayerView& view, const ScoreCodes& score,
                          PreparedQueries<Z>& shared, int num_tokens, bool writes) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    float most[kOfWarp] = {};
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) bias_[i] = warp_sum(bias_[i]) * score.scale;
    rotate(x_, view.head_size, view.rotation);
    if (writes) {
#pragma unroll
      for (int i = 0; i < kOfWarp; ++i) {
        if (!is_there(view, i)) continue;
        const int64_t head = list_.first_head(view) + heads_[i];
        store_floats(x_[i], score.transformed + head * view.head_size, view.head_size);
        if (lane == 0) score.bias[head] = bias_[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) {
      for_each(x_[i], [&](int p, int value) { most[i] = fmaxf(most[i], fabsf(x_[i][p][value])); });
      // Not negative, so their bits are in the same order.
      most[i] = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(most[i])));
      most[i] = fmaxf(most[i], 1e-20f);
    }
    // One division for all: a lane's is of one head.
    float steps = most[0];
#pragma unroll
    for (int i = 1; i < kOfWarp; ++i) steps = lane == i ? most[i] : steps;
    steps = 127.0f / steps;
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) {
      const float of_head = kOfWarp == 1 ? steps : __shfl_sync(kAllLanes, steps, i);
      int sum = 0;
#pragma unroll
      for (int p = 0; p < Z::kParts; ++p) {
        unsigned whole[4];  // numbers, half to even, as sums of products begin
#pragma unroll
        for (int value = 0; value < 4; ++value) {
          whole[value] = __float_as_uint(__fmul_rn(x_[i][p][value], of_head) + kFirstFloat);
          sum += static_cast<int>(whole[value]) - kFirstSum;
        }
        const unsigned bytes = permute_bytes(permute_bytes(whole[0], whole[1], 0x0040),
                                             permute_bytes(whole[2], whole[3], 0x0040), 0x5410);
        // Four values that follow each other; eight are a word of codes, of its low and high
        // nibbles.
        const int four = lane + 32 * p, word = four / 2;
        if (word >= 4 * Z::kSteps) continue;
        const int product = i / 2 * Z::kSteps + word % Z::kSteps;
        const int column = 2 * warp + i % 2, quarter = word / Z::kSteps;
        shared.columns[product * 32 + column * 4 + quarter][four % 2] = bytes;
      }
      sum = __reduce_add_sync(kAllLanes, sum);
      if (lane == 0) {
        const int head = i * kWarps + warp;
        const float unit = score.scale * kLog2E * most[i] * (1.0f / 127.0f);
        const int tokens = is_there(view, i) ? num_tokens - rows_ + 1 + row_of(i) : 0;
        shared.heads[head] = {unit, bias_[i], heads_[i], tokens};
        shared.sum[head] = static_cast<float>(sum);
      }
    }
  }

 private:
  static constexpr int kOfWarp = Z::kHeads / kWarps;

  __device__ static int head_of_warp(int i) { return i * kWarps + threadIdx.x / 32; }
  __device__ bool is_there(const LayerView& view, int i) const {
    return head_of_warp(i) < rows_ * view.group;
  }
  // Which of the rows has a head.
  __device__ int row_of(int i) const { return head_of_warp(i) * of_group_ >> 16; }

  const List list_;
  const int rows_;
  const int of_group_;  // a product with it in place of a division by the group
  float x_[kOfWarp][Z::kParts][4], bias_[kOfWarp] = {};
  int heads_[kOfWarp];  // of the batch, from the list's first
};

}  // namespace kcache
