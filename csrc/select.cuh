// SPDX-License-Identifier: Apache-2.0
// Choose the V blocks of one list with one thread block. Definition:
// vllm_kcache/reference/select.py.
//
// A list of any length is walked in segments, so its shared memory is the same at any length. A
// block is kept when it ranks no lower than a threshold. The default rule names that (a mass);
// other rules search for it first (csrc/search.cuh).
#pragma once

#include <type_traits>

#include "layer_view.h"
#include "ptx.cuh"
#include "warp.cuh"

namespace kcache {

// Threads of a list: these, or half as many, so that more lists run at once.
constexpr int kMostThreads = 512, kMostWarps = kMostThreads / 32;
__device__ inline int num_threads() {
  return static_cast<int>(blockDim.x);
}
__device__ inline int num_warps() {
  return num_threads() / 32;
}
// Scores that a thread has in registers at once: a list is bound by the latency of its loads. More
// take more registers than a thread may have.
constexpr int kInFlight = 16;
// Digits of a rank, and its values. Sums of masses are integers of 2^-30: the same in any
// order, and off by half of that for each block at most.
constexpr int kBins = 256, kMaxSums = 1 + kMaxGroup;
static_assert(kMostThreads / 2 >= kBins, "a thread has a bin of its own");

// V blocks of a segment. Of each there is one bit in shared memory and no more: a list must fit
// beside the thread blocks of the kernel before it, or it begins only when those have ended.
constexpr int kSegment = 16384;
// V blocks of the smallest chunk of which a maximum may be known; a power of two, as all are.
constexpr int kLeastChunk = 4;
// A V block, from the first of its segment.
using NearBlock = uint16_t;
static_assert(kSegment <= 1 << 16, "a NearBlock counts to there");
// V blocks whose masses a search keeps: more are computed again in each of its passes.
constexpr int kMasses = 4608;

// Kernel specialisations: one kernel with all rules would be several times larger. `kTogether`:
// most query heads whose scores of a block a thread holds in registers at once: of a rule that
// searches for its threshold (`kSearches`) all that there are. `kJoint`: several rows have one list
// (csrc/joint.cuh).
template <int kTogether_, bool kSearches_, bool kJoint_ = false>
struct Rule {
  static constexpr int kTogether = kTogether_;
  static constexpr bool kSearches = kSearches_;
  static constexpr bool kJoint = kJoint_;
  static constexpr int kMostRows = kJoint ? kMostTogether : 1;
  // Of each row there is a bit.
  static constexpr int kSegment = kcache::kSegment / (!kJoint ? 1 : kSearches ? 4 : 2);
};

// Call `launch` with the rule that its kernel is to be compiled for.
template <typename Launch>
cudaError_t with_rule(const LayerView& view, const Launch& launch) {
  if (!view.combine_max || view.top_n >= 0 || view.coverage >= 0.0f) {
    return view.group <= 4 ? launch(Rule<4, true>{}) : launch(Rule<16, true>{});
  }
  return view.group == 1 ? launch(Rule<1, false>{}) : launch(Rule<4, false>{});
}

// The same where several rows have one list: then a group is half of the most query heads at most.
template <typename Launch>
cudaError_t with_joint_rule(const LayerView& view, const Launch& launch) {
  if (!view.combine_max || view.top_n >= 0 || view.coverage >= 0.0f) {
    return view.group <= 4 ? launch(Rule<4, true, true>{}) : launch(Rule<8, true, true>{});
  }
  return view.group == 1 ? launch(Rule<1, false, true>{}) : launch(Rule<4, false, true>{});
}

struct SearchShared {
  float masses[kMasses];                // of a list of so few blocks
  unsigned histogram[kMaxSums][kBins];  // blocks, then masses of each sum
  unsigned above[kMaxSums];             // the same over the blocks ranked above the digits found
  unsigned totals[kMaxSums];
  int heavy, digit;
};
struct NoSearchShared {};

// Of rows that have one list.
template <typename R>
struct JointShared {
  int2 ends[R::kMostRows];  // its blocks, and the first of the recent ones
  int selected[R::kMostRows];
  unsigned long long thresholds[R::kMostRows];
  // A bit of each chunk of the segment: those that may have a block which a rule's mass keeps.
  unsigned chunks[R::kMostRows][R::kSegment / kLeastChunk / 32];
};
struct NotJointShared {};

template <typename R>
struct SelectShared : std::conditional_t<R::kSearches, SearchShared, NoSearchShared>,
                      std::conditional_t<R::kJoint, JointShared<R>, NotJointShared> {
  // Of each query head: of all rows where several have one list.
  float shift[kMaxGroup];  // log2 of the sum of exp over the request
  // The least score of a block that has the threshold's mass; of no head above all scores.
  float4 limits[R::kMostRows][kMaxGroup / (R::kJoint ? 8 : 4)];
  float covered[kMaxGroup];
  unsigned kept_words[R::kMostRows][R::kSegment / 32];  // a bit of each block of the segment
  NearBlock kept[kMostThreads];                         // a part of those whose bits are set
};

// V blocks of a request.
__device__ inline int blocks_of(const LayerView& view, const Step& step, int request) {
  const int tokens = max(step.seq_lens[request], 0);
  return min((tokens + view.block_tokens - 1) / view.block_tokens, step.max_blocks);
}

// Write -1 past the end of this thread block's list, for callers that do not read the counts.
__device__ inline void pad(int* lists, int count, int columns) {
  int* list = lists + static_cast<int64_t>(blockIdx.x) * columns;
  for (int i = count + static_cast<int>(threadIdx.x); i < columns; i += num_threads()) list[i] = -1;
}

template <typename R>
class ListSelection {
  static constexpr int kTogether = R::kTogether, kSegment = R::kSegment;
  // Blocks side by side that a thread loads at once, and how many times that.
  static constexpr int kWide = kTogether <= 4 ? 4 : 1;
  static constexpr int kAhead = kInFlight / (kTogether * kWide), kBlocks = kAhead * kWide;

 public:
  // `rows`: that have the list, each of one token more than the row before.
  __device__ ListSelection(const LayerView& view, const Step& step, SelectShared<R>& shared,
                           int list, int rows = 1)
      : view_(view),
        step_(step),
        shared_(shared),
        list_(list),
        num_blocks_(blocks_of(view, step, list / view.num_kv_heads)),
        lane_(threadIdx.x & 31),
        warp_(threadIdx.x >> 5),
        leader_(list),
        rows_(rows),
        num_tokens_(step.seq_lens[list / view.num_kv_heads]) {
    if constexpr (R::kJoint) {
      use(rows - 1);
    } else {
      use_length(num_tokens_);
    }
  }

  // Write the list, and call take(kept, count, first_block, first_column) for each part of it, of
  // num_threads() blocks at most: `kept` counts from first_block, and is there until all threads
  // have come back. Returns its length.
  template <typename Take>
  __device__ int run(const Take& take) {
    if constexpr (R::kJoint) return run_joint(take);
    int count = 0;
    if (num_blocks_ > 0) {
      fetch_ahead();
      normalise();
      if constexpr (R::kSearches) find_threshold();
#pragma unroll 1
      for (int first = 0; first < num_blocks_; first += kSegment) {
        if constexpr (R::kSearches) {
          mark_ranked(first);
        } else {
          mark(first);
        }
        __syncthreads();
        int place = 0;
        const int in_segment = count_kept(first, step_.columns - count, place);
#pragma unroll 1
        for (int part = 0; part < in_segment; part += num_threads()) {
          const int in_part = min(in_segment - part, num_threads());
          write(first, count, part, in_part, place);
          __syncthreads();
          cover(first, in_part);
          take(shared_.kept, in_part, first, count + part);
          __syncthreads();
        }
        count += in_segment;
        // The words of a segment that keeps nothing are read until here, too.
        if (first + kSegment < num_blocks_) __syncthreads();
      }
    }
    // What was covered is there since the last barrier: a list that is not empty has a block.
    if (warp_ == num_warps() - 1) finish(0, num_blocks_, count, count);
    __syncthreads();
    return count;
  }

 private:
  // Whether every row of scores begins where a vector may.
  __device__ bool vectors() const {
    return step_.max_blocks % 4 == 0 && reinterpret_cast<uintptr_t>(step_.block_lse) % 16 == 0;
  }
  // What of the rule depends on a request's tokens.
  __device__ void use_length(int num_tokens) {
    first_recent_ = max(num_tokens - view_.recent_tokens, 0) / view_.block_tokens;
    const float length = static_cast<float>(num_tokens);
    mass_threshold_ = view_.mass_threshold;
    if (view_.threshold_length > 0.0f && length > view_.threshold_length) {
      mass_threshold_ *= sqrtf(view_.threshold_length / length);
    }
  }

  // csrc/joint.cuh.
  __device__ void use(int row);
  template <typename Take>
  __device__ int run_joint(const Take& take);
  __device__ void normalise_rows();
  __device__ void find_thresholds();
  __device__ unsigned rows_with(int word) const;
  // Whether chunks of scores are passed over in which no block can have the mass that a rule names.
  __device__ bool passes_over() const {
    if constexpr (!R::kJoint || R::kSearches) return false;
    return step_.chunk_max != nullptr;
  }
  __device__ void find_chunks(int first_block);
  __device__ unsigned wanted_words(int row, int start) const;

  // Of a query head of the row that is looked at: where its sums are.
  __device__ int place_of(int head) const { return R::kJoint ? row_ * view_.group + head : head; }
  // A bit of each block of a word of the segment: those that go into the list.
  __device__ unsigned listed(int word) const {
    unsigned kept = 0;
#pragma unroll
    for (int row = 0; row < R::kMostRows; ++row) {
      if (!R::kJoint || row < rows_) kept |= shared_.kept_words[row][word];
    }
    return kept;
  }
  __device__ int num_rows() const { return R::kJoint ? rows_ : 1; }
  // Of a row its blocks, and the first of the recent ones.
  __device__ int2 ends_of(int row) const {
    if constexpr (R::kJoint) return shared_.ends[row];
    return make_int2(num_blocks_, first_recent_);
  }
  // The most that a row of the list has: the last.
  __device__ int most_blocks() const { return ends_of(num_rows() - 1).x; }

  // Each query head's log-sum-exp over the request, from what scoring left of each chunk: a warp a
  // head. Scores are read past the first-level cache, which knows nothing of a score kernel that
  // still runs.
  __device__ void normalise() {
    const int chunks = (num_blocks_ + step_.chunk_blocks - 1) / step_.chunk_blocks;
#pragma unroll 1
    for (int head = warp_; head < kMaxGroup; head += num_warps()) {
      begin_head(head, head < view_.group ? log_sum(head, chunks) : 0.0f);
    }
    __syncthreads();
  }
  __device__ void begin_head(int head, float shift) {
    if (lane_ != 0) return;
    shared_.shift[place_of(head)] = shift;
    shared_.covered[place_of(head)] = 0.0f;
    // Without a threshold everything is kept.
    const float least = mass_threshold_ > 0.0f ? log2f(mass_threshold_) : -INFINITY;
    auto* limits = reinterpret_cast<float*>(shared_.limits[row_]);
    if (head < view_.group) limits[head] = (least + shift) * kLn2;
    // Nothing is as large as what is no number.
    for (int past = view_.group; head == view_.group - 1 && past % 4 != 0; ++past) {
      limits[past] = __uint_as_float(0x7fffffffu);
    }
  }

  // The scores of the first segment to the second-level cache, while their sums are made: by the
  // last warps, which have none to make where there are few query heads.
  __device__ void fetch_ahead() const {
    const int first = R::kJoint ? warp_ : num_warps() - 1 - warp_;
    if (passes_over()) return;
#pragma unroll 1
    for (int place = first; place < num_rows() * view_.group; place += num_warps()) {
      const int row = R::kJoint ? place / view_.group : 0;
      const float* scores = scores_of(row, place - row * view_.group);
      // The row that is looked at is the longest.
#pragma unroll 1
      for (int block = lane_ * 32; block < min(num_blocks_, kSegment); block += 32 * 32) {
        prefetch(scores + block);
      }
    }
  }
  // Of a query head of a row of the list.
  __device__ const float* scores_of(int row, int head) const {
    const int64_t list = leader_ + row * view_.num_kv_heads;
    return step_.block_lse + (list * view_.group + head) * step_.max_blocks;
  }

  // Base 2, of a query head's chunks.
  __device__ float log_sum(int head, int chunks) const {
    constexpr int kChunksAhead = 8;
    const int64_t query_head = static_cast<int64_t>(list_) * view_.group + head;
    const float* lse = step_.chunk_lse + query_head * step_.max_chunks;
    float largest = -INFINITY, sum = 0.0f;
#pragma unroll 1
    for (int start = lane_; start < chunks; start += 32 * kChunksAhead) {
      float chunk[kChunksAhead];
#pragma unroll
      for (int i = 0; i < kChunksAhead; ++i) {
        chunk[i] = start + 32 * i < chunks ? __ldcg(lse + start + 32 * i) * kLog2E : -INFINITY;
      }
      float larger = largest;
#pragma unroll
      for (int i = 0; i < kChunksAhead; ++i) larger = fmaxf(larger, chunk[i]);
      sum *= fast_exp2(largest - larger);
#pragma unroll
      for (int i = 0; i < kChunksAhead; ++i) sum += fast_exp2(chunk[i] - larger);
      largest = larger;
    }
    const float all_largest = warp_max(largest);
    sum = warp_sum(largest > -INFINITY ? sum * exp2f(largest - all_largest) : 0.0f);
    const float shift = all_largest + log2f(sum);
    if (lane_ == 0 && step_.lse != nullptr) step_.lse[query_head] = shift * kLn2;
    return shift;
  }

  __device__ const float* scores() const {
    return step_.block_lse + static_cast<int64_t>(list_) * view_.group * step_.max_blocks;
  }

  // Base-2 logarithms of the masses of some blocks in each query head, kWide side by side from
  // `start` in strides; -infinity for what does not exist. A shift comes from rounded products, so
  // where one block has all of the mass, that may be some 1e-7 times the score off 1.
  __device__ void load_logs(float (&logs)[kBlocks][kTogether], int start, int stride) const {
    const float* row = scores() + start;
#pragma unroll
    for (int h = 0; h < kTogether; ++h, row += step_.max_blocks) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int exist = h < view_.group ? num_blocks_ - start - i * stride : 0;
        load_wide(logs, i * kWide, h, row + i * stride, exist);
      }
    }
#pragma unroll
    for (int h = 0; h < kTogether; ++h) {
      const float shift = !R::kJoint || h < view_.group ? shared_.shift[place_of(h)] : 0.0f;
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) logs[i][h] = fmaf(logs[i][h], kLog2E, -shift);
    }
  }

  // Scores of kWide blocks of which `exist`, with one load where they lie on a vector.
  __device__ void load_wide(float (&logs)[kBlocks][kTogether], int to, int head, const float* from,
                            int exist) const {
    if constexpr (kWide == 4) {
      if (exist >= kWide && vectors()) {
        const float4 four = __ldcg(reinterpret_cast<const float4*>(from));
        logs[to][head] = four.x;
        logs[to + 1][head] = four.y;
        logs[to + 2][head] = four.z;
        logs[to + 3][head] = four.w;
        return;
      }
    }
#pragma unroll
    for (int j = 0; j < kWide; ++j) logs[to + j][head] = j < exist ? __ldcg(from + j) : -INFINITY;
  }

  // Mass of a block for the whole group. The largest is that of the largest logarithm: one power a
  // block, not one a head.
  __device__ float combined(const float (&logs)[kTogether]) const {
    if (R::kSearches && !view_.combine_max) {
      float sum = 0.0f;
#pragma unroll
      for (int h = 0; h < kTogether; ++h) sum += fast_exp2(logs[h]);
      return sum / static_cast<float>(view_.group);
    }
    float largest = logs[0];
#pragma unroll
    for (int h = 1; h < kTogether; ++h) largest = fmaxf(largest, logs[h]);
    return fast_exp2(largest);
  }

  __device__ float head_mass(int head, int block) const {
    const float lse = __ldcg(scores() + (static_cast<unsigned>(head) * step_.max_blocks + block));
    return fast_exp2(fmaf(lse, kLog2E, -shared_.shift[place_of(head)]));
  }

  __device__ bool forced(int block) const {
    return block < view_.sink_blocks || block >= first_recent_;
  }

  // csrc/search.cuh.
  __device__ unsigned long long rank(float mass, int block) const;
  __device__ void find_threshold();
  template <typename Visit>
  __device__ void each_mass(const Visit& visit);
  __device__ int count_digits(int shift, unsigned long long prefix);

  // A warp has a contiguous share of a segment's words, 32 blocks each: kWide of them at a time.
  // It is one of some warps.
  struct Share {
    int words, begin, end;
  };
  __device__ Share share(int first_block, int warp, int warps) const {
    constexpr int kUnit = 32 * kWide;
    const int units = (min(most_blocks() - first_block, kSegment) + kUnit - 1) / kUnit;
    const int each = (units + warps - 1) / warps, begin = min(warp * each, units);
    return {units * kWide, begin * kWide, min(begin + each, units) * kWide};
  }
  __device__ Share share(int first_block) const { return share(first_block, warp_, num_warps()); }

  // Set the bits of the blocks of a segment that are kept, where each has a rank to reach.
  __device__ void mark_ranked(int first_block) {
    const Share own = share(first_block);
#pragma unroll 1
    for (int start = own.begin; start < own.end; start += kBlocks) {
      unsigned kept[kAhead] = {};
      find_ranked(kept, first_block + start * 32 + lane_ * kWide);
      set_words(kept, row_, start, own.end);
    }
  }
  // The same of all rows where a query head's score is to reach its limit: csrc/mark.cuh.
  __device__ void mark(int first_block) {
    if (vectors()) {
      mark_heavy<true>(first_block);
    } else {
      mark_heavy<false>(first_block);
    }
  }
  template <bool kVectors>
  __device__ void mark_heavy(int first_block);
  template <bool kVectors>
  __device__ void find_heavy(unsigned (&kept)[kAhead], const float* scores, float4 limits,
                             int heads, int first, int num_blocks, unsigned wanted) const;
  __device__ void force(unsigned (&kept)[kAhead], int first, int2 ends) const;

  // A lane's kWide bits, to their place in a word, of blocks that rank high enough.
  __device__ void find_ranked(unsigned (&kept)[kAhead], int first) const {
    float logs[kBlocks][kTogether];
    load_logs(logs, first, 32 * kWide);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      kept[i] = 0;
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        const int block = first + i * 32 * kWide + j;
        const bool keep =
            block < num_blocks_ && rank(combined(logs[i * kWide + j]), block) >= threshold_;
        kept[i] |= static_cast<unsigned>(keep) << j;
      }
    }
    gather_bits(kept);
  }

  // From a lane's kWide bits to the word of 32 / kWide lanes.
  __device__ void gather_bits(unsigned (&bits)[kAhead]) const {
    constexpr int kLanes = 32 / kWide;
#pragma unroll
    for (unsigned& its : bits) {
      its <<= lane_ % kLanes * kWide;
#pragma unroll
      for (int other = 1; other < kLanes; other *= 2) {
        its |= __shfl_xor_sync(kAllLanes, its, other);
      }
    }
  }

  // `visit` words in the lanes that have them, of a warp's share that ends at `end`.
  template <typename Visit>
  __device__ void for_words(int row, int start, int end, const Visit& visit) {
    constexpr int kLanes = 32 / kWide;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (start + i * kWide >= end || lane_ % kLanes != 0) break;
      visit(i, shared_.kept_words[row][start + i * kWide + lane_ / kLanes]);
    }
  }
  __device__ void set_words(const unsigned (&kept)[kAhead], int row, int start, int end) {
    for_words(row, start, end, [&](int i, unsigned& word) { word = kept[i]; });
  }
  __device__ void add_words(unsigned (&kept)[kAhead], int row, int start, int end) {
    for_words(row, start, end, [&](int i, unsigned& word) { kept[i] |= word; });
  }

  // The mass of a part of the list in each query head of each row: a warp each, such as have
  // nothing to look up where there are some.
  __device__ void cover(int first_block, int count) {
    constexpr int kBlocksAhead = 4;
    const int busy = (count + 31) / 32, idle = num_warps() - busy;
    const int first = idle > 0 ? warp_ - busy : warp_;
    if (first < 0) return;
#pragma unroll 1
    for (int place = first; place < num_rows() * view_.group;
         place += idle > 0 ? idle : num_warps()) {
      const int row = R::kJoint ? place / view_.group : 0;
      const float* scores = scores_of(row, place - row * view_.group) + first_block;
      const float shift = shared_.shift[place];
      float mass = 0.0f;
#pragma unroll 1
      for (int i = lane_; i < count; i += 32 * kBlocksAhead) {
        float logs[kBlocksAhead];
#pragma unroll
        for (int j = 0; j < kBlocksAhead; ++j) {
          const int near = shared_.kept[min(i + 32 * j, count - 1)];
          bool counts = i + 32 * j < count;
          if constexpr (R::kJoint) counts &= shared_.kept_words[row][near / 32] >> near % 32 & 1;
          logs[j] = counts ? __ldcg(scores + near) : -INFINITY;
        }
#pragma unroll
        for (const float log : logs) mass += fast_exp2(fmaf(log, kLog2E, -shift));
      }
      mass = warp_sum(mass);
      if (lane_ == 0) shared_.covered[place] += mass;
    }
  }

  // Bits that are set in a segment, `room` at most; in `place` those before this warp's share.
  __device__ int count_kept(int first_block, int room, int& place) const {
    const Share own = share(first_block);
    int before = 0, total = 0;
#pragma unroll 1
    for (int i = lane_; i < own.words; i += 32) {
      const int count = __popc(listed(i));
      total += count;
      before += i < own.begin ? count : 0;
    }
    place = warp_sum(before);
    return min(warp_sum(total), room);
  }

  // Write a part of the blocks whose bits are set, in ascending order: to memory, and nearer, for
  // the look-up that follows.
  __device__ void write(int first_block, int first_column, int part, int in_part, int place) {
    const Share own = share(first_block);
    int* out = step_.blocks + static_cast<int64_t>(leader_) * step_.columns + first_column + part;
    place -= part;
#pragma unroll 1
    for (int i = own.begin; i < own.end; ++i) {
      const unsigned kept = listed(i);
      const int column = place + __popc(kept & ((1u << lane_) - 1)), near = i * 32 + lane_;
      if (((kept >> lane_) & 1) && column >= 0 && column < in_part) {
        shared_.kept[column] = static_cast<NearBlock>(near);
        int entry = first_block + near;
        if constexpr (R::kJoint) entry |= static_cast<int>(rows_with(i) << kBlockBits);
        out[column] = entry;
      }
      place += __popc(kept);
    }
  }

  // By one warp: the length of a row's list and the covered mass. An empty row has all of its mass.
  // `count`: blocks that the row selected, of `num_blocks`.
  __device__ void finish(int row, int num_blocks, int count, int in_list) const {
    const int list = leader_ + row * view_.num_kv_heads;
    const bool has_head = num_blocks > 0 && lane_ < view_.group;
    const float own = has_head ? shared_.covered[row * view_.group + lane_] : 1.0f;
    if (has_head && step_.dropped != nullptr) {
      step_.dropped[static_cast<int64_t>(list) * view_.group + lane_] =
          count == num_blocks ? 0.0f : fmaxf(1.0f - own, 0.0f);
    }
    const float least = fminf(-warp_max(-own), 1.0f);
    const float mean = warp_sum(has_head ? own : 0.0f) / static_cast<float>(view_.group);
    if (lane_ != 0) return;
    const float mass = view_.combine_max || num_blocks == 0 ? least : fminf(mean, 1.0f);
    step_.counts[list] = in_list;
    step_.mass[list] = mass;
    if (num_blocks == 0) return;
    const float log10 = log2f(fmaxf(1.0f - mass, 1e-30f)) * 0.30102999566f;
    const int bucket = static_cast<int>(ceilf((log10 + 4.0f) * ((kDroppedBuckets - 1) / 4.0f)));
    atomicAdd(view_.counters + kLists, 1ull);
    atomicAdd(view_.counters + kSelected, static_cast<Word>(count));
    atomicAdd(view_.counters + kFirstDroppedBucket + min(max(bucket, 0), kDroppedBuckets - 1),
              1ull);
  }

  const LayerView& view_;
  const Step& step_;
  SelectShared<R>& shared_;
  int list_, num_blocks_;  // of the row that is looked at
  const int lane_, warp_;
  // Where several rows have one list: whose it is, and which of them is looked at.
  const int leader_, rows_, num_tokens_;
  int row_ = 0;
  int first_recent_;
  float mass_threshold_;              // of a request of this length
  unsigned long long threshold_ = 0;  // rank of the last block kept
  bool cached_ = false;               // the masses lie in shared memory
};

}  // namespace kcache

#include "joint.cuh"
#include "mark.cuh"
#include "search.cuh"
