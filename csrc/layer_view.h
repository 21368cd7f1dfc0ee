// SPDX-License-Identifier: Apache-2.0
// What the kernels are given, in types that host and device code share: a layer, which stays as it
// is, and a step. The words of the state tensors are those of vllm_kcache/cache/hot_cache.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace kcache {

// Words of HotCache.state.
constexpr int kHand = 0, kEpoch = 1, kScored = 2, kEnded = 3, kWanted = 4, kMissed = 5,
              kExisting = 6, kRestUntil = 7, kStateWords = 8;
// Words of HotCache.counters.
constexpr int kLists = 0, kSelected = 1, kHits = 2, kMisses = 3, kDirect = 4;
constexpr int kFirstDroppedBucket = 8, kDroppedBuckets = 16;
constexpr int kFirstEstimateBucket = 24, kEstimateBuckets = 10;
constexpr int kCounterWords = kFirstEstimateBucket + kEstimateBuckets;

constexpr int kMaxGroup = 16;  // query heads of a KV head
constexpr int kBlockBits = 20;
constexpr int kMaxBlocks = 1 << kBlockBits;  // V blocks of a request
// Tokens of a request that have one list. A place of it is a V block, and above its bits one bit of
// each token that selected it.
constexpr int kMostTogether = 8;
constexpr int kDone = -1;  // in `lists`: selected and fetched

using Word = unsigned long long;
constexpr Word kEmptySlot = ~0ull;  // a slot that holds nothing

// One layer: its rows on the host, the hot cache, and the rule by which V blocks are selected.
struct LayerView {
  uint64_t magic;
  char* host_rows;  // a row of `row_bytes` for each physical V block, mapped host memory
  char* slots;      // [num_slots, row_bytes]
  int* table;       // slot of each physical V block of each layer, or -1
  Word* slot_word;  // owner (upper half) and epoch of the last use (lower half) of each slot
  int* state;
  Word* counters;
  int64_t layer_rows;  // where the layer begins in `table`
  unsigned num_slots;  // 0: every row is read from the host
  int row_bytes, num_kv_heads, group, block_tokens, blocks_per_page;
  int top_n;             // -1: no cap
  float coverage;        // negative: none
  float mass_threshold;  // every block of at least this mass; negative: no such rule
  // Tokens beyond which the threshold falls with the square root of the length; 0: at no length.
  float threshold_length;
  int sink_blocks, recent_tokens;
  bool combine_max;

  // With K codes only; `codes` is null without.
  char* codes;  // pages of [num_kv_heads, S * (Dp / 2 + 4)] bytes: vllm_kcache/reference/codes.py
  int64_t code_page_bytes;  // from one page to the next
  const float* mean;        // [num_kv_heads, D]
  const float* deviation;   // [num_kv_heads, D]
  int page_tokens, head_size;
  float rotation;   // factor of the Hadamard matrix
  int value_bytes;  // of a value of the model's
  bool int8_rows;
};
constexpr uint64_t kLayerMagic = 0x6b63616368650000u + sizeof(LayerView);

// One call: a batch of B requests. A null pointer is an output that the call does not have.
struct Step {
  const int* seq_lens;     // [B]
  const int* block_table;  // [B, MB]
  const float* block_lse;  // [B, Hq, P]
  const float* chunk_lse;  // [B, Hq, C], of each chunk of blocks
  const float* chunk_max;  // [B, Hq, C] no block of the chunk scores more; null where none is known
  int* blocks;             // [B, Hkv, N]
  int* counts;             // [B, Hkv]
  float* mass;             // [B, Hkv]
  float* lse;              // [B, Hq] log-sum-exp over the request
  float* dropped;          // [B, Hq] mass of what is not selected
  int* rows;               // [B, Hkv, N]
  int* lists;  // [B * Hkv] programs of the score kernel that are done with a list, or kDone
  int64_t table_stride;
  int num_lists, max_blocks, max_chunks, chunk_blocks, columns;
  // [B] of each row, the rows of its request before it and after it, side by side; null where each
  // is a request of its own. `together`: most of those that are taken at once. What they share is
  // that of the first of them: its list, which `counts` is the length of, and `rows`.
  const int2* spans;
  int together;
};

// A tensor of the model's dtype, [.., heads, head_size], strided over the first dimension.
enum class Dtype : int { kFloat32, kFloat16, kBFloat16 };
struct Heads {
  char* data;
  int64_t stride;  // bytes
  Dtype dtype;
};

// What a call of `write_rows` stores: WriteRows::parts.
constexpr int kCodes = 1, kRowHost = 2, kRowSlot = 4;

struct WriteRows {
  Heads key, value;
  const int64_t* slot_mapping;  // [num_tokens]; negative: padding
  int64_t num_tokens;
  int64_t allocate_tokens;  // of the first so many, those that begin a row get a slot for it
  bool fills;               // other whole rows get one that holds nothing, while there are such
  int parts;
};

// Runs of tokens of each request.
struct GatherRows {
  const int* page_table;  // [num_requests, MB]
  const int* starts;      // first token, a multiple of a page
  const int* lengths;     // tokens
  const int* first_rows;  // where the run begins in keys and values
  int64_t table_stride;
  int num_requests, max_length;
  Heads keys, values;
};

// A soft cap on scores; none where `most` is 0.
struct SoftCap {
  float most;   // the cap, of base-2 scores
  float slope;  // 2 / cap
};

// Tokens that a warp of the score kernel leaves one sum of.
constexpr int kChunkTokens = 256;

// Scores from codes. `Step` has the rest.
struct ScoreCodes {
  Heads query;         // [B, Hq, D]
  float* transformed;  // [B, Hq, D] q'
  float* bias;         // [B, Hq] scale * (q . mean)
  float scale;
  int splits;         // thread blocks that share a list
  int table_columns;  // of the block table
  bool after_write;
  // [B] of each row, the rows of its request before it and after it, side by side; null where each
  // is a request of its own. `together`: most of those that are scored at once.
  const int2* spans;
  int together;
  SoftCap cap;
};

// Attention over lists of int8 rows. `Step` has the lists.
struct AttendRows {
  const float* query;    // [B, Hq, D] q', as scoring left it
  const float* bias;     // [B, Hq] scale * (q . mean)
  const float* lse;      // [B, Hq] estimated, over the request; for a clip and for sinks
  const float* dropped;  // [B, Hq] estimated mass of what is not selected; for the same
  float* sums;           // [parts, rows of a list, padded D]
  float* weights;        // [parts, rows of a list, 2] largest score and sum of weights
  int* arrivals;         // [B * Hkv], zero between launches
  Heads out;             // [B, Hq, D]
  float scale;
  float clip;         // negative: the selected tokens' weights are made to sum to 1
  float clip_length;  // tokens beyond which the clip falls with the square root of the length
  int splits;         // thread blocks of a list that is long enough; of the launch where several
                      // rows have one list
  int least_tiles;    // 16 tokens each, that are worth a thread block; where several rows have one
                      // list a power of two, and parts have three times as many or more
  int every;          // one launch of so many looks at how far the estimates are off
  SoftCap cap;
  const char* sinks;  // [Hq] learned scores beside those of the tokens; null without
  Dtype sinks_dtype;
};

// Beside a score kernel that adds to `Step::lists`.
struct Follow {
  int splits;  // programs that share a list, where it has chunks for all
  int least;   // thread blocks that work however little there is to fetch
};

}  // namespace kcache
