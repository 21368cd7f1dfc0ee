// SPDX-License-Identifier: Apache-2.0
// Choose the V blocks of one list with one thread block. Definition:
// vllm_kcache/reference/select.py.
//
// Blocks are ranked by a composite of (mass as an integer, then lower block), and kept down to the
// last one needed. That one is found digit by digit from the top, by a histogram of counts and of
// masses of each digit: no sort. Masses are added as integers of 2^-30, which makes sums exact in
// any order.
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
// Scores that a thread loads before it uses the first: a list is bound by the latency of these
// loads. More take more registers than a thread of follow.cu may have.
constexpr int kInFlight = 8;
// Query heads whose scores of a block a thread can have in registers at once.
constexpr int kMostTogether = 8;
constexpr float kFixedPointOne = 1073741824.0f;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Shared memory of a list: masses of all blocks, then the histogram.
__host__ __device__ inline int num_sums(bool combine_max, bool cover, int group) {
  return !cover ? 0 : combine_max ? group : 1;
}
__host__ __device__ inline size_t select_shared_bytes(int max_blocks, int sums) {
  return (static_cast<size_t>(max_blocks) + kBins * (1 + sums)) * 4;
}

struct SelectShared {
  float reduce_max[kMaxGroup][kMaxWarps];
  float reduce_sum[kMaxGroup][kMaxWarps];
  unsigned reduce_total[kMaxGroup][kMaxWarps];
  float shift[kMaxGroup];          // log2 of the sum of exp over the request, each query head
  unsigned totals[kMaxGroup];      // all mass, fixed point
  unsigned above[kMaxGroup];       // mass of the blocks ranked above the digit being found
  unsigned before[kMaxGroup][32];  // mass before each lane's bins
  unsigned long long threshold;    // composite of the last block kept
  int count_above, in_bin;
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

template <int kThreads>
class ListSelection {
  static constexpr int kWarps = kThreads / 32;
  // Warps that share the list of a query head.
  static constexpr int kHeadParts = 4;

 public:
  __device__ ListSelection(const SelectArgs& args, SelectShared& shared, float* dynamic,
                           int request, int head)
      : args_(args),
        shared_(shared),
        masses_(dynamic),
        histogram_(reinterpret_cast<unsigned*>(dynamic + args.max_blocks)),
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
    cover_ = args.coverage >= 0.0f;
    cap_ = args.top_n < 0 ? num_blocks_ : min(args.top_n, num_blocks_);
    num_sums_ = num_sums(args.combine_max, cover_, args.group);
  }

  // The blocks kept, visible to the thread block, by any rule.
  __device__ List<int> run() {
    if (num_tokens_ <= 0) {
      write_empty();
      return {nullptr, 0};
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
    if (args_.mass_threshold >= 0.0f) {
      if (!threshold_within_cap()) find_threshold();
    } else if (cap_ == num_blocks_ && !cover_) {
      if (threadIdx.x == 0) shared_.threshold = 0;
      __syncthreads();
    } else {
      find_threshold();
    }
    const int count = compact();
    return {args_.blocks + list_ * args_.columns, count};
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
  template <int kTogether, int kAhead>
  __device__ void load_ahead(float (&scores)[kTogether][kAhead], int first_head, int start,
                             int stride) const;
  __device__ void write_shift(int in_group, float largest, float sum);
  template <int kTogether>
  __device__ void normalise();
  __device__ void normalise_from_chunks();
  template <int kTogether>
  __device__ void combine();
  __device__ float head_mass(int in_group, int block) const {
    const float lse = __ldcg(lse_ + static_cast<int64_t>(in_group) * args_.max_blocks + block);
    return exp2f(lse * kLog2E - shared_.shift[in_group]);
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

  __device__ bool covered(int sum, unsigned mass) const {
    return static_cast<float>(mass) >= args_.coverage * static_cast<float>(shared_.totals[sum]);
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

  // Composite of the last block kept, digit by digit.
  __device__ void find_threshold() {
    for (int pass = 0; pass < 6; ++pass) {
      const int shift = digit_shift(pass), bits = pass == 3 ? 7 : 8;
#pragma unroll 1
      for (int i = threadIdx.x; i < kBins * (1 + num_sums_); i += kThreads) histogram_[i] = 0;
      __syncthreads();
      count_digits(shift, bits);
      __syncthreads();
      if (warp_ == 0) find_digit(shift);
      __syncthreads();
      if (!shared_.enough || shared_.in_bin == 1) break;
    }
  }

  // Histogram of a digit over the blocks that share all digits before it.
  __device__ void count_digits(int shift, int bits) {
    const unsigned long long prefix = shared_.threshold >> (shift + bits);
    for (int block = threadIdx.x; block < num_blocks_; block += kThreads) {
      const unsigned long long its_rank = rank(block);
      if (its_rank >> (shift + bits) != prefix) continue;
      const int bin = static_cast<int>(its_rank >> shift) & ((1 << bits) - 1);
      atomicAdd(histogram_ + bin, 1u);
#pragma unroll 1
      for (int sum = 0; sum < num_sums_; ++sum) {
        const float mass = args_.combine_max ? head_mass(sum, block) : masses_[block];
        atomicAdd(histogram_ + (1 + sum) * kBins + bin, fixed_point(mass));
      }
    }
  }

  // Highest digit down to which the blocks suffice. Lane l has the bins 255 - 8 l and down.
  __device__ void find_digit(int shift) {
    constexpr int kLaneBins = kBins / 32;
    const int top = kBins - 1 - lane_ * kLaneBins;
    int own = 0;
    for (int i = 0; i < kLaneBins; ++i) own += histogram_[top - i];
    const int count = shared_.count_above + warp_inclusive(own, lane_);
    bool all_met = cover_;
#pragma unroll 1
    for (int sum = 0; sum < num_sums_; ++sum) {
      const unsigned* masses = histogram_ + (1 + sum) * kBins;
      unsigned own_mass = 0;
      for (int i = 0; i < kLaneBins; ++i) own_mass += masses[top - i];
      const unsigned mass = shared_.above[sum] + static_cast<unsigned>(warp_inclusive(
                                                     static_cast<int>(own_mass), lane_));
      shared_.before[sum][lane_] = mass - own_mass;
      all_met = all_met && covered(sum, mass);
    }
    const bool enough = count >= cap_ || (count >= num_forced_ && all_met);
    const unsigned lanes = __ballot_sync(kAllLanes, enough);
    if (lanes == 0) {  // rounding: not even all of them reach the coverage
      if (lane_ == 0) shared_.enough = false;
      return;
    }
    __syncwarp();
    if (lane_ != __ffs(lanes) - 1) return;
    int above = count - own;
#pragma unroll 1
    for (int sum = 0; sum < num_sums_; ++sum) shared_.above[sum] = shared_.before[sum][lane_];
    int bin = top;
    for (;; --bin) {
      const int with_bin = above + static_cast<int>(histogram_[bin]);
      bool met = cover_;
#pragma unroll 1
      for (int sum = 0; sum < num_sums_; ++sum) {
        met = met && covered(sum, shared_.above[sum] + histogram_[(1 + sum) * kBins + bin]);
      }
      if (with_bin >= cap_ || (with_bin >= num_forced_ && met) || bin == top - (kLaneBins - 1)) {
        break;
      }
      above = with_bin;
#pragma unroll 1
      for (int sum = 0; sum < num_sums_; ++sum) {
        shared_.above[sum] += histogram_[(1 + sum) * kBins + bin];
      }
    }
    shared_.count_above = above;
    shared_.in_bin = static_cast<int>(histogram_[bin]);
    shared_.threshold |= static_cast<unsigned long long>(bin) << shift;
    shared_.enough = true;
  }

  __device__ bool kept(int block) const { return rank(block) >= shared_.threshold; }

  // Write the kept blocks in ascending order, each warp a contiguous share, and the mass covered.
  __device__ int compact() {
    const int share = ((num_blocks_ + kThreads - 1) / kThreads) * 32;
    const int first = warp_ * share, last = min(first + share, num_blocks_);
    int count = 0;
    float mass = 0.0f;
    for (int start = first; start < last; start += 32) {
      const int block = start + lane_;
      const bool keep = block < last && kept(block);
      count += __popc(__ballot_sync(kAllLanes, keep));
      if (keep) mass += masses_[block];
    }
    mass = warp_sum(mass);
    if (lane_ == 0) {
      shared_.warp_counts[warp_] = count;
      shared_.reduce_sum[0][warp_] = mass;
    }
    __syncthreads();
    int place = 0, total = 0;
    for (int i = 0; i < kWarps; ++i) {
      if (i == warp_) place = total;
      total += shared_.warp_counts[i];
    }
    int* out = args_.blocks + list_ * args_.columns;
    for (int start = first; start < last; start += 32) {
      const int block = start + lane_;
      const bool keep = block < last && kept(block);
      const unsigned keeping = __ballot_sync(kAllLanes, keep);
      const int column = place + __popc(keeping & ((1u << lane_) - 1));
      if (keep && column < args_.columns) out[column] = block;
      place += __popc(keeping);
    }
    total = min(total, args_.columns);
    if (args_.pad) {
#pragma unroll 1
      for (int i = total + threadIdx.x; i < args_.columns; i += kThreads) out[i] = -1;
    }
    __syncthreads();
    if (args_.combine_max) {
      cover_heads(out, total);
      __syncthreads();
    }
    if (warp_ == 0) finish(total, args_.combine_max ? kHeadParts : kWarps);
    __syncthreads();
    return total;
  }

  // Mass that the list covers of each query head. From the list: a pass over all blocks would wait
  // for memory at every step.
  __device__ void cover_heads(const int* list, int count) {
    for (int job = warp_; job < args_.group * kHeadParts; job += kWarps) {
      const int g = job / kHeadParts, part = job % kHeadParts;
      float mass = 0.0f;
#pragma unroll 4
      for (int i = part * 32 + lane_; i < count; i += 32 * kHeadParts) {
        mass += head_mass(g, list[i]);
      }
      mass = warp_sum(mass);
      if (lane_ == 0) shared_.reduce_sum[g][part] = mass;
    }
  }

  // By one warp: the list's length, and its mass from sums in `parts` places of each query head.
  __device__ void finish(int count, int parts) {
    float covered_mass = 1.0f;
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
  float* masses_;
  unsigned* histogram_;
  const int64_t list_;
  const float* lse_;
  const int num_tokens_, lane_, warp_;
  int num_blocks_, first_recent_, num_forced_, cap_, num_sums_;
  bool cover_;
};

}  // namespace kcache

#include "masses.cuh"
#include "threshold.cuh"
