// SPDX-License-Identifier: Apache-2.0
// Look one list up in the hot V cache with one thread block, and copy V blocks from mapped host
// memory. Definition: vllm_kcache/reference/fetch.py.
#pragma once

#include <cstdint>

#include "residency.cuh"
#include "select.cuh"

namespace kcache {

struct FetchShared {
  int2 misses[kMaxThreads];
  int num_misses;
  unsigned hits, misses_total, direct;
};

// One row with one warp: 16 bytes a lane, four loads in flight before the first store. The host's
// memory is read once, so it need not stay in the caches.
__device__ inline void copy_row(const char* __restrict__ source, char* __restrict__ target,
                                int row_bytes) {
  constexpr int kInFlight = 4;
  const int lane = threadIdx.x & 31, num_vectors = row_bytes / 16;
  const uint4* from = reinterpret_cast<const uint4*>(source);
  uint4* to = reinterpret_cast<uint4*>(target);
  for (int first = lane; first < num_vectors; first += 32 * kInFlight) {
    uint4 vectors[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + 32 * i < num_vectors) vectors[i] = __ldcs(from + first + 32 * i);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + 32 * i < num_vectors) to[first + 32 * i] = vectors[i];
    }
  }
}

__device__ inline void copy_miss(const FetchArgs& args, int2 miss) {
  copy_row(args.v_pool + static_cast<int64_t>(miss.x) * args.row_bytes,
           args.v_rows + static_cast<int64_t>(miss.y) * args.row_bytes, args.row_bytes);
}

// Rows of the blocks of a list; -1 in the columns past them.
template <int kThreads, typename Block>
__device__ inline void fetch_list(const FetchArgs& args, FetchShared& shared, List<Block> list,
                                  int request, int head) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t first_place =
      (static_cast<int64_t>(request) * args.num_kv_heads + head) * args.columns;
  const unsigned epoch =
      args.hot ? static_cast<unsigned>(args.cache.state[kEpoch]) + args.epochs_ahead : 0;
  if (threadIdx.x == 0) {
    shared.num_misses = 0;
    shared.hits = shared.misses_total = shared.direct = 0;
  }
  __syncthreads();
  for (int start = 0; start < list.count; start += kThreads) {
    const int column = start + static_cast<int>(threadIdx.x);
    const bool live = column < list.count;
    int64_t physical = 0;
    int row = -1;
    bool missing = live;
    if (live) {
      const int block = list.blocks[column];
      const int page = args.block_table[request * args.table_stride + block / args.blocks_per_page];
      physical = (static_cast<int64_t>(page) * args.num_kv_heads + head) * args.blocks_per_page +
                 block % args.blocks_per_page;
    }
    if (args.hot) {
      if (live) {
        row = find_slot(args.cache, args.layer_rows + physical, epoch);
        missing = row < 0;
      }
      const int claimed = claim_slot(args.cache, missing, args.layer_rows + physical, epoch);
      if (missing) row = claimed;
    } else if (live && first_place + column < args.num_rows) {
      row = static_cast<int>(first_place + column);
    }
    const bool copies = missing && row >= 0;
    const unsigned copying = __ballot_sync(kAllLanes, copies);
    const unsigned hitting = __ballot_sync(kAllLanes, live && !missing);
    const unsigned reading = __ballot_sync(kAllLanes, missing && row < 0);
    int base = 0;
    if (lane == 0) {
      if (args.miss_list != nullptr) {
        if (copying) base = atomicAdd(args.miss_count, __popc(copying));
      } else {
        if (copying) base = atomicAdd(&shared.num_misses, __popc(copying));
      }
      if (hitting) atomicAdd(&shared.hits, __popc(hitting));
      if (copying) atomicAdd(&shared.misses_total, __popc(copying));
      if (reading) atomicAdd(&shared.direct, __popc(reading));
    }
    base = __shfl_sync(kAllLanes, base, 0) + __popc(copying & ((1u << lane) - 1));
    const int2 miss = make_int2(static_cast<int>(physical), row);
    if (copies) {
      if (args.miss_list != nullptr) {
        args.miss_list[base] = miss;
      } else {
        shared.misses[base] = miss;
      }
    }
    if (live) args.rows[first_place + column] = row >= 0 ? row : static_cast<int>(-2 - physical);
    if (args.miss_list == nullptr) {
      __syncthreads();
      const int num_misses = shared.num_misses;
      for (int i = warp; i < num_misses; i += kThreads / 32) copy_miss(args, shared.misses[i]);
      __syncthreads();
      if (threadIdx.x == 0) shared.num_misses = 0;
      __syncthreads();
    }
  }
  if (args.pad) {
    for (int column = list.count + static_cast<int>(threadIdx.x); column < args.columns;
         column += kThreads) {
      args.rows[first_place + column] = -1;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && args.counters != nullptr) {
    if (shared.hits) atomicAdd(args.counters + kHits, static_cast<Word>(shared.hits));
    if (shared.misses_total) {
      atomicAdd(args.counters + kMisses, static_cast<Word>(shared.misses_total));
    }
    if (shared.direct) atomicAdd(args.counters + kDirect, static_cast<Word>(shared.direct));
  }
}

}  // namespace kcache
