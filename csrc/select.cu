// SPDX-License-Identifier: Apache-2.0
#include "dependent.cuh"
#include "fetch.cuh"
#include "launch.h"
#include "select.cuh"

namespace kcache {
namespace {

// One thread block a list. Fetching in the same launch saves one, and the list is at hand.
template <bool kFetch, int kRule>
__global__ void __launch_bounds__(kMaxThreads, 2)
    select_kernel(const __grid_constant__ SelectArgs select,
                  const __grid_constant__ FetchArgs fetch, int first_head) {
  extern __shared__ float dynamic[];
  __shared__ union Shared {
    SelectShared select;
    FetchShared fetch;
  } shared;
  wait_for_launch_before();
  let_next_launch_begin();
  const int head = first_head + blockIdx.x, request = blockIdx.y;
  const List<NearBlock> list =
      select_list<kMaxThreads, kRule>(select, shared.select, dynamic, request, head);
  if constexpr (kFetch) fetch_list<kMaxThreads>(fetch, shared.fetch, list, request, head);
}

template <bool kFetch, int kRule>
cudaError_t launch(const SelectArgs& select, const FetchArgs& fetch, HeadRange range,
                   bool dependent, cudaStream_t stream) {
  const size_t shared_bytes = list_shared_bytes<kRule>(select);
  if (shared_bytes > 32 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(select_kernel<kFetch, kRule>,
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(range.num_heads, range.num_requests);
  return launch_kernel(dependent, select_kernel<kFetch, kRule>, grid, kMaxThreads, shared_bytes,
                       stream, select, fetch, range.first_head);
}

}  // namespace

cudaError_t launch_select(const SelectArgs& select, HeadRange range, cudaStream_t stream) {
  return with_rule(select, [&](auto rule) {
    return launch<false, rule()>(select, FetchArgs{}, range, false, stream);
  });
}

cudaError_t launch_select_fetch(const SelectArgs& select, const FetchArgs& fetch, HeadRange range,
                                bool dependent, cudaStream_t stream) {
  return with_rule(select, [&](auto rule) {
    return launch<true, rule()>(select, fetch, range, dependent, stream);
  });
}

}  // namespace kcache
