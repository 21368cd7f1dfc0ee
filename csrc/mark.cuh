// SPDX-License-Identifier: Apache-2.0
// Which blocks of a segment have the mass that a rule names: the part of csrc/select.cuh that the
// rules which search for it do not need.
//
// A block has it where a query head's score is no less than what that mass is in this head, so of
// most blocks nothing but a comparison is made. Rows that have one list are looked at side by side.
#pragma once

#include "select.cuh"

namespace kcache {

__device__ inline unsigned bits_below(int count) {
  return count >= 32 ? 0xffffffffu : (1u << max(count, 0)) - 1;
}

// Sink and recent blocks are kept, and none past the end. `first`: of the first word.
template <typename R>
__device__ void ListSelection<R>::force(unsigned (&kept)[kAhead], int first, int2 ends) const {
  if (first >= view_.sink_blocks && first + 32 * kBlocks <= min(ends.x, ends.y)) return;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int block = first + (i * kWide + lane_ / (32 / kWide)) * 32;
    kept[i] |= bits_below(view_.sink_blocks - block) | ~bits_below(ends.y - block);
    kept[i] &= bits_below(ends.x - block);
  }
}

// A lane's kWide bits, to their place in a word, of blocks whose score reaches its limit in one of
// some query heads, of which there are `heads`. `wanted`: a bit of each word of which any may.
template <typename R>
template <bool kVectors>
__device__ void ListSelection<R>::find_heavy(unsigned (&kept)[kAhead], const float* scores,
                                             float4 limits, int heads, int first, int num_blocks,
                                             unsigned wanted) const {
  // Bits past the end are anything.
  const int last = max(num_blocks - 1, 0);
  float its[kAhead][kTogether][kWide];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int block = min(first + i * 32 * kWide, last / kWide * kWide);
    const float* from = scores + block;
#pragma unroll
    for (int h = 0; h < kTogether; ++h) {
      if constexpr (kVectors) {
        // A limit is below this only where everything is wanted.
        float4 four{-INFINITY, -INFINITY, -INFINITY, -INFINITY};
        if (!R::kJoint || (wanted >> i & 1)) four = __ldcg(reinterpret_cast<const float4*>(from));
        its[i][h][0] = four.x;
        its[i][h][1] = four.y;
        its[i][h][2] = four.z;
        its[i][h][3] = four.w;
      } else {
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
          its[i][h][j] = block + j <= last ? __ldcg(from + j) : 0.0f;
        }
      }
      if (h + 1 < heads) from += step_.max_blocks;
    }
  }
  const float least[4] = {limits.x, limits.y, limits.z, limits.w};
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    kept[i] = 0;
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      bool heavy = false;
#pragma unroll
      for (int h = 0; h < kTogether; ++h) heavy |= its[i][h][j] >= least[h];
      kept[i] |= heavy ? 1u << j : 0;
    }
  }
  gather_bits(kept);
}

// Of the lane's blocks from a word on, a bit of each kWide that lie in a chunk that is wanted.
template <typename R>
__device__ unsigned ListSelection<R>::wanted_words(int row, int start) const {
  if (!passes_over()) return ~0u;
  const int shift = __popc(step_.chunk_blocks - 1);
  unsigned wanted = 0;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int chunk = min(start * 32 + (i * 32 + lane_) * kWide, kSegment - 1) >> shift;
    wanted |= (shared_.chunks[row][chunk / 32] >> chunk % 32 & 1) << i;
  }
  return wanted;
}

// A row has some warps.
template <typename R>
template <bool kVectors>
__device__ void ListSelection<R>::mark_heavy(int first_block) {
  const int warps = R::kJoint ? num_warps() / rows_ : num_warps();
  const int row = R::kJoint ? warp_ / warps : 0;
  if (R::kJoint && row >= rows_) return;
  const Share own = share(first_block, warp_ - row * warps, warps);
  const int2 ends = ends_of(row);
#pragma unroll 1
  for (int head = 0; head < view_.group; head += kTogether) {
    const float* scores = scores_of(row, head);
    const float4 limits = shared_.limits[row][head / 4];
#pragma unroll 1
    for (int start = own.begin; start < own.end; start += kBlocks) {
      const int first = first_block + start * 32;
      unsigned kept[kAhead], wanted = ~0u;
      if constexpr (R::kJoint && kVectors) wanted = wanted_words(row, start);
      find_heavy<kVectors>(kept, scores, limits, view_.group - head, first + lane_ * kWide, ends.x,
                           wanted);
      if (head > 0) add_words(kept, row, start, own.end);
      force(kept, first, ends);
      set_words(kept, row, start, own.end);
    }
  }
}

}  // namespace kcache
