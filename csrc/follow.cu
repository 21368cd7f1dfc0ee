// SPDX-License-Identifier: Apache-2.0
// Select and fetch list by list, beside the kernel that scores them. Definitions:
// vllm_kcache/reference/select.py and fetch.py.
#include "fetch.cuh"
#include "launch.h"
#include "ptx.cuh"
#include "select.cuh"

namespace kcache {
namespace {

// With 256, each list takes longer: no faster at any size (docs/benchmarks.md, overlap).
constexpr int kFollowThreads = 512;
// Some hundred times the longest step there is: whoever waits longer waits for nothing.
constexpr long long kPatienceNs = 20'000'000'000;
constexpr unsigned kPauseNs = 100;

// Wait until all parts of a list are scored, and make its count ready for the next step.
__device__ inline void wait_for_scores(const FollowArgs& follow, int list) {
  if (threadIdx.x == 0) {
    int* scored = follow.parts_scored + list;
    if (load_acquire(scored) < follow.parts) {
      const long long begin = now_ns();
      while (load_acquire(scored) < follow.parts) {
        __nanosleep(kPauseNs);
        // An error that ends the process is better than a GPU that never comes back.
        if (now_ns() - begin > kPatienceNs) __trap();
      }
    }
    *scored = 0;
  }
  __syncthreads();
}

// GPU memory moves some 56 times the bytes that the link moves: where this times the misses is the
// number of V blocks, fetching takes as long as scoring.
constexpr float kLinkFactor = 56.0f;

// Thread blocks for the next epoch: each takes room from scoring, and few fetch as fast as the link
// where little is missing. What this epoch missed is the best guess, since steps and layers are
// alike.
__device__ inline int next_wanted(const FollowArgs& follow, int missed, int existing) {
  const float share = fminf(
      1.0f, kLinkFactor * static_cast<float>(missed) / fmaxf(1.0f, static_cast<float>(existing)));
  return follow.least +
         static_cast<int>(share * (static_cast<int>(gridDim.x) - follow.least) + 0.5f);
}

// Lists are scored in ascending order, so a thread block that takes every n-th seldom waits.
template <int kRule>
__global__ void __launch_bounds__(kFollowThreads, 2)
    follow_kernel(const __grid_constant__ SelectArgs select,
                  const __grid_constant__ FetchArgs fetch,
                  const __grid_constant__ FollowArgs follow) {
  extern __shared__ float dynamic[];
  __shared__ union Shared {
    SelectShared select;
    FetchShared fetch;
  } shared;
  int* state = fetch.cache.state;
  const int wanted = state[kWanted];
  const int working =
      wanted > 0 ? min(wanted, static_cast<int>(gridDim.x)) : static_cast<int>(gridDim.x);
  const int first = static_cast<int>(blockIdx.x);
  int missed = 0, existing = 0;
  for (int list = first; first < working && list < follow.num_lists; list += working) {
    wait_for_scores(follow, list);
    const int request = list / select.num_kv_heads, head = list % select.num_kv_heads;
    const List<NearBlock> blocks =
        select_list<kFollowThreads, kRule>(select, shared.select, dynamic, request, head);
    fetch_list<kFollowThreads>(fetch, shared.fetch, blocks, request, head);
    missed += shared.fetch.misses_total + shared.fetch.direct;
    existing += (select.seq_lens[request] + select.v_block_tokens - 1) / select.v_block_tokens;
  }
  // The last one out, of those without work too, begins the next epoch: none of the others reads
  // the state any more.
  if (threadIdx.x == 0) {
    atomicAdd(state + kMissed, missed);
    atomicAdd(state + kExisting, existing);
    __threadfence();
    if (atomicAdd(state + kEnded, 1) == static_cast<int>(gridDim.x) - 1) {
      __threadfence();
      state[kWanted] =
          next_wanted(follow, load_acquire(state + kMissed), load_acquire(state + kExisting));
      state[kMissed] = state[kExisting] = state[kEnded] = 0;
      state[kEpoch] += 1;
    }
  }
}

template <int kRule>
cudaError_t launch(const SelectArgs& select, const FetchArgs& fetch, const FollowArgs& follow,
                   int num_blocks, cudaStream_t stream) {
  const size_t shared_bytes = list_shared_bytes<kRule>(select);
  if (shared_bytes > 32 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(follow_kernel<kRule>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  follow_kernel<kRule><<<num_blocks, kFollowThreads, shared_bytes, stream>>>(select, fetch, follow);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_follow(const SelectArgs& select, const FetchArgs& fetch,
                          const FollowArgs& follow, int num_blocks, cudaStream_t stream) {
  return with_rule(
      select, [&](auto rule) { return launch<rule()>(select, fetch, follow, num_blocks, stream); });
}

}  // namespace kcache
