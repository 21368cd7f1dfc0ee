// SPDX-License-Identifier: Apache-2.0
#include "fetch.cuh"
#include "launch.h"

namespace kcache {
namespace {

__global__ void __launch_bounds__(kMaxThreads, 2)
    fetch_kernel(const __grid_constant__ FetchArgs fetch, const int* blocks, const int* counts,
                 int first_head) {
  __shared__ FetchShared shared;
  const int head = first_head + blockIdx.x, request = blockIdx.y;
  const int64_t list = static_cast<int64_t>(request) * fetch.num_kv_heads + head;
  fetch_list<kMaxThreads>(fetch, shared, List<int>{blocks + list * fetch.columns, counts[list]},
                          request, head);
}

constexpr int kCopyThreads = 256;

// A warp a row. Some tens of thread blocks keep enough reads in flight to fill the link; more would
// only take multiprocessors from the kernel that runs beside.
__global__ void __launch_bounds__(kCopyThreads)
    copy_misses_kernel(const __grid_constant__ FetchArgs fetch) {
  const int warps = gridDim.x * (kCopyThreads / 32);
  const int count = *fetch.miss_count;
  for (int i = blockIdx.x * (kCopyThreads / 32) + (threadIdx.x >> 5); i < count; i += warps) {
    copy_miss(fetch, fetch.miss_list[i]);
  }
}

}  // namespace

cudaError_t launch_fetch(const FetchArgs& fetch, const int* blocks, const int* counts,
                         HeadRange range, cudaStream_t stream) {
  const dim3 grid(range.num_heads, range.num_requests);
  fetch_kernel<<<grid, kMaxThreads, 0, stream>>>(fetch, blocks, counts, range.first_head);
  return cudaGetLastError();
}

cudaError_t launch_copy_misses(const FetchArgs& fetch, int num_blocks, cudaStream_t stream) {
  copy_misses_kernel<<<num_blocks, kCopyThreads, 0, stream>>>(fetch);
  return cudaGetLastError();
}

}  // namespace kcache
