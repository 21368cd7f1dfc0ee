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
  if (min(span.x, row) % together != 0) return 0;
  return min(min(span.y + 1, together), num_rows - row);
}

struct Led {
  int row, rows;
};

// The `number`-th row that leads some, and how many; without one 0 of them. Every lane of a warp
// must call it.
__device__ inline Led find_led(const Step& step, int num_rows, int number) {
  const int lane = static_cast<int>(threadIdx.x & 31);
#pragma unroll 1
  for (int first = 0; first < num_rows; first += 32) {
    const int row = first + lane;
    const int rows = row < num_rows ? rows_led(step.spans[row], row, step.together, num_rows) : 0;
    const unsigned leading = __ballot_sync(kAllLanes, rows > 0);
    if (number < __popc(leading)) {
      const bool is_it = rows > 0 && __popc(leading & ((1u << lane) - 1)) == number;
      const int its = __ffs(__ballot_sync(kAllLanes, is_it)) - 1;
      return {first + its, __shfl_sync(kAllLanes, rows, its)};
    }
    number -= __popc(leading);
  }
  return {0, 0};
}

}  // namespace kcache
