// SPDX-License-Identifier: Apache-2.0
// How the thread blocks of attention share the lists out among them.
#pragma once

#include "layer_view.h"
#include "tile.cuh"
#include "warp.cuh"

namespace kcache {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

// Of a list, the tiles that a thread block takes at once.
struct Part {
  int list, count;  // V blocks of the list
  int begin, end;   // tiles of the list
  int next;         // tile after the list, through all lists
  int number, of;   // among the list's parts
  int place;        // of the list's first part in the workspace; the others follow it
};

struct RunsShared {
  int of_warps[2][kWarps];
};

// Shares the lists out. Their tiles are numbered through all lists and cut into runs of one length,
// so that the thread blocks are equally long at work however the lists differ; where a run has
// parts of several lists, its thread block takes one after the other. All find the same, from the
// counts.
class Runs {
 public:
  __device__ Runs(const LayerView& view, const Step& step, const AttendRows& attend,
                  RunsShared& shared)
      : counts_(step.counts),
        shift_(shift_of(view.block_tokens)),
        each_((step.num_lists + kThreads - 1) / kThreads),
        begin_(min(static_cast<int>(threadIdx.x) * each_, step.num_lists)),
        end_(min(begin_ + each_, step.num_lists)),
        unit_(1) {
    add_up(own_tiles(), shared.of_warps[0], total_);
    length_ = (total_ + attend.programs - 1) / attend.programs;
    if (length_ <= attend.least_tiles) {
      // Few tiles, and room for more runs: none has parts of two lists.
      length_ = unit_ = attend.least_tiles;
    }
    const int own = own_tiles();
    first_ = add_up(own, shared.of_warps[1], total_);
    last_ = first_ + own;
  }

  __device__ int count() const { return (total_ + length_ - 1) / length_; }
  __device__ int begin(int run) const { return run * length_; }
  __device__ int end(int run) const { return min((run + 1) * length_, total_); }

  // The part of a run that begins with `tile`; to all threads, a barrier later.
  __device__ void find(int run, int tile, Part& found) const {
    if (tile < first_ || tile >= last_) return;
#pragma unroll 1
    for (int list = begin_, first = first_; list < end_; ++list) {
      const int count = counts_[list], next = first + tiles_of(count);
      if (tile < next) {
        const int first_run = first / length_;
        found = {list, count, tile - first, min(next, end(run)) - first, next, run - first_run,
                 (next - 1) / length_ - first_run + 1,
                 // No two parts have the same sum of run and list.
                 first_run + list};
        return;
      }
      first = next;
    }
  }

 private:
  // A list of nothing has one, which gives 0.
  __device__ int tiles_of(int count) const {
    const int tiles = max(((count << shift_) + kTileTokens - 1) / kTileTokens, 1);
    return (tiles + unit_ - 1) / unit_ * unit_;
  }
  __device__ int own_tiles() const {
    int tiles = 0;
#pragma unroll 1
    for (int list = begin_; list < end_; ++list) tiles += tiles_of(counts_[list]);
    return tiles;
  }

  // Sum over the threads before this one; and over all.
  __device__ static int add_up(int value, int (&of_warps)[kWarps], int& total) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int inclusive = warp_inclusive(value, lane);
    if (lane == 31) of_warps[warp] = inclusive;
    __syncthreads();
    int before = 0;
    total = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      before += i < warp ? of_warps[i] : 0;
      total += of_warps[i];
    }
    return before + inclusive - value;
  }

  const int* counts_;
  const int shift_, each_, begin_, end_;  // of the thread: some lists
  int unit_, length_;                     // tiles that a list is rounded up to, and of a run
  int first_, last_, total_;              // tiles of the thread's lists
};

}  // namespace kcache
