// SPDX-License-Identifier: Apache-2.0
// Find the last block that a list keeps, for rules that count blocks or add up masses: the part of
// csrc/select.cuh that the default rule does not need.
//
// A block's rank is one integer: no two blocks are equal. The threshold is found digit by digit,
// from a histogram of the blocks that share all digits before; two or three digits mostly leave one
// block, and equal masses need all.
#pragma once

#include "select.cuh"

namespace kcache {

constexpr unsigned kForcedKey = 0x7f000000u;  // above the bits of any mass
// The bits of a mass lie above these, so that the first digit is its exponent.
constexpr int kPlaceBits = 25, kRankBits = 56;
static_assert(kMaxBlocks <= 1 << kPlaceBits);
constexpr float kFixedPointOne = 1073741824.0f;

__device__ inline unsigned fixed_point(float mass) {
  return static_cast<unsigned>(mass * kFixedPointOne + 0.5f);
}

// The mass's bits, then the lower block.
template <typename R>
__device__ unsigned long long ListSelection<R>::rank(float mass, int block) const {
  const unsigned key = forced(block) ? kForcedKey : __float_as_uint(mass);
  return (static_cast<unsigned long long>(key) << kPlaceBits) | ((1 << kPlaceBits) - 1 - block);
}

// Masses of all blocks.
template <typename R>
template <typename Visit>
__device__ void ListSelection<R>::each_mass(const Visit& visit) {
  if (cached_) {
    for (int block = threadIdx.x; block < num_blocks_; block += num_threads()) {
      visit(block, shared_.masses[block]);
    }
    return;
  }
  const int stride = num_threads() * kWide;
  for (int start = threadIdx.x * kWide; start < num_blocks_; start += stride * kAhead) {
    float logs[kBlocks][kTogether];
    load_logs(logs, start, stride);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const int block = start + i / kWide * stride + i % kWide;
      if (block < num_blocks_) visit(block, combined(logs[i]));
    }
  }
}

// Histogram of a digit over the blocks that share all digits before it: their number, and for a
// coverage their mass in each query head (or the mean). Returns the number of sums.
template <typename R>
__device__ int ListSelection<R>::count_digits(int shift, unsigned long long prefix) {
  SearchShared& search = shared_;
  const int masses = view_.coverage < 0.0f ? 0 : view_.combine_max ? view_.group : 1;
  for (int i = threadIdx.x; i < (1 + masses) * kBins; i += num_threads()) {
    search.histogram[i / kBins][i % kBins] = 0;
  }
  __syncthreads();
  each_mass([&](int block, float mass) {
    const unsigned long long its_rank = rank(mass, block);
    if (its_rank >> (shift + 8) != prefix >> (shift + 8)) return;
    const int digit = static_cast<int>(its_rank >> shift) & (kBins - 1);
    atomicAdd(&search.histogram[0][digit], 1u);
#pragma unroll 4
    for (int sum = 1; sum <= masses; ++sum) {
      if (view_.combine_max) mass = head_mass(sum - 1, block);
      atomicAdd(&search.histogram[sum][digit], fixed_point(mass));
    }
  });
  __syncthreads();
  return 1 + masses;
}

template <typename R>
__device__ void ListSelection<R>::find_threshold() {
  SearchShared& search = shared_;
  const int cap = view_.top_n < 0 ? num_blocks_ : min(view_.top_n, num_blocks_);
  const bool covers = view_.coverage >= 0.0f, by_mass = mass_threshold_ >= 0.0f;
  // Above it or at it, ties included; rank 0 is below everything.
  const unsigned long long heaviest_enough =
      by_mass ? static_cast<unsigned long long>(__float_as_uint(mass_threshold_)) << kPlaceBits : 0;
  threshold_ = heaviest_enough;
  if (cap >= num_blocks_ && !covers) return;

  if (threadIdx.x < kMaxSums) search.above[threadIdx.x] = 0;
  if (threadIdx.x == 0) search.heavy = 0;
  __syncthreads();
  int heavy = 0;
  each_mass([&](int block, float mass) {
    if (num_blocks_ <= kMasses) search.masses[block] = mass;
    heavy += rank(mass, block) >= heaviest_enough;
  });
  cached_ = num_blocks_ <= kMasses;
  if (by_mass) {
    heavy = warp_sum(heavy);
    if (lane_ == 0) atomicAdd(&search.heavy, heavy);
    __syncthreads();
    if (search.heavy <= cap) return;
  }

  const int sinks = min(view_.sink_blocks, num_blocks_);
  const int num_forced = sinks + num_blocks_ - first_recent_ - max(sinks - first_recent_, 0);
  threshold_ = 0;
  for (int shift = kRankBits - 8; shift >= 0; shift -= 8) {
    const int sums = count_digits(shift, threshold_);
    // Each bin to the sum over it and all that ranks higher: a warp a row, a lane eight bins.
    for (int row = warp_; row < sums; row += num_warps()) {
      constexpr int kLaneBins = kBins / 32;
      unsigned* top = &search.histogram[row][kBins - 1 - lane_ * kLaneBins];
      unsigned own = 0;
      for (int i = 0; i < kLaneBins; ++i) own += top[-i];
      unsigned sum = search.above[row] + warp_inclusive(own, lane_) - own;
      for (int i = 0; i < kLaneBins; ++i) top[-i] = sum += top[-i];
    }
    __syncthreads();
    if (shift == kRankBits - 8 && static_cast<int>(threadIdx.x) < sums) {
      search.totals[threadIdx.x] = search.histogram[threadIdx.x][0];
    }
    __syncthreads();
    // The highest digit down to which the blocks suffice. All always do: the cap is no more.
    const auto suffices = [&](int digit) {
      const int count = static_cast<int>(search.histogram[0][digit]);
      if (count >= cap) return true;
      if (!covers || count < num_forced) return false;
      bool covered = true;
      for (int row = 1; row < sums; ++row) {
        covered = covered && static_cast<float>(search.histogram[row][digit]) >=
                                 view_.coverage * static_cast<float>(search.totals[row]);
      }
      return covered;
    };
    const int own = static_cast<int>(threadIdx.x);
    if (own < kBins && suffices(own) && (own == kBins - 1 || !suffices(own + 1))) {
      search.digit = own;
    }
    __syncthreads();
    const int digit = search.digit;
    const auto above = [&](int row) {
      return digit == kBins - 1 ? search.above[row] : search.histogram[row][digit + 1];
    };
    const unsigned in_bin = search.histogram[0][digit] - above(0);
    threshold_ |= static_cast<unsigned long long>(digit) << shift;
    if (in_bin == 1) break;
    const unsigned now_above = own < sums ? above(own) : 0;
    __syncthreads();
    if (own < sums) search.above[own] = now_above;
  }
}

}  // namespace kcache
