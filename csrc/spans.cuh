// SPDX-License-Identifier: Apache-2.0
// Rows of a batch that are tokens of one request and are taken together. Who begins where is known
// on the device alone: `DecodeBatch.spans` of vllm_kcache/kernels/workspace.py.
#pragma once

#include "layer_view.h"
#include "warp.cuh"

namespace kcache {

// Rows that `row` leads, itself among them; 0 where another leads it. Of the rows of a request each
// `together`-th leads. Those that lie before the batch belong to another one.
__device__ inline int rows_led(int2 span, int row, int together, int num_rows) {
  if (static_cast<unsigned>(min(span.x, row)) % static_cast<unsigned>(together) != 0) return 0;
  return min(min(span.y + 1, together), num_rows - row);
}

// `after`: of the rows that lead some, at most so many come after this one.
struct Led {
  int row, rows, after;
};

// The `number`-th row that leads some, and how many; without one 0 of them. Every lane of a warp
// must call it: each looks at some rows that follow each other, all loaded at once.
__device__ inline Led find_led(const int2* spans, int together, int num_rows, int number) {
  constexpr int kOfLane = 4;
  const int lane = static_cast<int>(threadIdx.x & 31);
#pragma unroll 1
  for (int first = lane * kOfLane; first - lane * kOfLane < num_rows; first += 32 * kOfLane) {
    int2 span[kOfLane];
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) span[i] = spans[min(first + i, num_rows - 1)];
    int rows[kOfLane], leading = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      rows[i] = rows_led(span[i], first + i, together, num_rows);
      leading += rows[i] > 0;
    }
    const int upto = warp_inclusive(leading, lane);
    const unsigned has_it = __ballot_sync(kAllLanes, number < upto);
    if (has_it != 0) {
      Led led{0, 0, 0};
      int before = upto - leading;
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        if (rows[i] > 0 && before++ == number) led = {first + i, rows[i], 0};
      }
      const int its = __ffs(has_it) - 1, seen = __shfl_sync(kAllLanes, upto, 31);
      const int unseen = max(num_rows - (first - lane * kOfLane) - 32 * kOfLane, 0);
      return {__shfl_sync(kAllLanes, led.row, its), __shfl_sync(kAllLanes, led.rows, its),
              seen - number - 1 + unseen};
    }
    number -= __shfl_sync(kAllLanes, upto, 31);
  }
  return {0, 0, 0};
}

}  // namespace kcache
