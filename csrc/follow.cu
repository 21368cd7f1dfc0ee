// SPDX-License-Identifier: Apache-2.0
// Select and fetch list by list, beside the kernel that scores them. What is left undone here, the
// launch of select.cu after it does, so no wait is unbounded.
#include "launch.h"
#include "list.cuh"

namespace kcache {
namespace {

// A follower gives up when no list is scored for so long: the score kernel does not run beside it.
// Far above any real step, where a list is scored every 10 us; some GPUs' clocks tick in ms.
constexpr long long kPatienceNs = 2'000'000;
// Epochs without followers after that, so that the wait is paid once in some hundred steps.
constexpr unsigned kRestEpochs = 4096;
constexpr unsigned kPauseNs = 100;

// Wait until all parts of a list are scored; false when scoring stands still.
__device__ inline bool wait_for_scores(const LayerView& view, const int* list, int parts) {
  if (load_acquire(list) == parts) return true;
  int scored = load_acquire(view.state + kScored);
  long long since = now_ns();
  while (load_acquire(list) != parts) {
    __nanosleep(kPauseNs);
    const long long now = now_ns();
    const int scored_now = load_acquire(view.state + kScored);
    if (scored_now != scored) {
      scored = scored_now;
      since = now;
    } else if (now - since > kPatienceNs) {
      return false;
    }
  }
  return true;
}

// GPU memory moves some 56 times the bytes that the link moves: where this times the misses is the
// number of V blocks, fetching takes as long as scoring.
constexpr float kLinkFactor = 56.0f;

// Thread blocks for the next epoch: each takes room from scoring, and few fetch as fast as the link
// where little is missing. What this epoch missed is the best guess, since steps and layers are
// alike.
__device__ inline int next_wanted(int least, int missed, int existing) {
  const int most = static_cast<int>(gridDim.x);
  const float share =
      fminf(1.0f, kLinkFactor * static_cast<float>(missed) / static_cast<float>(existing));
  return least + static_cast<int>(share * static_cast<float>(most - least) + 0.5f);
}

// Lists are scored in ascending order, so a thread block that takes every n-th seldom waits.
template <typename R>
__global__ void __launch_bounds__(kMostThreads, 2)
    follow_kernel(const __grid_constant__ LayerView view, const __grid_constant__ Step step,
                  const __grid_constant__ Follow follow) {
  __shared__ ListShared<R> shared;
  __shared__ int working;
  __shared__ bool scored;
  const int most = static_cast<int>(gridDim.x), first = static_cast<int>(blockIdx.x);
  int* state = view.state;
  // One thread reads what another thread block may change as soon as this one has ended.
  if (threadIdx.x == 0) {
    const unsigned to_rest = static_cast<unsigned>(state[kRestUntil]) - epoch_of(view) - 1;
    const int wanted = state[kWanted];
    working = to_rest < kRestEpochs ? 0 : wanted > 0 ? min(wanted, most) : most;
  }
  __syncthreads();
  for (int list = first; first < working && list < step.num_lists; list += working) {
    if (threadIdx.x == 0) {
      const int num_blocks = blocks_of(view, step, list / view.num_kv_heads);
      const int parts =
          min(follow.splits, (num_blocks + step.chunk_blocks - 1) / step.chunk_blocks);
      scored = wait_for_scores(view, step.lists + list, parts);
      if (!scored) state[kRestUntil] = static_cast<int>(epoch_of(view) + kRestEpochs);
    }
    __syncthreads();
    if (!scored) break;
    ListSelection<R> selection(view, step, shared.select, list);
    const int missed = select_and_fetch_list(view, step, shared, selection, list);
    if (threadIdx.x == 0) {
      atomicAdd(state + kMissed, missed);
      atomicAdd(state + kExisting, blocks_of(view, step, list / view.num_kv_heads));
      step.lists[list] = kDone;
    }
  }
  // The last one out, of those without work too, says how many work in the next epoch: none of the
  // others reads the state any more.
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(state + kEnded, 1) == most - 1) {
      __threadfence();
      const int all_existing = load_acquire(state + kExisting);
      if (all_existing > 0) {
        state[kWanted] = next_wanted(follow.least, load_acquire(state + kMissed), all_existing);
      }
      state[kMissed] = state[kExisting] = state[kEnded] = 0;
    }
  }
}

}  // namespace

cudaError_t launch_follow(const LayerView& view, const Step& step, const Follow& follow,
                          int num_blocks, cudaStream_t stream) {
  return with_rule(view, [&](auto rule) {
    follow_kernel<decltype(rule)><<<num_blocks, kMostThreads, 0, stream>>>(view, step, follow);
    return cudaGetLastError();
  });
}

}  // namespace kcache
