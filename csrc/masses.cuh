// SPDX-License-Identifier: Apache-2.0
// Scores of one list to the masses of its V blocks: the part of csrc/select.cuh that reads every
// score. Definition: vllm_kcache/reference/select.py.
#pragma once

#include "select.cuh"

namespace kcache {

// Scores of some blocks of `kTogether` query heads, from `start` in strides, past the first-level
// cache, which knows nothing of a score kernel that still runs. What does not exist is -infinity.
template <int kThreads, bool kCovers>
template <int kStride, int kTogether, int kAhead>
__device__ void ListSelection<kThreads, kCovers>::load_ahead(float (&scores)[kTogether][kAhead],
                                                             int first_head, int start) const {
  const float* lse = lse_ + first_head * args_.max_blocks + start;
#pragma unroll
  for (int h = 0; h < kTogether; ++h, lse += args_.max_blocks) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const bool exists = first_head + h < args_.group && start + i * kStride < num_blocks_;
      scores[h][i] = exists ? __ldcg(lse + i * kStride) : -INFINITY;
    }
  }
}

// Shifts of `kTogether` query heads; 0 for those that do not exist.
template <int kThreads, bool kCovers>
template <int kTogether>
__device__ void ListSelection<kThreads, kCovers>::load_shifts(float (&shifts)[kTogether],
                                                              int first_head) const {
#pragma unroll
  for (int h = 0; h < kTogether; ++h) {
    shifts[h] = first_head + h < args_.group ? shared_.shift[first_head + h] : 0.0f;
  }
}

// Each query head's log-sum-exp over the request.
template <int kThreads, bool kCovers>
template <int kTogether>
__device__ void ListSelection<kThreads, kCovers>::normalise() {
  constexpr int kAhead = kInFlight / kTogether;
  for (int first = 0; first < args_.group; first += kTogether) {
    float largest[kTogether], sum[kTogether];
#pragma unroll
    for (int h = 0; h < kTogether; ++h) {
      largest[h] = -INFINITY;
      sum[h] = 0.0f;
    }
    for (int start = threadIdx.x; start < num_blocks_; start += kThreads * kAhead) {
      float scores[kTogether][kAhead];
      load_ahead<kThreads>(scores, first, start);
#pragma unroll
      for (int h = 0; h < kTogether; ++h) {
        float larger = largest[h];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          scores[h][i] *= kLog2E;
          larger = fmaxf(larger, scores[h][i]);
        }
        if (larger > -INFINITY) {
          sum[h] *= fast_exp2(largest[h] - larger);
#pragma unroll
          for (int i = 0; i < kAhead; ++i) sum[h] += fast_exp2(scores[h][i] - larger);
          largest[h] = larger;
        }
      }
    }
#pragma unroll
    for (int h = 0; h < kTogether; ++h) {
      const float warp_largest = warp_max(largest[h]);
      const float in_warp =
          warp_largest > -INFINITY ? sum[h] * exp2f(largest[h] - warp_largest) : 0.0f;
      const float total = warp_sum(in_warp);
      if (lane_ == 0 && first + h < args_.group) {
        shared_.reduce_max[first + h][warp_] = warp_largest;
        shared_.reduce_sum[first + h][warp_] = total;
      }
    }
  }
  __syncthreads();
  for (int g = warp_; g < args_.group; g += kWarps) {
    const bool live = lane_ < kWarps;
    const float largest = live ? shared_.reduce_max[g][lane_] : -INFINITY;
    const float all_largest = warp_max(largest);
    float sum = live && largest > -INFINITY
                    ? shared_.reduce_sum[g][lane_] * exp2f(largest - all_largest)
                    : 0.0f;
    sum = warp_sum(sum);
    if (lane_ == 0) write_shift(g, all_largest, sum);
  }
  __syncthreads();
}

template <int kThreads, bool kCovers>
__device__ void ListSelection<kThreads, kCovers>::write_shift(int in_group, float largest,
                                                              float sum) {
  const float shift = largest + log2f(sum);
  shared_.shift[in_group] = shift;
  if (args_.lse != nullptr) args_.lse[list_ * args_.group + in_group] = shift * kLn2;
}

// The same from what scoring left behind: a warp a query head.
template <int kThreads, bool kCovers>
__device__ void ListSelection<kThreads, kCovers>::normalise_from_chunks() {
  constexpr int kAhead = 4;
  const int chunks = (num_blocks_ + args_.chunk_blocks - 1) / args_.chunk_blocks;
  for (int g = warp_; g < args_.group; g += kWarps) {
    const float* lse = args_.chunk_lse + (list_ * args_.group + g) * args_.max_chunks;
    float largest = -INFINITY, sum = 0.0f;
    for (int start = lane_; start < chunks; start += 32 * kAhead) {
      float chunk[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        chunk[i] = start + 32 * i < chunks ? __ldcg(lse + start + 32 * i) * kLog2E : -INFINITY;
      }
      float larger = largest;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) larger = fmaxf(larger, chunk[i]);
      sum *= fast_exp2(largest - larger);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) sum += fast_exp2(chunk[i] - larger);
      largest = larger;
    }
    const float all_largest = warp_max(largest);
    sum = warp_sum(largest > -INFINITY ? sum * exp2f(largest - all_largest) : 0.0f);
    if (lane_ == 0) write_shift(g, all_largest, sum);
  }
  __syncthreads();
}

// Masses of the blocks, combined over the group, and their histogram.
template <int kThreads, bool kCovers>
template <int kTogether>
__device__ void ListSelection<kThreads, kCovers>::combine() {
  if (args_.combine_max) {
    combine_max<kTogether>();
    if (cover_ && args_.group > kTogether) add_masses_of_heads();
  } else {
    combine_mean<kTogether>();
  }
  if (threadIdx.x == 0) {
    shared_.threshold = 0;
    shared_.rank_bin = rank_bins_;
    shared_.in_bin = 0;
    shared_.count_above = 0;
    shared_.num_candidates = 0;
  }
  __syncthreads();
}

// The largest mass is that of the largest score above its shift: one power a block, not one a head.
template <int kThreads, bool kCovers>
template <int kTogether>
__device__ void ListSelection<kThreads, kCovers>::combine_max() {
  constexpr int kAhead = kInFlight / kTogether;
  for (int first = 0; first < args_.group; first += kTogether) {
    const bool counts = counts_ranks_ && first + kTogether >= args_.group;
    float shifts[kTogether];
    load_shifts(shifts, first);
    for (int start = threadIdx.x; start < num_blocks_; start += kThreads * kAhead) {
      float scores[kTogether][kAhead];
      load_ahead<kThreads>(scores, first, start);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int block = start + i * kThreads;
        if (block >= num_blocks_) break;
        float largest = -INFINITY;
#pragma unroll
        for (int h = 0; h < kTogether; ++h) {
          largest = fmaxf(largest, above_shift(scores[h][i], shifts[h]));
        }
        float mass = fast_exp2(largest);
        if (first > 0) mass = fmaxf(mass, masses_[block]);
        masses_[block] = mass;
        if (!counts) continue;
        const int bin = rank_bin(mass, block);
        atomicAdd(histogram_ + bin, 1u);
        if (!cover_ || args_.group > kTogether) continue;
#pragma unroll
        for (int h = 0; h < kTogether; ++h) {
          if (h < args_.group) add_mass(h, bin, fast_exp2(above_shift(scores[h][i], shifts[h])));
        }
      }
    }
  }
}

template <int kThreads, bool kCovers>
template <int kTogether>
__device__ void ListSelection<kThreads, kCovers>::combine_mean() {
  constexpr int kAhead = kInFlight / kTogether;
  for (int first = 0; first < args_.group; first += kTogether) {
    const bool last = first + kTogether >= args_.group;
    float shifts[kTogether];
    load_shifts(shifts, first);
    for (int start = threadIdx.x; start < num_blocks_; start += kThreads * kAhead) {
      float scores[kTogether][kAhead];
      load_ahead<kThreads>(scores, first, start);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int block = start + i * kThreads;
        if (block >= num_blocks_) break;
        float mass = first > 0 ? masses_[block] : 0.0f;
#pragma unroll
        for (int h = 0; h < kTogether; ++h) {
          mass += fast_exp2(above_shift(scores[h][i], shifts[h]));
        }
        if (last) mass /= args_.group;
        masses_[block] = mass;
        if (!last || !counts_ranks_) continue;
        const int bin = rank_bin(mass, block);
        atomicAdd(histogram_ + bin, 1u);
        if (cover_) add_mass(0, bin, mass);
      }
    }
  }
}

}  // namespace kcache
