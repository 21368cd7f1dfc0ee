// SPDX-License-Identifier: Apache-2.0
// How the tiles of all lists are dealt to thread blocks, where several rows have one list: as many
// that follow each other to each, so that all end at the same time whatever the lengths of lists. A
// thread block may have parts of two lists, and whole ones between.
#pragma once

#include "layer_view.h"
#include "spans.cuh"
#include "tile.cuh"
#include "warp.cuh"

namespace kcache {

struct SharesShared {
  int of_warps[32];  // tiles of the lists that each warp looks at
  int list, before;
};

// Of a list, the tiles that a thread block takes. `rows`: of the batch, that have the list.
struct Part {
  int list, rows;
  int number, of;  // of the thread blocks that have some of the list
  int begin, end;  // tiles
};

__device__ inline int tiles_of(const LayerView& view, int count) {
  return (count * view.block_tokens + kTileTokens - 1) / kTileTokens;
}

// A thread block's way through its tiles, list by list. All threads must call each of these.
class Share {
 public:
  __device__ Share(const LayerView& view, const Step& step, SharesShared& shared, int least_tiles)
      : view_(view), step_(step), num_rows_(step.num_lists / view.num_kv_heads) {
    const int threads = static_cast<int>(blockDim.x), lane = static_cast<int>(threadIdx.x & 31);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int of_thread = (step.num_lists + threads - 1) / threads;
    const int first = min(static_cast<int>(threadIdx.x) * of_thread, step.num_lists);
    const int last = min(first + of_thread, step.num_lists);
    int own = 0;
#pragma unroll 4
    for (int list = first; list < last; ++list) own += tiles_of_list(list);
    const int upto = warp_inclusive(own, lane);
    if (lane == 31) shared.of_warps[warp] = upto;
    __syncthreads();
    before_ = upto - own;
    int all = 0;
    for (int other = 0; other < threads / 32; ++other) {
      const int its = shared.of_warps[other];
      before_ += other < warp ? its : 0;
      all += its;
    }
    const int blocks = static_cast<int>(gridDim.x);
    each_ = max((all + blocks - 1) / blocks, least_tiles);
    begin_ = static_cast<int>(blockIdx.x) * each_;
    end_ = min(begin_ + each_, all);
    if (before_ <= begin_ && begin_ < before_ + own) {
      int list = first;
      for (int its; before_ + (its = tiles_of_list(list)) <= begin_; ++list) before_ += its;
      shared.list = list;
      shared.before = before_;
    }
    __syncthreads();
    list_ = begin_ < all ? shared.list : -1;
    before_ = begin_ < all ? shared.before : end_;
    if (list_ >= 0) look();
  }

  __device__ bool is_at_end() const { return before_ >= end_; }
  // What it has of the list that it is at.
  __device__ Part part() const {
    const int first = before_ / each_, last = (before_ + tiles_ - 1) / each_;
    return {list_,
            rows_,
            static_cast<int>(blockIdx.x) - first,
            last - first + 1,
            max(begin_ - before_, 0),
            min(end_ - before_, tiles_)};
  }
  __device__ int count() const { return count_; }
  __device__ int row() const { return list_ / view_.num_kv_heads; }
  __device__ void go_on() {
    before_ += tiles_;
    // Of a row's lists the last: then the next row that leads some follows the rows of this one.
    const bool last_of_row = (list_ + 1) % view_.num_kv_heads == 0;
    list_ += last_of_row ? 1 + (rows_ - 1) * view_.num_kv_heads : 1;
    if (!is_at_end()) look();
  }

 private:
  // A list of nothing counts as one tile, so that a thread block comes to it.
  __device__ int tiles_of_list(int list) const {
    const int row = list / view_.num_kv_heads, count = step_.counts[list];
    const bool leads = rows_led(step_.spans[row], row, step_.together, num_rows_) > 0;
    return leads ? max(tiles_of(view_, count), 1) : 0;
  }
  __device__ void look() {
    const int row = list_ / view_.num_kv_heads;
    rows_ = rows_led(step_.spans[row], row, step_.together, num_rows_);
    count_ = step_.counts[list_];
    tiles_ = max(tiles_of(view_, count_), 1);
  }

  const LayerView& view_;
  const Step& step_;
  const int num_rows_;
  int each_, begin_, end_;  // of all tiles
  int list_, rows_, count_, tiles_, before_;
};

}  // namespace kcache
