// SPDX-License-Identifier: Apache-2.0
// V of int8 rows on its way through a list, weighted, in a warp; and the sums that a thread block
// leaves: csrc/attend.cu.
//
// Weights of V are float16. Times V's scale they could leave its range at either end, so a warp
// keeps a power of two for each query head, by the largest that it has met: the estimate of one may
// be far below its scores, and its weights far above those of the others.
#pragma once

#include "shares.cuh"

namespace kcache {

constexpr int kMostWarps = 8;
constexpr int kRangeBits = 11;        // the largest weight of V begins at 2^11,
constexpr float kRange = 60000.0f;    // and may grow to this
constexpr float kMostWeight = 1e30f;  // an estimate may be far below a score

// A kernel is compiled for `kSteps`, products that a head of K takes, for the clipped tail, and for
// scores with a soft cap, for rows that each have a list, or several one (`kJoint`), and for the
// tiles of query heads that a warp takes (`kTiles`): each row of K and V is loaded, and V made
// float16, once for all of them.
template <int kSteps_, bool kClip_, bool kCapped_, bool kJoint_, int kTiles_>
struct Size {
  static constexpr int kSteps = kSteps_, kTiles = kTiles_;
  static constexpr bool kClip = kClip_, kCapped = kCapped_, kJoint = kJoint_;
  static constexpr int kSides = kClip ? 2 : 1;
  static constexpr int kHeads = kTiles * kTileHeads;
  static constexpr int kChannels = 32 * kSteps;  // of a head, with those that pad it
  static constexpr int kFours = kChannels / 4;
  static constexpr int kStride = kChannels + 4;  // of sums in shared memory
  // Of warps' sums: 48 KiB hold no more.
  static constexpr int kBuffers = kTiles * kSteps <= 4 ? 8 : kTiles * kSteps <= 8 ? 4 : 2;
  // Sums of several tiles take all registers that a thread may have.
  static constexpr bool kLarge = kSteps == 8 || kTiles > 1;
  static constexpr int kLeastBlocks = kLarge ? 1 : 2;

  // Where several tiles of query heads are a warp's, a thread block may have half of the warps, so
  // that one of two on a multiprocessor works while the other waits.
  __device__ static int warps() {
    return kTiles > 1 ? static_cast<int>(blockDim.x) / 32 : kMostWarps;
  }
};

// What a thread block leaves: sums of each warp, or of some.
template <typename Z>
struct alignas(16) Shared {
  float sums[Z::kBuffers][Z::kSides * Z::kHeads][Z::kStride];
  float weights[Z::kBuffers][Z::kSides * Z::kHeads];
  float largest[kMostWarps][Z::kHeads];
  QueryShared<Z::kSteps> query;
  SharesShared shares;
  unsigned epoch;
  bool last;
};

// Tiles of so many query heads, a power of two.
__host__ __device__ inline int head_tiles(int heads) {
  return heads <= kTileHeads ? 1 : heads <= 2 * kTileHeads ? 2 : 4;
}
static_assert(kMaxGroup == 4 * kTileHeads && kMostWarps % 4 == 0);

// To how many sets of query heads the warps of a thread block are dealt.
template <typename Z>
__device__ inline int sets_of_heads(int heads) {
  return max(head_tiles(heads) / Z::kTiles, 1);
}

// Which row of a buffer has the sums of a warp's query head.
template <typename Z>
__device__ inline int row_of_sums(int tile, int side, int in_tile) {
  return (tile * Z::kSides + side) * kTileHeads + in_tile;
}

// Over the lanes that have the same query head.
__device__ inline float max_of_head(float value) {
  for (int bit = 4; bit < 32; bit *= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, bit));
  }
  return value;
}

// The weights of some tiles of query heads on their way through a list, and V weighted with them.
template <typename Z>
class WeightedSum {
  static constexpr int kTiles = Z::kTiles;

 public:
  __device__ WeightedSum() {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      largest_[tile] = -1e30f;
      down_[tile] = 0x1p100f;
    }
  }

  __device__ void add(const Query<Z::kSteps, Z::kJoint, kTiles>& query,
                      const float (&scores)[kTiles][2], const Scales& scales,
                      const Values<Z::kSteps>& values) {
    float rescale[kTiles], most[kTiles], weights[kTiles][2], clipped[kTiles][2] = {};
    bool in_range = true, as_before = true;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float limit = 0.0f;
      rescale[tile] = 1.0f;
      if constexpr (Z::kClip) {
        const HeadTerms terms = query.terms(tile);
        largest_[tile] = terms.shift;
        limit = terms.limit;
      } else {
        const float* its = scores[tile];
        const float larger = fmaxf(max_of_head(fmaxf(its[0], its[1])), largest_[tile]);
        rescale[tile] = fast_exp2(largest_[tile] - larger);
        largest_[tile] = larger;
        weight_[tile][0] *= rescale[tile];
      }
      most[tile] = 0.0f;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float weight = fast_exp2(scores[tile][i] - largest_[tile]);
        if constexpr (Z::kClip) weight = min_or_nan(weight, kMostWeight);
        weight_[tile][0] += weight;
        weights[tile][i] = weight * scales.value[i];
        most[tile] = fmaxf(most[tile], weights[tile][i]);
        if constexpr (Z::kClip) {
          const float least = fminf(weight, limit);
          weight_[tile][1] += least;
          clipped[tile][i] = least * scales.value[i];
        }
      }
      if (most[tile] * down_[tile] > kRange) in_range = false;
    }
    // All lanes change scales together, those of heads in range by 1.
    if (__ballot_sync(kAllLanes, !in_range) != 0) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) rescale[tile] *= fit(down_[tile], most[tile]);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) as_before &= rescale[tile] == 1.0f;
    if (__ballot_sync(kAllLanes, !as_before) != 0) scale_sums(rescale);
    unsigned columns[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        columns[tile][i] = transpose(
            floats_to_halves(weights[tile][i] * down_[tile], clipped[tile][i] * down_[tile]));
      }
    }
#pragma unroll
    for (int word = 0; word < Z::kSteps; ++word) {
      unsigned one[4], other[4];
      widen(one, values.word(0, word), values.word(1, word));
      widen(other, values.word(2, word), values.word(3, word));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const unsigned rows[4] = {one[2 * i], one[2 * i + 1], other[2 * i], other[2 * i + 1]};
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          multiply_add(sums_[tile][2 * word + i], rows, columns[tile]);
        }
      }
    }
  }

  // The sums of the warp's buffer; after it a barrier. `dealt`: to as many sets of query heads the
  // warps are.
  __device__ void leave(Shared<Z>& shared, int warp, int dealt) {
    const int lane = threadIdx.x & 31, group = lane / 4, quarter = lane % 4;
    float factor[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      factor[tile] = power_of_two(-exponent_of(down_[tile]));
#pragma unroll
      for (int side = 0; side < Z::kSides; ++side) {
        for (int bit = 4; bit < 32; bit *= 2) {
          weight_[tile][side] += __shfl_xor_sync(kAllLanes, weight_[tile][side], bit);
        }
      }
    }
    if constexpr (!Z::kClip) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (group == 0) shared.largest[warp][tile * kTileHeads + quarter] = largest_[tile];
      }
      __syncthreads();
      float larger[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        larger[tile] = largest_[tile];
        for (int other = warp % dealt; other < Z::warps(); other += dealt) {
          larger[tile] = fmaxf(larger[tile], shared.largest[other][tile * kTileHeads + quarter]);
        }
        const float share = fast_exp2(largest_[tile] - larger[tile]);
        weight_[tile][0] *= share;
        factor[tile] *= share;
      }
      __syncthreads();
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (group == 0) shared.largest[warp][tile * kTileHeads + quarter] = larger[tile];
      }
    }
#pragma unroll 1
    for (int turn = 0; turn * Z::kBuffers < Z::warps(); ++turn) {
      if (turn != 0) __syncthreads();
      if (warp / Z::kBuffers == turn) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          leave_tile(shared, warp % Z::kBuffers, turn != 0, tile, factor[tile]);
        }
      }
    }
  }

 private:
  __device__ void leave_tile(Shared<Z>& shared, int buffer, bool adds, int tile, float factor) {
    const int lane = threadIdx.x & 31, group = lane / 4, quarter = lane % 4;
#pragma unroll
    for (int side = 0; side < Z::kSides; ++side) {
      const int row = row_of_sums<Z>(tile, side, quarter);
      if (group == 0) {
        float& weight = shared.weights[buffer][row];
        weight = weight_[tile][side] + (adds ? weight : 0.0f);
      }
      auto* to = reinterpret_cast<float4*>(shared.sums[buffer][row]) + group * Z::kSteps;
#pragma unroll
      for (int word = 0; word < Z::kSteps; ++word) {
        const auto& its = sums_[tile];
        float4 sum{};
        if (adds) sum = to[word];
        sum.x = fmaf(its[2 * word][side], factor, sum.x);
        sum.y = fmaf(its[2 * word][2 + side], factor, sum.y);
        sum.z = fmaf(its[2 * word + 1][side], factor, sum.z);
        sum.w = fmaf(its[2 * word + 1][2 + side], factor, sum.w);
        to[word] = sum;
      }
    }
  }
  // Takes the largest weight of a query head that left the range to the upper end of float16.
  // Returns what sums are to be scaled with.
  __device__ static float fit(float& down, float most) {
    most = max_of_head(most);
    if (most * down <= kRange) return 1.0f;
    const int its = max(static_cast<int>(__float_as_uint(most) >> 23) - 127, -100);
    const int before = exponent_of(down), now = kRangeBits - its;
    down = power_of_two(now);
    // Sums so small that they are lost have weights that are nothing beside this one.
    return power_of_two(max(now - before, -126));
  }
  __device__ static float power_of_two(int exponent) {
    return __uint_as_float(static_cast<unsigned>(127 + exponent) << 23);
  }
  __device__ static int exponent_of(float power) {
    return static_cast<int>(__float_as_uint(power) >> 23) - 127;
  }
  __device__ void scale_sums(const float (&factors)[kTiles]) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (auto& channels : sums_[tile]) {
#pragma unroll
        for (float& sum : channels) sum *= factors[tile];
      }
    }
  }

  float largest_[kTiles];  // score; with the clipped tail what all are measured by
  float weight_[kTiles][Z::kSides] = {};
  // What weights of V are multiplied by, a power of two: so large that the first tile with some V
  // makes it fit.
  float down_[kTiles];
  // Of two channels each: whole and clipped of the lane's query heads.
  float sums_[kTiles][2 * Z::kSteps][4] = {};
};

}  // namespace kcache
