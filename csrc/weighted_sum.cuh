// SPDX-License-Identifier: Apache-2.0
// V of int8 rows on its way through a list, weighted, in a warp; and the sums that a thread block
// leaves: csrc/attend.cu.
//
// Weights of V are float16. Times V's scale they could leave its range at either end, so a warp
// keeps a power of two for each query head, by the largest that it has met: the estimate of one may
// be far below its scores, and its weights far above those of the others.
#pragma once

#include "tile.cuh"

namespace kcache {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRangeBits = 11;        // the largest weight of V begins at 2^11,
constexpr float kRange = 60000.0f;    // and may grow to this
constexpr float kUnit = 128.0f;       // weights are in parts of the estimated total
constexpr float kUnitBits = 7.0f;     // base-2 logarithm of it
constexpr float kMostWeight = 1e30f;  // an estimate may be far below a score

// A kernel is compiled for `kSteps`, products that a head of K takes, for the clipped tail, and for
// scores with a soft cap, and for rows that each have a list, or several one (`kJoint`).
template <int kSteps_, bool kClip_, bool kCapped_, bool kJoint_>
struct Size {
  static constexpr int kSteps = kSteps_;
  static constexpr bool kClip = kClip_, kCapped = kCapped_, kJoint = kJoint_;
  static constexpr int kSides = kClip ? 2 : 1;
  static constexpr int kChannels = 32 * kSteps;  // of a head, with those that pad it
  static constexpr int kFours = kChannels / 4;
  static constexpr int kStride = kChannels + 4;              // of sums in shared memory
  static constexpr int kBuffers = kSteps == 8 ? 4 : kWarps;  // of warps' sums: 48 KiB hold no more
  static constexpr int kLeastBlocks = kSteps == 8 ? 1 : 2;
};

// What a thread block leaves: sums of each warp, or of each two.
template <typename Z>
struct alignas(16) Shared {
  float sums[Z::kBuffers][Z::kSides * kTileHeads][Z::kStride];
  float weights[Z::kBuffers][Z::kSides * kTileHeads];
  float largest[kWarps][kTileHeads];
  QueryShared<Z::kSteps> query;
  unsigned epoch;
  bool last;
};

// Tiles of so many query heads, a power of two: warps are dealt to them.
__device__ inline int head_tiles(int heads) {
  return heads <= kTileHeads ? 1 : heads <= 2 * kTileHeads ? 2 : 4;
}
static_assert(kMaxGroup == 4 * kTileHeads && kWarps % 4 == 0);

// Over the lanes that have the same query head.
__device__ inline float max_of_head(float value) {
  for (int bit = 4; bit < 32; bit *= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, bit));
  }
  return value;
}

// The weights of a query head on their way through a list, and V weighted with them.
template <typename Z>
class WeightedSum {
 public:
  // shift, limit: of the clipped tail, base 2 and in `kUnit`.
  __device__ WeightedSum(float shift, float limit)
      : largest_(Z::kClip ? shift : -1e30f), limit_(limit) {}

  __device__ void add(const float (&scores)[2], const Scales& scales,
                      const Values<Z::kSteps>& values) {
    float rescale = 1.0f;
    if constexpr (!Z::kClip) {
      const float larger = fmaxf(max_of_head(fmaxf(scores[0], scores[1])), largest_);
      rescale = fast_exp2(largest_ - larger);
      largest_ = larger;
      weight_[0] *= rescale;
    }
    float weights[2], clipped[2] = {}, most = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float weight = fast_exp2(scores[i] - largest_);
      if constexpr (Z::kClip) weight = min_or_nan(weight, kMostWeight);
      weight_[0] += weight;
      weights[i] = weight * scales.value[i];
      most = fmaxf(most, weights[i]);
      if constexpr (Z::kClip) {
        const float least = fminf(weight, limit_);
        weight_[1] += least;
        clipped[i] = least * scales.value[i];
      }
    }
    // All lanes change scales_ together, those of heads in range by 1.
    if (__ballot_sync(kAllLanes, most * down_ > kRange) != 0) rescale *= fit(most);
    if (__ballot_sync(kAllLanes, rescale != 1.0f) != 0) scale_sums(rescale);
    unsigned columns[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      columns[i] = transpose(floats_to_halves(weights[i] * down_, clipped[i] * down_));
    }
#pragma unroll
    for (int word = 0; word < Z::kSteps; ++word) {
      unsigned one[4], other[4];
      widen(one, values.word(0, word), values.word(1, word));
      widen(other, values.word(2, word), values.word(3, word));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const unsigned rows[4] = {one[2 * i], one[2 * i + 1], other[2 * i], other[2 * i + 1]};
        multiply_add(sums_[2 * word + i], rows, columns);
      }
    }
  }

  // The sums of the warp's buffer; after it a barrier.
  __device__ void leave(Shared<Z>& shared, int warp, int tiles) {
    const int lane = threadIdx.x & 31, group = lane / 4, quarter = lane % 4;
    float factor = power_of_two(-exponent_);
    for (int bit = 4; bit < 32; bit *= 2) {
#pragma unroll
      for (int side = 0; side < Z::kSides; ++side) {
        weight_[side] += __shfl_xor_sync(kAllLanes, weight_[side], bit);
      }
    }
    if constexpr (!Z::kClip) {
      if (group == 0) shared.largest[warp][quarter] = largest_;
      __syncthreads();
      float larger = largest_;
      for (int other = warp % tiles; other < kWarps; other += tiles) {
        larger = fmaxf(larger, shared.largest[other][quarter]);
      }
      const float share = fast_exp2(largest_ - larger);
      weight_[0] *= share;
      factor *= share;
      __syncthreads();
      if (group == 0) shared.largest[warp][quarter] = larger;
    }
#pragma unroll 1
    for (int turn = 0; turn < kWarps / Z::kBuffers; ++turn) {
      if (turn != 0) __syncthreads();
      if (warp / Z::kBuffers == turn) {
        const int buffer = warp % Z::kBuffers;
#pragma unroll
        for (int side = 0; side < Z::kSides; ++side) {
          const int row = side * kTileHeads + quarter;
          if (group == 0) {
            float& weight = shared.weights[buffer][row];
            weight = weight_[side] + (turn == 0 ? 0.0f : weight);
          }
          auto* to = reinterpret_cast<float4*>(shared.sums[buffer][row]) + group * Z::kSteps;
#pragma unroll
          for (int word = 0; word < Z::kSteps; ++word) {
            float4 sum{};
            if (turn != 0) sum = to[word];
            sum.x = fmaf(sums_[2 * word][side], factor, sum.x);
            sum.y = fmaf(sums_[2 * word][2 + side], factor, sum.y);
            sum.z = fmaf(sums_[2 * word + 1][side], factor, sum.z);
            sum.w = fmaf(sums_[2 * word + 1][2 + side], factor, sum.w);
            to[word] = sum;
          }
        }
      }
    }
  }

 private:
  // Takes the largest weight of a query head that left the range to the upper end of float16.
  // Returns what sums are to be scaled with.
  __device__ float fit(float most) {
    most = max_of_head(most);
    if (most * down_ <= kRange) return 1.0f;
    const int its = max(static_cast<int>(__float_as_uint(most) >> 23) - 127, -100);
    const int before = exponent_;
    exponent_ = kRangeBits - its;
    down_ = power_of_two(exponent_);
    // Sums so small that they are lost have weights that are nothing beside this one.
    return power_of_two(max(exponent_ - before, -126));
  }
  __device__ static float power_of_two(int exponent) {
    return __uint_as_float(static_cast<unsigned>(127 + exponent) << 23);
  }
  __device__ void scale_sums(float factor) {
#pragma unroll
    for (auto& channels : sums_) {
#pragma unroll
      for (float& sum : channels) sum *= factor;
    }
  }

  float largest_;  // score; with the clipped tail what all are measured by
  const float limit_;
  float weight_[Z::kSides] = {};
  int exponent_ = 100;     // so large that the first tile with some V makes it fit
  float down_ = 0x1p100f;  // 2^exponent_
  // Of two channels each: whole and clipped of the lane's query head.
  float sums_[2 * Z::kSteps][4] = {};
};

}  // namespace kcache
