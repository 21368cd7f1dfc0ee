// SPDX-License-Identifier: Apache-2.0
// Choose the V blocks of one list with one thread block. Definition:
// vllm_kcache/reference/select.py.
//
// Blocks are ranked by a composite of (mass as an integer, then lower block), and kept down to the
// last one needed. That one is found without sorting them all: a histogram of ranks tells its bin,
// and only the blocks of that bin are compared with one another (csrc/rank_bins.cuh); where they
// are too many, it is found digit by digit (csrc/search.cuh). Masses are added as integers of
// 2^-30, which makes sums exact in any order.
#pragma once

#include <cstdint>

#include "ptx.cuh"
#include "rank.cuh"
#include "residency.cuh"
#include "warp.cuh"

namespace kcache {

// Threads that a list may have.
constexpr int kMaxThreads = 512, kMaxWarps = kMaxThreads / 32;
constexpr int kBins = 256;
// Words of all bins of ranks, at least; and blocks of one bin that can be compared: their
// composites, of two words each, take the place of the bins.
constexpr int kRankWords = 1024, kMaxCandidates = kRankWords / 2;
// Scores that a thread loads before it uses the first: a list is bound by the latency of these
// loads. More take more registers than a thread of follow.cu may have.
constexpr int kInFlight = 8;
// Query heads whose scores of a block a thread can have in registers at once.
constexpr int kMostTogether = 8;
constexpr float kFixedPointOne = 1073741824.0f;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Shared memory of a list: a bit of each block, the masses of all, then the histogram.
__host__ __device__ inline int num_sums(bool combine_max, bool cover, int group) {
  return !cover ? 0 : combine_max ? group : 1;
}
__host__ __device__ inline int block_words(int max_blocks) {
  return (max_blocks + 31) / 32;
}
// Words before the histogram, which may have to hold 64-bit integers.
__host__ __device__ inline int histogram_offset(int max_blocks) {
  return (block_words(max_blocks) + max_blocks + 1) / 2 * 2;
}
inline size_t select_shared_bytes(int max_blocks, int sums) {
  const int histogram = kBins * (1 + sums) > kRankWords ? kBins * (1 + sums) : kRankWords;
  return (static_cast<size_t>(histogram_offset(max_blocks)) + histogram) * 4;
}

struct SelectShared {
  float reduce_max[kMaxGroup][kMaxWarps];
  float reduce_sum[kMaxGroup][kMaxWarps];
  unsigned warp_sums[1 + kMaxGroup][kMaxWarps];
  float shift[kMaxGroup];          // log2 of the sum of exp over the request, each query head
  unsigned totals[kMaxGroup];      // all mass, fixed point
  unsigned above[kMaxGroup];       // mass of the blocks ranked above the bin or digit found
  unsigned before[kMaxGroup][32];  // mass before each lane's bins
  unsigned long long threshold;    // composite of the last block kept
  int count_above, in_bin;
  int rank_bin, num_candidates;
  bool enough;
  int warp_counts[kMaxWarps];
};

__device__ inline unsigned fixed_point(float mass) {
  return static_cast<unsigned>(mass * kFixedPointOne + 0.5f);
}

// V blocks of a list, ascending, in GPU memory (int) or shared memory (16 bits).
template <typename Block>
struct List {
  const Block* blocks;
  int count;
};
using NearBlock = uint16_t;
static_assert(kMaxBlocks <= 1 << 16, "a NearBlock counts to there");

// `kCovers`: with the code for a coverage, which other rules are faster without.
template <int kThreads, bool kCovers>
class ListSelection {
  static constexpr int kWarps = kThreads / 32;
  // Warps that share the list of a query head.
  static constexpr int kHeadParts = 4;

 public:
  __device__ ListSelection(const SelectArgs& args, SelectShared& shared, float* dynamic,
                           int request, int head)
      : args_(args),
        shared_(shared),
        kept_words_(reinterpret_cast<unsigned*>(dynamic)),
        masses_(dynamic + block_words(args.max_blocks)),
        near_(reinterpret_cast<NearBlock*>(masses_)),
        histogram_(reinterpret_cast<unsigned*>(dynamic + histogram_offset(args.max_blocks))),
        list_(static_cast<int64_t>(request) * args.num_kv_heads + head),
        lse_(args.block_lse + list_ * args.group * args.max_blocks),
        num_tokens_(args.seq_lens[request]),
        lane_(threadIdx.x & 31),
        warp_(threadIdx.x >> 5) {
    num_blocks_ =
        min((num_tokens_ + args.v_block_tokens - 1) / args.v_block_tokens, args.max_blocks);
    first_recent_ = max(num_tokens_ - args.recent_tokens, 0) / args.v_block_tokens;
    const int sinks = min(args.sink_blocks, num_blocks_);
    num_forced_ = sinks + num_blocks_ - first_recent_ - max(sinks - first_recent_, 0);
    cover_ = kCovers && args.coverage >= 0.0f;
    cap_ = args.top_n < 0 ? num_blocks_ : min(args.top_n, num_blocks_);
    num_sums_ = num_sums(args.combine_max, cover_, args.group);
    counts_ranks_ = cap_ < num_blocks_ || cover_;
    // 2^28 values of a mass's bits are 32 powers of two below 1. As many bins as have room: of the
    // counts and of each sum, in max(kRankWords, kBins * (1 + sums)) words.
    rank_shift_ = num_sums_ == 0 ? 18 : num_sums_ == 1 ? 19 : 20;
    rank_bins_ = 1 << (28 - rank_shift_);
  }

  // The blocks kept, visible to the thread block, by any rule.
  __device__ List<NearBlock> run() {
    if (num_tokens_ <= 0) {
      write_empty();
      return {nullptr, 0};
    }
    if (counts_ranks_) {
      for (int i = threadIdx.x; i < rank_bins_ * (1 + num_sums_); i += kThreads) histogram_[i] = 0;
    }
    if (args_.chunk_lse != nullptr) {
      normalise_from_chunks();
    } else if (args_.group == 1) {
      normalise<1>();
    } else {
      normalise<4>();
    }
    if (args_.group == 1) {
      combine<1>();
    } else {
      combine<4>();
    }
    const bool takes_all =
        args_.mass_threshold >= 0.0f ? threshold_within_cap() : cap_ >= num_blocks_ && !cover_;
    bool by_bin = false;
    if (!takes_all) {
      find_rank_bin();
      by_bin = shared_.in_bin <= kMaxCandidates;
      if (!by_bin) find_threshold();
    }
    return take(by_bin ? mark_by_rank_bin() : mark_from_threshold());
  }
  // The same where `takes_by_threshold` says so, for `kTogether` query heads or fewer
  // (csrc/threshold.cuh).
  template <int kTogether>
  __device__ List<NearBlock> run_by_threshold();

 private:
  __device__ bool forced(int block) const {
    return block < args_.sink_blocks || block >= first_recent_;
  }
  __device__ unsigned long long rank(int block) const {
    return composite(masses_[block], forced(block), block);
  }
  // csrc/masses.cuh.
  template <int kStride, int kTogether, int kAhead>
  __device__ void load_ahead(float (&scores)[kTogether][kAhead], int first_head, int start) const;
  template <int kTogether>
  __device__ void load_shifts(float (&shifts)[kTogether], int first_head) const;
  __device__ void write_shift(int in_group, float largest, float sum);
  template <int kTogether>
  __device__ void normalise();
  __device__ void normalise_from_chunks();
  template <int kTogether>
  __device__ void combine();
  template <int kTogether>
  __device__ void combine_max();
  template <int kTogether>
  __device__ void combine_mean();
  // Base-2 logarithm of a mass. `shift` comes from rounded products, so where one block has all of
  // the mass, that may be some 1e-7 times the score off 1.
  __device__ static float above_shift(float score, float shift) {
    return fmaf(score, kLog2E, -shift);
  }
  __device__ float head_mass(int in_group, int block) const {
    const float lse = __ldcg(lse_ + static_cast<int64_t>(in_group) * args_.max_blocks + block);
    return fast_exp2(above_shift(lse, shared_.shift[in_group]));
  }

  __device__ void write_empty() {
    if (args_.pad) {
#pragma unroll 1
      for (int i = threadIdx.x; i < args_.columns; i += kThreads) {
        args_.blocks[list_ * args_.columns + i] = -1;
      }
    }
    if (threadIdx.x == 0) {
      args_.counts[list_] = 0;
      args_.mass[list_] = 1.0f;
    }
  }

  __device__ bool covered(unsigned total, unsigned mass) const {
    return static_cast<float>(mass) >= args_.coverage * static_cast<float>(total);
  }

  // Keep what is forced or has the threshold's mass, all ties included, unless the cap forbids.
  __device__ bool threshold_within_cap() {
    const unsigned long long least = composite(args_.mass_threshold, false, 0xffff);
    int count = 0;
    for (int block = threadIdx.x; block < num_blocks_; block += kThreads) {
      count += rank(block) >= least;  // that this thread combined
    }
    count = warp_sum(count);
    if (lane_ == 0) shared_.warp_counts[warp_] = count;
    __syncthreads();
    count = 0;
    for (int i = 0; i < kWarps; ++i) count += shared_.warp_counts[i];
    if (count > cap_) return false;
    if (threadIdx.x == 0) shared_.threshold = least;
    __syncthreads();
    return true;
  }

  // csrc/rank_bins.cuh.
  __device__ int rank_bin(float mass, int block) const;
  __device__ void add_mass(int sum, int bin, float mass) {
    const unsigned fixed = fixed_point(mass);
    if (fixed > 0) atomicAdd(histogram_ + (1 + sum) * rank_bins_ + bin, fixed);
  }
  __device__ void add_masses_of_heads();
  __device__ bool enough(int count, bool all_met) const {
    return count >= cap_ || (cover_ && count >= num_forced_ && all_met);
  }
  __device__ void find_rank_bin();
  __device__ float mark_by_rank_bin();
  __device__ void add_masses_above();
  __device__ int candidates_to_cover();

  // csrc/search.cuh.
  __device__ void find_threshold();
  __device__ void count_digits(int shift, int bits);
  __device__ void find_digit(int shift);

  // Each warp has a contiguous share of the words, 32 blocks each.
  __device__ int first_word() const { return min(warp_ * words_each(), block_words(num_blocks_)); }
  __device__ int last_word() const {
    return min((warp_ + 1) * words_each(), block_words(num_blocks_));
  }
  __device__ int words_each() const { return (block_words(num_blocks_) + kWarps - 1) / kWarps; }

  // Set the bits of what ranks no lower than the threshold. Returns the mass that a thread marked.
  __device__ float mark_from_threshold() {
    float mass = 0.0f;
    for (int word = first_word(); word < last_word(); ++word) {
      const int block = word * 32 + lane_;
      const bool keep = block < num_blocks_ && rank(block) >= shared_.threshold;
      const unsigned kept = __ballot_sync(kAllLanes, keep);
      if (lane_ == 0) kept_words_[word] = kept;
      if (keep) mass += masses_[block];
    }
    return mass;
  }

  // Take the blocks whose bits are set. `mass` is this thread's part of theirs.
  __device__ List<NearBlock> take(float mass) {
    mass = warp_sum(mass);
    if (lane_ == 0) shared_.reduce_sum[0][warp_] = mass;
    __syncthreads();
    const int count = write_list();
    if (args_.combine_max) {
      __syncthreads();
      cover_heads(count);
      __syncthreads();
    }
    if (warp_ == kWarps - 1) finish(count, args_.combine_max ? kHeadParts : kWarps);
    __syncthreads();
    return {near_, count};
  }

  // Write the blocks whose bits are set, in ascending order: to memory, and nearer, over the
  // masses, for the look-up that follows. Returns how many there are.
  __device__ int write_list() {
    const int words = block_words(num_blocks_), first = first_word(), last = last_word();
    int before = 0, total = 0;
    for (int i = lane_; i < words; i += 32) {
      const int count = __popc(kept_words_[i]);
      total += count;
      before += i < first ? count : 0;
    }
    total = min(warp_sum(total), args_.columns);
    int place = warp_sum(before);
    int* out = args_.blocks + list_ * args_.columns;
    for (int i = first; i < last; ++i) {
      const unsigned kept = kept_words_[i];
      const int column = place + __popc(kept & ((1u << lane_) - 1)), block = i * 32 + lane_;
      if (((kept >> lane_) & 1) && column < args_.columns) {
        near_[column] = static_cast<NearBlock>(block);
        out[column] = block;
      }
      place += __popc(kept);
    }
    if (args_.pad) {
#pragma unroll 1
      for (int i = total + threadIdx.x; i < args_.columns; i += kThreads) out[i] = -1;
    }
    return total;
  }

  // Mass that the list covers of each query head. From the list: a pass over all blocks would wait
  // for memory at every step.
  __device__ void cover_heads(int count) {
    for (int job = warp_; job < args_.group * kHeadParts; job += kWarps) {
      const int g = job / kHeadParts, part = job % kHeadParts;
      float mass = 0.0f;
#pragma unroll 4
      for (int i = part * 32 + lane_; i < count; i += 32 * kHeadParts) {
        mass += head_mass(g, near_[i]);
      }
      mass = warp_sum(mass);
      if (lane_ == 0) shared_.reduce_sum[g][part] = mass;
    }
  }

  // By one warp: the list's length, and its mass from sums in `parts` places of each query head.
  __device__ void finish(int count, int parts) {
    float covered_mass = 1.0f;
#pragma unroll 1
    for (int g = 0; g < (args_.combine_max ? args_.group : 1); ++g) {
      covered_mass =
          fminf(covered_mass, warp_sum(lane_ < parts ? shared_.reduce_sum[g][lane_] : 0.0f));
    }
    if (lane_ != 0) return;
    args_.counts[list_] = count;
    args_.mass[list_] = covered_mass;
    if (args_.counters == nullptr) return;
    const float log10 = log2f(fmaxf(1.0f - covered_mass, 1e-30f)) * 0.30102999566f;
    const int bucket = static_cast<int>(ceilf((log10 + 4.0f) * ((kDroppedBuckets - 1) / 4.0f)));
    atomicAdd(args_.counters + kLists, 1ull);
    atomicAdd(args_.counters + kSelected, static_cast<Word>(count));
    atomicAdd(args_.counters + kFirstDroppedBucket + min(max(bucket, 0), kDroppedBuckets - 1),
              1ull);
  }

  const SelectArgs& args_;
  SelectShared& shared_;
  unsigned* kept_words_;  // a bit of each block
  float* masses_;
  NearBlock* near_;  // where the masses are until the list is written
  unsigned* histogram_;
  const int64_t list_;
  const float* lse_;
  const int num_tokens_, lane_, warp_;
  int num_blocks_, first_recent_, num_forced_, cap_, num_sums_, rank_bins_, rank_shift_;
  bool cover_, counts_ranks_;
};

}  // namespace kcache

#include "masses.cuh"
#include "rank_bins.cuh"
#include "search.cuh"
#include "threshold.cuh"
