// SPDX-License-Identifier: Apache-2.0
#include "dependent.cuh"
#include "launch.h"
#include "list.cuh"
#include "spans.cuh"

namespace kcache {
namespace {

constexpr int kLeastBlocks = 2;

// One thread block for each list. With kFetches it fetches too: that saves a launch and reading the
// list again.
template <typename R, bool kFetches>
__global__ void __launch_bounds__(kMostThreads, kLeastBlocks)
    select_kernel(const __grid_constant__ LayerView view, const __grid_constant__ Step step) {
  __shared__ ListShared<R> shared;
  __shared__ bool done;
  const int list = static_cast<int>(blockIdx.x);
  // Reads the length, which no launch of a step writes.
  ListSelection<R> selection(view, step, shared.select, list);
  wait_for_launch_before();
  let_next_launch_begin();
  if (step.lists != nullptr) {
    if (threadIdx.x == 0) {
      done = step.lists[list] == kDone;
      step.lists[list] = 0;  // for the next step
    }
    __syncthreads();
    if (done) return;
  }
  if constexpr (kFetches) {
    select_and_fetch_list(view, step, shared, selection, list);
  } else {
    const int count = selection.run([](auto...) {});
    pad(step.blocks, count, step.columns);
  }
}

// A thread block for each list that rows have together, with some to spare where rows of requests
// of fewer tokens come beside the others: those take turns.
template <typename R>
__global__ void __launch_bounds__(kMostThreads, kLeastBlocks)
    joint_select_kernel(const __grid_constant__ LayerView view, const __grid_constant__ Step step) {
  __shared__ ListShared<R> shared;
  __shared__ bool more;
  const int head = static_cast<int>(blockIdx.x), num_rows = step.num_lists / view.num_kv_heads;
#pragma unroll 1
  for (int number = static_cast<int>(blockIdx.y);; number += static_cast<int>(gridDim.y)) {
    // Reads the spans and lengths, which no launch of a step writes.
    const Led led = find_led(step.spans, step.together, num_rows, number);
    const int list = led.row * view.num_kv_heads + head;
    ListSelection<R> selection(view, step, shared.select, list, max(led.rows, 1));
    wait_for_launch_before();
    let_next_launch_begin();
    if (led.rows == 0) break;
    if (threadIdx.x == 0) more = led.after >= static_cast<int>(gridDim.y);
    select_and_fetch_list(view, step, shared, selection, list);
    if (!more) break;
    __syncthreads();
  }
}

cudaError_t launch_joint(const LayerView& view, const Step& step, int multiprocessors,
                         bool dependent, cudaStream_t stream) {
  const int num_rows = step.num_lists / view.num_kv_heads;
  const dim3 grid(view.num_kv_heads, (num_rows + step.together - 1) / step.together);
  const bool more_than_a_wave = static_cast<int>(grid.x * grid.y) > kLeastBlocks * multiprocessors;
  const int threads = more_than_a_wave ? kMostThreads / 2 : kMostThreads;
  return with_joint_rule(view, [&](auto rule) {
    return launch_kernel(dependent, joint_select_kernel<decltype(rule)>, grid, threads, stream,
                         view, step);
  });
}

}  // namespace

cudaError_t launch_select(const LayerView& view, const Step& step, bool dependent,
                          cudaStream_t stream) {
  int device, multiprocessors;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return error;
  if (step.together > 1) return launch_joint(view, step, multiprocessors, dependent, stream);
  // Two waves of lists take longer than one of slower lists.
  const bool more_than_a_wave = step.num_lists > kLeastBlocks * multiprocessors;
  const int threads = more_than_a_wave ? kMostThreads / 2 : kMostThreads;
  return with_rule(view, [&](auto rule) {
    const auto launch = [&](auto kernel) {
      return launch_kernel(dependent, kernel, step.num_lists, threads, stream, view, step);
    };
    return step.rows != nullptr ? launch(select_kernel<decltype(rule), true>)
                                : launch(select_kernel<decltype(rule), false>);
  });
}

}  // namespace kcache
