// SPDX-License-Identifier: Apache-2.0
// Scores of one list to the masses of its V blocks: the part of csrc/select.cuh that reads every
// score. Definition: vllm_kcache/reference/select.py.
#pragma once

#include "select.cuh"

namespace kcache {

// Scores of some blocks of `kTogether` query heads, in base 2, from `start` in strides, past the
// first-level cache, which knows nothing of a score kernel that still runs.
template <int kThreads, bool kCovers>
template <int kTogether, int kAhead>
__device__ void ListSelection<kThreads, kCovers>::load_ahead(float (&scores)[kTogether][kAhead],
                                                             int first_head, int start,
                                                             int stride) const {
#pragma unroll
  for (int h = 0; h < kTogether; ++h) {
    const float* lse = lse_ + static_cast<int64_t>(first_head + h) * args_.max_blocks;
#pragma unroll
    for (int i = 0, block = start; i < kAhead; ++i, block += stride) {
      const bool exists = first_head + h < args_.group && block < num_blocks_;
      scores[h][i] = exists ? __ldcg(lse + block) * kLog2E : -INFINITY;
    }
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
      load_ahead(scores, first, start, kThreads);
#pragma unroll
      for (int h = 0; h < kTogether; ++h) {
        float larger = largest[h];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) larger = fmaxf(larger, scores[h][i]);
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

// Masses of the blocks, combined over the group, and the totals that coverage is a share of.
template <int kThreads, bool kCovers>
template <int kTogether>
__device__ void ListSelection<kThreads, kCovers>::combine() {
  constexpr int kAhead = kInFlight / kTogether;
  const bool by_max = args_.combine_max;
  for (int first = 0; first < args_.group; first += kTogether) {
    unsigned totals[kTogether] = {};
    for (int start = threadIdx.x; start < num_blocks_; start += kThreads * kAhead) {
      float scores[kTogether][kAhead];
      load_ahead(scores, first, start, kThreads);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int block = start + i * kThreads;
        if (block >= num_blocks_) break;
        float combined = first == 0 ? 0.0f : masses_[block];
        if (by_max && !cover_) {
          // The largest mass is that of the largest score above its shift: one power, not one a
          // head.
          float largest = -INFINITY;
#pragma unroll
          for (int h = 0; h < kTogether; ++h) {
            if (first + h >= args_.group) break;
            largest = fmaxf(largest, scores[h][i] - shared_.shift[first + h]);
          }
          masses_[block] = fmaxf(combined, exp2f(largest));
          continue;
        }
#pragma unroll
        for (int h = 0; h < kTogether; ++h) {
          if (first + h >= args_.group) break;
          const float mass = exp2f(scores[h][i] - shared_.shift[first + h]);
          combined = by_max ? fmaxf(combined, mass) : combined + mass;
          if (cover_) totals[h] += fixed_point(mass);
        }
        masses_[block] = combined;
      }
    }
    if (!cover_ || !by_max) continue;
#pragma unroll
    for (int h = 0; h < kTogether; ++h) {
      const unsigned total = warp_sum(totals[h]);
      if (lane_ == 0 && first + h < args_.group) shared_.reduce_total[first + h][warp_] = total;
    }
  }
  if (!by_max) {
    unsigned total = 0;
    for (int block = threadIdx.x; block < num_blocks_; block += kThreads) {
      const float mass = masses_[block] / args_.group;
      masses_[block] = mass;
      if (cover_) total += fixed_point(mass);
    }
    if (cover_) {
      total = warp_sum(total);
      if (lane_ == 0) shared_.reduce_total[0][warp_] = total;
    }
  }
  if (threadIdx.x == 0) {
    shared_.threshold = 0;
    shared_.count_above = 0;
  }
  __syncthreads();
  if (!cover_) return;
  for (int g = warp_; g < num_sums_; g += kWarps) {
    const unsigned total = warp_sum(lane_ < kWarps ? shared_.reduce_total[g][lane_] : 0u);
    if (lane_ == 0) {
      shared_.totals[g] = total;
      shared_.above[g] = 0;
    }
  }
}

}  // namespace kcache
