// SPDX-License-Identifier: Apache-2.0
// What the kernels are given, in types that host and device code share. The words of the state
// tensors are those of vllm_kcache/cache/hot_cache.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace kcache {

// Words of HotCache.state.
constexpr int kHand = 0, kEpoch = 1, kFirstMissCount = 2, kMaxWaves = 16;
constexpr int kEnded = kFirstMissCount + kMaxWaves, kWanted = kEnded + 1;
constexpr int kMissed = kWanted + 1, kExisting = kMissed + 1, kStateWords = kExisting + 1;
// Words of HotCache.counters.
constexpr int kLists = 0, kSelected = 1, kHits = 2, kMisses = 3, kDirect = 4;
constexpr int kFirstDroppedBucket = 8, kDroppedBuckets = 16;
constexpr int kCounterWords = kFirstDroppedBucket + kDroppedBuckets;

constexpr int kMaxGroup = 16;      // query heads of a KV head
constexpr int kMaxBlocks = 49152;  // V blocks of a request

using Word = unsigned long long;
constexpr Word kEmptySlot = ~0ull;  // a slot that holds nothing

struct Residency {
  int* table;       // slot of each physical V block of each layer, or -1
  Word* slot_word;  // owner (upper half) and epoch of the last use (lower half) of each slot
  int* state;
  unsigned num_slots;
};

struct SelectArgs {
  const float* block_lse;  // [B, Hq, P]
  const float* chunk_lse;  // [B, Hq, C] of each chunk of blocks; null: to be had from block_lse
  const int* seq_lens;     // [B]
  int* blocks;             // [B, Hkv, N]
  int* counts;             // [B, Hkv]
  float* mass;             // [B, Hkv]
  float* lse;              // [B, Hq] log-sum-exp over the request; null: not written
  Word* counters;          // null: not counted
  int v_block_tokens, group, num_kv_heads, max_blocks, columns;
  int max_chunks, chunk_blocks;  // C, and blocks of a chunk
  int top_n;                     // -1: no cap
  float coverage;                // negative: none
  float mass_threshold;          // every block of at least this mass; negative: no such rule
  int sink_blocks, recent_tokens;
  bool combine_max;
  bool pad;  // write -1 past the end of each list; nothing here reads it
};

struct FetchArgs {
  Residency cache;         // used when hot
  const int* block_table;  // [B, MB]
  const char* v_pool;      // rows of physical V blocks, mapped host memory
  char* v_rows;            // slots, or staging rows
  int* rows;               // [B, Hkv, N]
  int2* miss_list;  // (physical V block, slot) of each miss; null: copied by the thread block
  int* miss_count;  // length of miss_list
  Word* counters;   // null: not counted
  int64_t table_stride, layer_rows, num_rows;
  int blocks_per_page, num_kv_heads, columns, row_bytes;
  unsigned epochs_ahead;  // epoch of this call, from that in `cache.state`
  bool hot;
  bool pad;  // write -1 past the end of each list; nothing here reads it
};

// Lists whose scores another kernel is still writing.
struct FollowArgs {
  int* parts_scored;  // [B * Hkv] programs of the score kernel that are done with a list
  int parts;          // all of a list's
  int num_lists;
  int least;  // thread blocks that work however little there is to fetch
};

}  // namespace kcache
