// SPDX-License-Identifier: Apache-2.0
// Look V blocks of one list up in the hot cache with one thread block, and copy what is missing
// from mapped host memory. Definition: vllm_kcache/reference/fetch.py.
#pragma once

#include <cstdint>

#include "residency.cuh"
#include "select.cuh"

namespace kcache {

struct FetchShared {
  int2 misses[kMostThreads];  // physical V block and slot
  int num_misses;
  unsigned hits, copied, direct;
};

// One row with one warp: 16 bytes a lane, four loads in flight before the first store. The host's
// memory is read once, so it need not stay in the caches.
__device__ inline void copy_row(const char* __restrict__ source, char* __restrict__ target,
                                int row_bytes) {
  constexpr int kVectorsAhead = 4;
  const int lane = threadIdx.x & 31, num_vectors = row_bytes / 16;
  const uint4* from = reinterpret_cast<const uint4*>(source);
  uint4* to = reinterpret_cast<uint4*>(target);
#pragma unroll 1  // rows are short
  for (int first = lane; first < num_vectors; first += 32 * kVectorsAhead) {
    uint4 vectors[kVectorsAhead];
#pragma unroll
    for (int i = 0; i < kVectorsAhead; ++i) {
      if (first + 32 * i < num_vectors) vectors[i] = __ldcs(from + first + 32 * i);
    }
#pragma unroll
    for (int i = 0; i < kVectorsAhead; ++i) {
      if (first + 32 * i < num_vectors) to[first + 32 * i] = vectors[i];
    }
  }
}

// One V block a thread: its row, and a place in `misses` where it is to be copied. All threads must
// call it.
__device__ inline void look_up(const LayerView& view, const Step& step, FetchShared& shared,
                               int list, bool live, int block, int column) {
  const int request = list / view.num_kv_heads, head = list % view.num_kv_heads;
  const unsigned epoch = epoch_of(view);
  int64_t physical = 0;
  int row = -1;
  if (live) {
    const int page = step.block_table[request * step.table_stride + block / view.blocks_per_page];
    physical = (static_cast<int64_t>(page) * view.num_kv_heads + head) * view.blocks_per_page +
               block % view.blocks_per_page;
    row = find_slot(view, view.layer_rows + physical, epoch);
  }
  const bool missing = live && row < 0;
  bool shared_slot = false;
  const int claimed =
      claim_slot(view, missing, view.layer_rows + physical, epoch, true, &shared_slot);
  if (missing) row = claimed;
  const bool copies = missing && row >= 0 && !shared_slot;
  const unsigned copying = __ballot_sync(kAllLanes, copies);
  const unsigned hitting = __ballot_sync(kAllLanes, live && (!missing || shared_slot));
  const unsigned reading = __ballot_sync(kAllLanes, missing && row < 0);
  const int lane = threadIdx.x & 31;
  int place = 0;
  if (lane == 0) {
    if (copying) {
      place = atomicAdd(&shared.num_misses, __popc(copying));
      atomicAdd(&shared.copied, __popc(copying));
    }
    if (hitting) atomicAdd(&shared.hits, __popc(hitting));
    if (reading) atomicAdd(&shared.direct, __popc(reading));
  }
  place = __shfl_sync(kAllLanes, place, 0) + __popc(copying & ((1u << lane) - 1));
  if (copies) shared.misses[place] = make_int2(static_cast<int>(physical), row);
  if (live) {
    step.rows[static_cast<int64_t>(list) * step.columns + column] =
        row >= 0 ? row : static_cast<int>(-2 - physical);
  }
}

// By one thread, a barrier before the first part of a list.
__device__ inline void begin_fetch(FetchShared& shared) {
  shared.num_misses = shared.hits = shared.copied = shared.direct = 0;
}

// Fetch the V blocks first_block + blocks[i] to where the rows of columns from first_column say.
template <typename Block>
__device__ inline void fetch_part(const LayerView& view, const Step& step, FetchShared& shared,
                                  int list, const Block* blocks, int count, int first_block,
                                  int first_column) {
#pragma unroll 1
  for (int start = 0; start < count; start += num_threads()) {
    const int i = start + static_cast<int>(threadIdx.x);
    look_up(view, step, shared, list, i < count, i < count ? first_block + blocks[i] : 0,
            first_column + i);
    __syncthreads();
    const int num_misses = shared.num_misses;
#pragma unroll 1
    for (int miss = threadIdx.x / 32; miss < num_misses; miss += num_warps()) {
      const int2 its = shared.misses[miss];
      copy_row(view.host_rows + static_cast<int64_t>(its.x) * view.row_bytes,
               view.slots + static_cast<int64_t>(its.y) * view.row_bytes, view.row_bytes);
    }
    __syncthreads();
    if (threadIdx.x == 0) shared.num_misses = 0;
    __syncthreads();
  }
}

// By one thread, a barrier after the last part. Returns the V blocks that were not found.
__device__ inline int end_fetch(const LayerView& view, const FetchShared& shared) {
  const unsigned hits = shared.hits, copied = shared.copied, direct = shared.direct;
  if (hits) atomicAdd(view.counters + kHits, static_cast<Word>(hits));
  if (copied) atomicAdd(view.counters + kMisses, static_cast<Word>(copied));
  if (direct) atomicAdd(view.counters + kDirect, static_cast<Word>(direct));
  return static_cast<int>(copied + direct);
}

}  // namespace kcache
