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

// Of a list, the tiles that a thread block takes. `rows`: of the batch, that have the list.
struct Part {
  int list, rows;
  int number, of;  // of the thread blocks that have some of the list
  int begin, end;  // tiles
};

// In shared memory what is the same for all threads, for want of registers.
struct SharesShared {
  int of_warps[32];      // tiles of the lists that each warp looks at
  int each, begin, end;  // tiles of all lists: of each thread block, and of this one
  int list, before;      // that comes next, and the tiles of those before it
  Part part;
  int count;  // V blocks of its list
};

__device__ inline int tiles_of(const LayerView& view, int count) {
  return (count * view.block_tokens + kTileTokens - 1) / kTileTokens;
}

// Tiles of lists that follow each other, all loaded at once.
struct SomeLists {
  static constexpr int kLists = 8;
  int tiles[kLists];

  __device__ SomeLists(const LayerView& view, const Step& step, int first, int end) {
    int counts[kLists], before[kLists], row = first / view.num_kv_heads;
    int head = first - row * view.num_kv_heads;
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      counts[i] = step.counts[min(first + i, end - 1)];
      before[i] = min(step.spans[min(row, step.num_lists / view.num_kv_heads - 1)].x, row);
      head = head + 1 == view.num_kv_heads ? 0 : head + 1;
      row += head == 0 ? 1 : 0;
    }
    // Quotients by a multiplication: right for numbers below 2^28.
    const unsigned long long inverse = 0xffffffffu / static_cast<unsigned>(step.together) + 1;
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      const int whole = static_cast<int>(static_cast<unsigned>(before[i]) * inverse >> 32);
      const bool leads = before[i] == whole * step.together && first + i < end;
      // A list of nothing counts as one tile, so that a thread block comes to it.
      tiles[i] = leads ? max(tiles_of(view, counts[i]), 1) : 0;
    }
  }
};

// Finds where a thread block begins.
__device__ inline void share_out(const LayerView& view, const Step& step, SharesShared& shared,
                                 int least_tiles) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int of_thread = (step.num_lists + threads - 1) / threads;
  const int first = min(thread * of_thread, step.num_lists);
  const int last = min(first + of_thread, step.num_lists);
  int own = 0, before = 0, all = 0;
#pragma unroll 1
  for (int list = first; list < last; list += SomeLists::kLists) {
    const SomeLists lists(view, step, list, last);
#pragma unroll
    for (const int tiles : lists.tiles) own += tiles;
  }
  const int upto = warp_inclusive(own, thread % 32);
  if (thread % 32 == 31) shared.of_warps[thread / 32] = upto;
  __syncthreads();
  for (int warp = 0; warp < threads / 32; ++warp) {
    before += warp < thread / 32 ? shared.of_warps[warp] : 0;
    all += shared.of_warps[warp];
  }
  before += upto - own;
  const int blocks = static_cast<int>(gridDim.x);
  const int each = max((all + blocks - 1) / blocks, least_tiles);
  const int begin = static_cast<int>(blockIdx.x) * each, end = min(begin + each, all);
  if (thread == 0) {
    shared.each = each;
    shared.begin = begin;
    shared.end = end;
    if (begin >= all) shared.before = end;
  }
  if (before > begin || begin >= before + own) return;
#pragma unroll 1
  for (int list = first; before <= begin; list += SomeLists::kLists) {
    const SomeLists lists(view, step, list, last);
#pragma unroll
    for (int i = 0; i < SomeLists::kLists; ++i) {
      if (before <= begin && begin < before + lists.tiles[i]) {
        shared.list = list + i;
        shared.before = before;
      }
      before += lists.tiles[i];
    }
  }
}

// Goes on to the next list of the thread block's, `shared.part`; false where there is none.
__device__ inline bool next_part(const LayerView& view, const Step& step, SharesShared& shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const int list = shared.list, before = shared.before, each = shared.each;
    shared.part.rows = 0;
    if (before < shared.end) {
      const int row = list / view.num_kv_heads, count = step.counts[list];
      const int num_rows = step.num_lists / view.num_kv_heads;
      const int rows = rows_led(step.spans[row], row, step.together, num_rows);
      const int tiles = max(tiles_of(view, count), 1), first = before / each;
      shared.part = {list,
                     rows,
                     static_cast<int>(blockIdx.x) - first,
                     (before + tiles - 1) / each - first + 1,
                     max(shared.begin - before, 0),
                     min(shared.end - before, tiles)};
      shared.count = count;
      shared.before = before + tiles;
      // After the last list of a row comes the next row that leads some.
      const bool last_of_row = (list + 1) % view.num_kv_heads == 0;
      shared.list = list + 1 + (last_of_row ? (rows - 1) * view.num_kv_heads : 0);
    }
  }
  __syncthreads();
  return shared.part.rows > 0;
}

}  // namespace kcache
