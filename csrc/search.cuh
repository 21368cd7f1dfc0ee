// SPDX-License-Identifier: Apache-2.0
// The last block that a list keeps, by rank, where one bin of ranks has more blocks than
// csrc/rank_bins.cuh compares: masses that are (nearly) equal, very long lists, hundreds of forced
// blocks of which some have no room, or a number that reaches down to masses below 2^-32.
#pragma once

#include "select.cuh"

namespace kcache {

// Composite of the last block kept, digit by digit.
template <int kThreads, bool kCovers>
__device__ void ListSelection<kThreads, kCovers>::find_threshold() {
  if (threadIdx.x == 0) shared_.count_above = 0;
  if (static_cast<int>(threadIdx.x) < num_sums_) shared_.above[threadIdx.x] = 0;
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
template <int kThreads, bool kCovers>
__device__ void ListSelection<kThreads, kCovers>::count_digits(int shift, int bits) {
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
template <int kThreads, bool kCovers>
__device__ void ListSelection<kThreads, kCovers>::find_digit(int shift) {
  constexpr int kLaneBins = kBins / 32;
  const int top = kBins - 1 - lane_ * kLaneBins;
  int own = 0;
  for (int i = 0; i < kLaneBins; ++i) own += histogram_[top - i];
  const int count = shared_.count_above + warp_inclusive(own, lane_);
  bool all_met = true;
#pragma unroll 1
  for (int sum = 0; sum < num_sums_; ++sum) {
    const unsigned* masses = histogram_ + (1 + sum) * kBins;
    unsigned own_mass = 0;
    for (int i = 0; i < kLaneBins; ++i) own_mass += masses[top - i];
    const unsigned mass = shared_.above[sum] +
                          static_cast<unsigned>(warp_inclusive(static_cast<int>(own_mass), lane_));
    shared_.before[sum][lane_] = mass - own_mass;
    all_met = all_met && covered(shared_.totals[sum], mass);
  }
  const unsigned lanes = __ballot_sync(kAllLanes, enough(count, all_met));
  if (lanes == 0) {  // cannot be: the cap ends it
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
    bool met = true;
#pragma unroll 1
    for (int sum = 0; sum < num_sums_; ++sum) {
      met = met &&
            covered(shared_.totals[sum], shared_.above[sum] + histogram_[(1 + sum) * kBins + bin]);
    }
    if (enough(with_bin, met) || bin == top - (kLaneBins - 1)) break;
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

}  // namespace kcache
