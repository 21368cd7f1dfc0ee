// SPDX-License-Identifier: Apache-2.0
// The last block that a list keeps, by rank: the part of csrc/select.cuh that finds it with one
// histogram of counts and of masses, which csrc/masses.cuh fills.
#pragma once

#include "rank.cuh"
#include "select.cuh"

namespace kcache {

// Bin of a block: of two blocks in different bins, the one in the lower bin ranks higher. A bin has
// the masses that share their upper bits, 8 to 32 bins for each power of two below 1. What is
// forced is in the bin before them, and the last bin has all that is smaller.
template <int kThreads, bool kCovers>
__device__ int ListSelection<kThreads, kCovers>::rank_bin(float mass, int block) const {
  constexpr int kOneBits = 0x3f800000;
  if (forced(block)) return 0;
  const int below_one = (kOneBits - static_cast<int>(__float_as_uint(mass))) >> rank_shift_;
  return 1 + min(max(below_one, 0), rank_bins_ - 2);
}

// Masses of the blocks that this thread combined, for more query heads than it has in registers.
template <int kThreads, bool kCovers>
__device__ void ListSelection<kThreads, kCovers>::add_masses_of_heads() {
  for (int block = threadIdx.x; block < num_blocks_; block += kThreads) {
    const int bin = rank_bin(masses_[block], block);
#pragma unroll 4
    for (int sum = 0; sum < num_sums_; ++sum) add_mass(sum, bin, head_mass(sum, block));
  }
}

// Find the bin of the last block kept, and all mass of each sum. There always is one: where
// rounding puts the coverage out of reach, the cap, which is all blocks at most, ends it.
template <int kThreads, bool kCovers>
__device__ void ListSelection<kThreads, kCovers>::find_rank_bin() {
  constexpr int kThreadBins = kRankWords / kThreads;
  static_assert(kThreadBins * kThreads == kRankWords && kMaxCandidates <= kThreads);
  const int first_bin = static_cast<int>(threadIdx.x) * kThreadBins;
  const auto of_bin = [&](int row, int i) {
    return first_bin < rank_bins_ ? histogram_[row * rank_bins_ + first_bin + i] : 0u;
  };
  const auto own = [&](int row) {
    unsigned sum = 0;
    for (int i = 0; i < kThreadBins; ++i) sum += of_bin(row, i);
    return sum;
  };
#pragma unroll 1
  for (int row = 0; row <= num_sums_; ++row) {
    const unsigned in_warp = warp_sum(own(row));
    if (lane_ == 0) shared_.warp_sums[row][warp_] = in_warp;
  }
  __syncthreads();
  // Sum over all bins before this thread's.
  const auto before = [&](int row) {
    const unsigned its_own = own(row);
    const int up_to_own = warp_inclusive(static_cast<int>(its_own), lane_);
    return warp_sum(lane_ < warp_ ? shared_.warp_sums[row][lane_] : 0u) +
           static_cast<unsigned>(up_to_own) - its_own;
  };
  bool met_before = true, met[kThreadBins];
  for (int i = 0; i < kThreadBins; ++i) met[i] = true;
#pragma unroll 1
  for (int sum = 0; sum < num_sums_; ++sum) {
    const unsigned total = warp_sum(lane_ < kWarps ? shared_.warp_sums[1 + sum][lane_] : 0u);
    if (threadIdx.x == 0) shared_.totals[sum] = total;
    unsigned mass = before(1 + sum);
    met_before = met_before && covered(total, mass);
    for (int i = 0; i < kThreadBins; ++i) {
      mass += of_bin(1 + sum, i);
      met[i] = met[i] && covered(total, mass);
    }
  }
  int count = static_cast<int>(before(0));
  bool enough_before = enough(count, met_before);
  for (int i = 0; i < kThreadBins; ++i) {
    const int in_bin = static_cast<int>(of_bin(0, i));
    const bool now = enough(count + in_bin, met[i]);
    if (now && !enough_before) {
      shared_.rank_bin = first_bin + i;
      shared_.count_above = count;
      shared_.in_bin = in_bin;
    }
    count += in_bin;
    enough_before = now;
  }
  __syncthreads();
}

// Set the bits of the blocks kept. Returns the mass that a thread marked; which thread marks a
// candidate of a fixed number depends on the schedule, and so does the last bit of their sum.
template <int kThreads, bool kCovers>
__device__ float ListSelection<kThreads, kCovers>::mark_by_rank_bin() {
  if (cover_) add_masses_above();
  auto* candidates = reinterpret_cast<unsigned long long*>(histogram_);
  const int last_bin = shared_.rank_bin, in_bin = shared_.in_bin;
  const int thread = static_cast<int>(threadIdx.x);
  float mass = 0.0f;
  for (int word = first_word(); word < last_word(); ++word) {
    const int block = word * 32 + lane_;
    const int bin = block < num_blocks_ ? rank_bin(masses_[block], block) : rank_bins_;
    const bool keep = block < num_blocks_ && bin < last_bin;
    const unsigned kept = __ballot_sync(kAllLanes, keep);
    if (lane_ == 0) kept_words_[word] = kept;
    if (keep) mass += masses_[block];
    if (block < num_blocks_ && bin == last_bin) {
      candidates[atomicAdd(&shared_.num_candidates, 1)] = rank(block);
    }
  }
  __syncthreads();
  int needed = cap_ - shared_.count_above;
  unsigned long long own = thread < in_bin ? candidates[thread] : 0;
  int place = 0;
  if (cover_ || needed < in_bin) {
    for (int i = 0; thread < in_bin && i < in_bin; ++i) place += candidates[i] > own;
  }
  if (cover_) {
    __syncthreads();
    if (thread < in_bin) candidates[place] = own;
    __syncthreads();
    place = thread;
    own = thread < in_bin ? candidates[thread] : 0;
    needed = candidates_to_cover();
  }
  if (thread >= in_bin || place >= needed) return mass;
  const int block = 0xffff - static_cast<int>(own & 0xffff);
  atomicOr(kept_words_ + block / 32, 1u << (block % 32));
  return mass + masses_[block];
}

// Masses of all bins above the last, before candidates take their place: a warp a sum.
template <int kThreads, bool kCovers>
__device__ void ListSelection<kThreads, kCovers>::add_masses_above() {
  for (int sum = warp_; sum < num_sums_; sum += kWarps) {
    unsigned mass = 0;
    for (int bin = lane_; bin < shared_.rank_bin; bin += 32) {
      mass += histogram_[(1 + sum) * rank_bins_ + bin];
    }
    mass = warp_sum(mass);
    if (lane_ == 0) shared_.above[sum] = mass;
  }
  __syncthreads();
}

// How many of the candidates, which are in order, reach the coverage or the cap.
template <int kThreads, bool kCovers>
__device__ int ListSelection<kThreads, kCovers>::candidates_to_cover() {
  constexpr int kTogether = 4;
  const auto* candidates = reinterpret_cast<const unsigned long long*>(histogram_);
  const int thread = static_cast<int>(threadIdx.x), in_bin = shared_.in_bin;
  const bool live = thread < in_bin;
  const int block = live ? 0xffff - static_cast<int>(candidates[thread] & 0xffff) : 0;
  bool all_met = true;
#pragma unroll 1
  for (int first = 0; first < num_sums_; first += kTogether) {
    unsigned up_to_own[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      up_to_own[i] = 0;
      if (!live || first + i >= num_sums_) continue;
      up_to_own[i] = fixed_point(args_.combine_max ? head_mass(first + i, block) : masses_[block]);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      up_to_own[i] = static_cast<unsigned>(warp_inclusive(static_cast<int>(up_to_own[i]), lane_));
      if (lane_ == 31) shared_.warp_sums[first + i][warp_] = up_to_own[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i >= num_sums_) break;
      const unsigned before = warp_sum(lane_ < warp_ ? shared_.warp_sums[first + i][lane_] : 0u);
      const unsigned mass = shared_.above[first + i] + before + up_to_own[i];
      all_met = all_met && covered(shared_.totals[first + i], mass);
    }
  }
  const bool too_few = live && !enough(shared_.count_above + thread + 1, all_met);
  const unsigned lanes = __ballot_sync(kAllLanes, too_few);
  if (lane_ == 0) shared_.warp_counts[warp_] = __popc(lanes);
  __syncthreads();
  return min(warp_sum(lane_ < kWarps ? shared_.warp_counts[lane_] : 0) + 1, in_bin);
}

}  // namespace kcache
