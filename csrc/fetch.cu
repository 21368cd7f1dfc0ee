// SPDX-License-Identifier: Apache-2.0
#include "fetch.cuh"
#include "launch.h"

namespace kcache {
namespace {

__global__ void __launch_bounds__(kMostThreads, 2)
    fetch_kernel(const __grid_constant__ LayerView view, const __grid_constant__ Step step) {
  __shared__ FetchShared shared;
  const int list = static_cast<int>(blockIdx.x), count = step.counts[list];
  if (threadIdx.x == 0) begin_fetch(shared);
  __syncthreads();
  fetch_part(view, step, shared, list, step.blocks + static_cast<int64_t>(list) * step.columns,
             count, 0, 0);
  if (threadIdx.x == 0) end_fetch(view, shared);
  pad(step.rows, count, step.columns);
}

}  // namespace

cudaError_t launch_fetch(const LayerView& view, const Step& step, cudaStream_t stream) {
  fetch_kernel<<<step.num_lists, kMostThreads, 0, stream>>>(view, step);
  return cudaGetLastError();
}

}  // namespace kcache
