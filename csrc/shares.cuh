// SPDX-License-Identifier: Apache-2.0
// How the tiles of lists are dealt to thread blocks. Where several rows have one list a thread
// block has a part of one list, for each part has a beginning and an end that take as long as many
// tiles: lists are cut into parts of one length, the shortest with which every part has a thread
// block.
#pragma once

#include "layer_view.h"
#include "spans.cuh"
#include "tile.cuh"
#include "warp.cuh"

namespace kcache {

// Of a list, the tiles that a thread block takes.
struct Part {
  int row, head, rows;  // of the batch: the first that has the list, its KV head, how many have it
  int first;            // of the parts of all lists, where those of this one begin
  int number, of;       // of the parts of the list
  int begin, end;       // tiles

  __device__ int list(const LayerView& view) const { return row * view.num_kv_heads + head; }
};

// Where each row has its list: of the `splits` thread blocks of a list some have tiles, or one has
// none.
__device__ inline Part part_of(const AttendRows& attend, int row, int head, int first, int number,
                               int tiles) {
  if (tiles <= attend.least_tiles || attend.splits == 1) {
    return {row, head, 1, first, number, 1, 0, tiles};
  }
  const int wanted = (tiles + attend.least_tiles - 1) / attend.least_tiles;
  const int parts = min(wanted, attend.splits);
  const int each = (tiles + parts - 1) / parts, begin = number * each;
  return {row, head, 1, first, number, (tiles + each - 1) / each, begin, min(begin + each, tiles)};
}

// Lengths of parts that are tried, in units: 3, 4, 6, 8, 16, 32 to 512. The last but these: lists
// stay whole.
constexpr int kLengths = 10;

// In shared memory what is the same for all threads, for want of registers.
struct SharesShared {
  int of_warps[8][kLengths + 1];  // parts by their length, of the lists that each warp looks at
  int total;                      // parts of all lists
  Part part;                      // its `rows` are 0 where there is none
  int count, num_tokens;          // V blocks of its list, and tokens of its first row
};

__device__ inline int tiles_of(const LayerView& view, int count) {
  return (count * view.block_tokens + kTileTokens - 1) / kTileTokens;
}

// Of a list of so many tiles. A unit has 2^shift.
__device__ inline int parts_of(int tiles, int length, int shift) {
  const bool threes = length == 0 || length == 2;
  const int doubled = length >= 4 ? length : threes ? length / 2 : length / 2 + 2;
  const unsigned last = static_cast<unsigned>(max(tiles - 1, 0));
  const unsigned units = length == kLengths ? 0 : last >> (shift + doubled);
  return static_cast<int>(threes ? units / 3 : units) + (tiles > 0 ? 1 : 0);
}

// Lists of a row that follow each other, all loaded at once.
struct SomeLists {
  static constexpr int kLists = 8;
  int row, head, rows, num_tokens;  // `head`: the first
  int counts[kLists], tiles[kLists];

  // The `number`-th of those of all rows, so many of each.
  __device__ SomeLists(const LayerView& view, const Step& step, int number, int of_row)
      : row(number / of_row), head((number - row * of_row) * kLists) {
    const int num_rows = step.num_lists / view.num_kv_heads;
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      counts[i] = step.counts[row * view.num_kv_heads + min(head + i, view.num_kv_heads - 1)];
    }
    num_tokens = step.seq_lens[row];
    rows = rows_led(step.spans[row], row, step.together, num_rows);
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      // A list of nothing counts as one tile, so that a thread block comes to it; not of a row
      // that pads the batch.
      const bool leads = rows > 0 && num_tokens > 0 && head + i < view.num_kv_heads;
      tiles[i] = leads ? max(tiles_of(view, counts[i]), 1) : 0;
    }
  }
};

// The `number`-th part of all, in `shared`. All threads; a barrier comes before it and after it.
__device__ inline void find_part(const LayerView& view, const Step& step, SharesShared& shared,
                                 int number, int unit_tiles) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, threads = blockDim.x;
  const int of_row = (view.num_kv_heads + SomeLists::kLists - 1) / SomeLists::kLists;
  const int all = step.num_lists / view.num_kv_heads * of_row, shift = shift_of(unit_tiles);
  int parts[kLengths + 1] = {};
#pragma unroll 1
  for (int some = threadIdx.x; some < all; some += threads) {
    const SomeLists lists(view, step, some, of_row);
#pragma unroll
    for (const int tiles : lists.tiles) {
#pragma unroll
      for (int length = 0; length <= kLengths; ++length) {
        parts[length] += parts_of(tiles, length, shift);
      }
    }
  }
  int sum = 0;
#pragma unroll
  for (int length = 0; length <= kLengths; ++length) {
    const int of_length = warp_sum(parts[length]);
    if (lane == length) sum = of_length;
  }
  if (lane <= kLengths) shared.of_warps[warp][lane] = sum;
  __syncthreads();
  int total = 0;
#pragma unroll 1
  for (int other = 0; lane <= kLengths && other < threads / 32; ++other) {
    total += shared.of_warps[other][lane];
  }
  const unsigned fits = __ballot_sync(
      kAllLanes, lane == kLengths || (lane < kLengths && total <= static_cast<int>(gridDim.x)));
  const int length = __ffs(fits) - 1;
  total = __shfl_sync(kAllLanes, total, length);
  int own = 0;
#pragma unroll
  for (int each = 0; each <= kLengths; ++each) own = each == length ? parts[each] : own;
  int before = warp_inclusive(own, lane) - own;
#pragma unroll 1
  for (int other = 0; other < warp; ++other) before += shared.of_warps[other][length];
  if (threadIdx.x == 0) {
    shared.total = total;
    if (number >= total) shared.part.rows = 0;
  }
  int left = number - before;
  if (left < 0 || left >= own) return;
#pragma unroll 1
  for (int some = threadIdx.x; left >= 0; some += threads) {
    const SomeLists lists(view, step, some, of_row);
    int at = -1, of = 1, place = 0, tiles = 0;
#pragma unroll
    for (int i = 0; i < SomeLists::kLists; ++i) {
      const int its = parts_of(lists.tiles[i], length, shift);
      if (left >= 0 && left < its) {
        at = i;
        of = its;
        place = left;
        tiles = lists.tiles[i];
        shared.count = lists.counts[i];
      }
      left -= its;
    }
    if (at < 0) continue;
    const int each = (tiles + of - 1) / of, begin = place * each;
    shared.part = {lists.row, lists.head + at,         lists.rows, number - place, place, of,
                   begin,     min(begin + each, tiles)};
    shared.num_tokens = lists.num_tokens;
    return;
  }
}

}  // namespace kcache
