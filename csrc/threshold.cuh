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

// Shared memory of such a list: no masses, no histogram. So little that a list fits beside a full
// set of score programs.
inline size_t threshold_shared_bytes(int max_blocks) {
  return block_words(max_blocks) * 4 + max_blocks * sizeof(NearBlock);
}

// Blocks that are forced or have the threshold's mass in any query head, all ties included.
template <int kThreads, bool kCovers>
template <int kTogether>
__device__ List<NearBlock> ListSelection<kThreads, kCovers>::run_by_threshold() {
  if (num_tokens_ <= 0) {
    write_empty();
    return {nullptr, 0};
  }
  normalise_from_chunks();
  constexpr int kAhead = kInFlight / kTogether;
  const int first = first_word(), last = last_word();
  float shifts[kTogether], covered[kTogether] = {};
  load_shifts(shifts, 0);
  for (int start = first; start < last; start += kAhead) {
    float scores[kTogether][kAhead];
    load_ahead<32>(scores, 0, start * 32 + lane_);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (start + i >= last) break;
      const int block = (start + i) * 32 + lane_;
      float largest = -INFINITY;
#pragma unroll
      for (int h = 0; h < kTogether; ++h) {
        largest = fmaxf(largest, above_shift(scores[h][i], shifts[h]));
      }
      // The mass of a block is that of the largest score above its shift: one power a block.
      const bool keep =
          block < num_blocks_ && (forced(block) || fast_exp2(largest) >= args_.mass_threshold);
      if (keep) {
#pragma unroll
        for (int h = 0; h < kTogether; ++h) {
          covered[h] += fast_exp2(above_shift(scores[h][i], shifts[h]));
        }
      }
      const unsigned kept = __ballot_sync(kAllLanes, keep);
      if (lane_ == 0) kept_words_[start + i] = kept;
    }
  }
#pragma unroll
  for (int h = 0; h < kTogether; ++h) {
    const float in_warp = warp_sum(covered[h]);
    if (lane_ == 0 && h < args_.group) shared_.reduce_sum[h][warp_] = in_warp;
  }
  __syncthreads();
  const int count = write_list();
  if (warp_ == kWarps - 1) finish(count, kWarps);
  __syncthreads();
  return {near_, count};
}

// What a kernel is compiled for: one with the code of all rules would be several times what a list
// runs through. More than 0: a threshold, for so many query heads.
constexpr int kAnyRule = 0, kNoCoverage = -1;

template <int kRule>
size_t list_shared_bytes(const SelectArgs& args) {
  return kRule > 0
             ? threshold_shared_bytes(args.max_blocks)
             : select_shared_bytes(args.max_blocks,
                                   num_sums(args.combine_max, args.coverage >= 0.0f, args.group));
}

template <int kThreads, int kRule>
__device__ inline List<NearBlock> select_list(const SelectArgs& args, SelectShared& shared,
                                              float* dynamic, int request, int head) {
  ListSelection<kThreads, kRule == kAnyRule> selection(args, shared, dynamic, request, head);
  if constexpr (kRule <= 0) {
    return selection.run();
  } else {
    return selection.template run_by_threshold<kRule>();
  }
}

// Call `launch` with what its kernel is compiled for, as a constant.
template <typename Launch>
cudaError_t with_rule(const SelectArgs& args, const Launch& launch) {
  if (args.coverage >= 0.0f) return launch(std::integral_constant<int, kAnyRule>{});
  if (!takes_by_threshold(args)) return launch(std::integral_constant<int, kNoCoverage>{});
  if (args.group == 1) return launch(std::integral_constant<int, 1>{});
  if (args.group <= 4) return launch(std::integral_constant<int, 4>{});
  return launch(std::integral_constant<int, kMostTogether>{});
}

}  // namespace kcache
