// SPDX-License-Identifier: Apache-2.0
// Take every block of enough mass in one pass over the scores: the part of csrc/select.cuh that the
// default rule needs. Definition: vllm_kcache/reference/select.py.
#pragma once

#include <type_traits>

#include "select.cuh"

namespace kcache {

// Whether a rule takes every block of a mass, whatever its rank, and all it needs for that is
// there.
inline bool takes_by_threshold(const SelectArgs& args) {
  return args.chunk_lse != nullptr && args.mass_threshold >= 0.0f && args.combine_max &&
         args.top_n < 0 && args.group <= kMostTogether;
}

// Shared memory of such a list: a bit of each block, then the blocks taken. Little, so that a list
// fits beside a full set of score programs; and near, as the look-up that follows reads it.
__host__ __device__ inline int block_words(int max_blocks) {
  return (max_blocks + 31) / 32;
}
inline size_t threshold_shared_bytes(int max_blocks) {
  return block_words(max_blocks) * 4 + max_blocks * sizeof(NearBlock);
}
static_assert(kMaxBlocks <= 1 << 16, "a NearBlock counts to there");

// Blocks that are forced or have the threshold's mass in any query head, all ties included. Each
// warp has a contiguous share of the blocks.
template <int kThreads>
template <int kTogether>
__device__ List<NearBlock> ListSelection<kThreads>::run_by_threshold() {
  if (num_tokens_ <= 0) {
    write_empty();
    return {nullptr, 0};
  }
  normalise_from_chunks();
  constexpr int kAhead = kInFlight / kTogether;
  unsigned* kept_words = reinterpret_cast<unsigned*>(masses_);
  const int words = block_words(num_blocks_), share = (words + kWarps - 1) / kWarps;
  const int first = warp_ * share, last = min(first + share, words);
  float shift[kTogether], covered[kTogether];
#pragma unroll
  for (int h = 0; h < kTogether; ++h) {
    shift[h] = h < args_.group ? shared_.shift[h] : 0.0f;
    covered[h] = 0.0f;
  }
  for (int start = first; start < last; start += kAhead) {
    float scores[kTogether][kAhead];
    load_ahead(scores, 0, start * 32 + lane_, 32);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (start + i >= last) break;
      const int block = (start + i) * 32 + lane_;
      float largest = -INFINITY;
#pragma unroll
      for (int h = 0; h < kTogether; ++h) largest = fmaxf(largest, scores[h][i] - shift[h]);
      // The mass of a block is that of the largest score above its shift: one power a block.
      const bool keep =
          block < num_blocks_ && (forced(block) || exp2f(largest) >= args_.mass_threshold);
      if (keep) {
#pragma unroll
        for (int h = 0; h < kTogether; ++h) covered[h] += exp2f(scores[h][i] - shift[h]);
      }
      const unsigned kept = __ballot_sync(kAllLanes, keep);
      if (lane_ == 0) kept_words[start + i] = kept;
    }
  }
#pragma unroll
  for (int h = 0; h < kTogether; ++h) {
    const float in_warp = warp_sum(covered[h]);
    if (lane_ == 0 && h < args_.group) shared_.reduce_sum[h][warp_] = in_warp;
  }
  __syncthreads();
  int before = 0, total = 0;
  for (int i = lane_; i < words; i += 32) {
    const int count = __popc(kept_words[i]);
    total += count;
    before += i < first ? count : 0;
  }
  total = warp_sum(total);
  int place = warp_sum(before);
  int* out = args_.blocks + list_ * args_.columns;
  NearBlock* near = reinterpret_cast<NearBlock*>(kept_words + block_words(args_.max_blocks));
  for (int i = first; i < last; ++i) {
    const unsigned kept = kept_words[i];
    if ((kept >> lane_) & 1) {
      const int column = place + __popc(kept & ((1u << lane_) - 1)), block = i * 32 + lane_;
      near[column] = static_cast<NearBlock>(block);
      out[column] = block;
    }
    place += __popc(kept);
  }
  if (args_.pad) {
    for (int i = total + static_cast<int>(threadIdx.x); i < args_.columns; i += kThreads) {
      out[i] = -1;
    }
  }
  if (warp_ == kWarps - 1) finish(total, kWarps);
  __syncthreads();
  return {near, total};
}

template <int kTogether>
size_t list_shared_bytes(const SelectArgs& args) {
  return kTogether
             ? threshold_shared_bytes(args.max_blocks)
             : select_shared_bytes(args.max_blocks,
                                   num_sums(args.combine_max, args.coverage >= 0.0f, args.group));
}

// A list by the kernel's rule: `kTogether` 0 stands for any.
template <int kThreads, int kTogether>
__device__ inline auto select_list(const SelectArgs& args, SelectShared& shared, float* masses,
                                   int request, int head) {
  ListSelection<kThreads> selection(args, shared, masses, request, head);
  if constexpr (kTogether == 0) {
    return selection.run();
  } else {
    return selection.template run_by_threshold<kTogether>();
  }
}

// Call `launch` with the number that a kernel of its own is compiled for, as a constant: one kernel
// with the code of all rules would be several times what a list runs through.
template <typename Launch>
cudaError_t with_heads_together(const SelectArgs& args, const Launch& launch) {
  if (!takes_by_threshold(args)) return launch(std::integral_constant<int, 0>{});
  if (args.group == 1) return launch(std::integral_constant<int, 1>{});
  if (args.group <= 4) return launch(std::integral_constant<int, 4>{});
  return launch(std::integral_constant<int, kMostTogether>{});
}

}  // namespace kcache
