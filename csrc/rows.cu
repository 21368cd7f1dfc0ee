// SPDX-License-Identifier: Apache-2.0
// K codes and rows of new tokens (those of decodes: csrc/tokens.cu), and rows back as K and V.
// Definitions: vllm_kcache/reference/{codes,write,full}.py.
#include <algorithm>

#include "dependent.cuh"
#include "launch.h"
#include "rows.cuh"

namespace kcache {
namespace {

constexpr int kWarps = 8;
// Beyond so many warps, a warp looks for pieces among more tokens than one.
constexpr int kManyWarps = 2048;
constexpr int kMostDecodeTokens = 65535;  // of a launch of csrc/tokens.cu, a row of its grid each

// A piece of an int8 row on its way between the host and a warp's registers: k', V and the scales
// of both. Over the link it goes 16 bytes a lane, from one multiple of 128 bytes to the next where
// it is a whole row; the values of one token, a word a lane, would be many small transfers.
template <int kParts>
struct alignas(16) Piece {
  static constexpr int kVectors = 2 * kPieceTokens * (128 * kParts + 2) / 16;
  // Of a lane; up to seven before the first multiple of 128 bytes belong to nobody.
  static constexpr int kOfLane = (kVectors + 7 + 31) / 32;
  uint4 vectors[kVectors];

  // Calls visit(i, vector, row offset) with each vector of a lane, its i-th.
  template <typename Visit>
  __device__ static void visit_vectors(const LayerView& view, const char* row, int first,
                                       const Visit& visit) {
    const RowParts parts(view);
    const int lane = static_cast<int>(threadIdx.x & 31), tokens = piece_tokens(view);
    const int values = tokens * view.head_size / 16, scales = 2 * values;
    const bool whole = tokens == view.block_tokens;
    const int total = whole ? view.row_bytes / 16 : scales + 2;
    const int begin = lane - static_cast<int>(reinterpret_cast<uintptr_t>(row) / 16 % 8);
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int vector = begin + 32 * i;
      if (vector < 0 || vector >= total) continue;
      int at = 16 * vector;
      if (!whole) {
        if (vector < values) {
          at += first * view.head_size;
        } else if (vector < scales) {
          at += parts.values + first * view.head_size - 16 * values;
        } else {
          at = (vector == scales ? parts.key_scales : parts.value_scales) + 2 * first;
        }
      }
      visit(i, vector, at);
    }
  }

  // The words of `token`'s k' (V with `is_value`) and its scale.
  __device__ unsigned* words(const LayerView& view, int token, bool is_value) {
    const int tokens = piece_tokens(view);
    return reinterpret_cast<unsigned*>(vectors) +
           (is_value ? tokens + token : token) * view.head_size / 4;
  }
  __device__ uint16_t& scale(const LayerView& view, int token, bool is_value) {
    const int tokens = piece_tokens(view);
    return reinterpret_cast<uint16_t*>(
        words(view, 2 * tokens, false))[is_value ? tokens + token : token];
  }

  // A token's k' or V, as int8.
  __device__ void quantise(const LayerView& view, const float (&x)[kParts][4], float magnitude,
                           int token, bool is_value) {
    unsigned own[kParts];
    const uint16_t its_scale = quantise_int8(own, x, magnitude);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int first = first_value(part, view.head_size);
      if (first >= 0) words(view, token, is_value)[first / 4] = own[part];
    }
    if ((threadIdx.x & 31) == 0) scale(view, token, is_value) = its_scale;
  }

  // The piece of a row that begins with token `first`. Past the first-level cache, as in
  // copy_heads: it may still have what a slot held before another kernel filled it.
  __device__ void load(const LayerView& view, const char* row, int first) {
    uint4 ahead[kOfLane];
    visit_vectors(view, row, first, [&](int i, int, int at) {
      ahead[i] = __ldcg(reinterpret_cast<const uint4*>(row + at));
    });
    visit_vectors(view, row, first, [&](int i, int vector, int) { vectors[vector] = ahead[i]; });
  }

  // Its tokens from `begin` on, to the row.
  __device__ void store(const LayerView& view, char* row, int first, int begin, int count) {
    const bool all = count == piece_tokens(view);
    const int values = piece_tokens(view) * view.head_size / 16, each = view.head_size / 16;
    visit_vectors(view, row, first, [&](int, int vector, int at) {
      const int in_part = vector < values ? vector : vector - values;
      if (all || (in_part >= begin * each && in_part < (begin + count) * each)) {
        *reinterpret_cast<uint4*>(row + at) = vectors[vector];
      }
    });
    const int lane = static_cast<int>(threadIdx.x & 31), token = begin + lane;
    if (all || lane >= count) return;
    const RowParts parts(view);
    reinterpret_cast<uint16_t*>(row + parts.key_scales)[first + token] = scale(view, token, false);
    reinterpret_cast<uint16_t*>(row + parts.value_scales)[first + token] = scale(view, token, true);
  }
};

// `count` tokens that follow each other in a piece of a row; the first goes to slot `place`. Of K
// and of V kAhead tokens, or vectors, are in flight.
template <int kParts, int kAhead>
__device__ inline void write_run(const LayerView& view, const WriteRows& write,
                                 Piece<kParts>& piece, int64_t token, int64_t place, int count,
                                 int head) {
  const int lane = static_cast<int>(threadIdx.x & 31);
  const unsigned in_pool = static_cast<unsigned>(place), page_tokens = view.page_tokens;
  const int64_t page = in_pool / page_tokens, in_layer = page * view.num_kv_heads + head;
  const int offset = static_cast<int>(in_pool % page_tokens);
  const int64_t row = in_layer * view.blocks_per_page + offset / view.block_tokens;
  const int in_row = offset % view.block_tokens;
  char* targets[2] = {nullptr, nullptr};
  if (write.parts & kRowHost) targets[0] = view.host_rows + row * view.row_bytes;
  // The stamp keeps a slot that is written here from being claimed by another warp.
  const bool in_slot = (write.parts & kRowSlot) && view.num_slots > 0;
  const int64_t owner = view.layer_rows + row;
  const unsigned epoch = epoch_of(view);
  SlotSearch search(view, owner, epoch, in_slot && lane == 0);
  const auto find_target = [&] {
    if (!in_slot) return;
    const int slot = slot_of(view, write, search, owner, epoch, token, in_row, count);
    if (slot >= 0) targets[1] = view.slots + static_cast<int64_t>(slot) * view.row_bytes;
  };
  if (!view.int8_rows) {
    search.read_word();
    search.stamp();
    find_target();
  }
  if (!view.int8_rows && (targets[0] != nullptr || targets[1] != nullptr)) {
    const RowParts parts(view);
    const int each = parts.head_bytes / 16, total = count * each;
#pragma unroll 1
    for (int first = lane; first < total; first += 32 * kAhead) {
      uint4 keys[kAhead], values[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int vector = first + 32 * i, of_run = vector / each;
        if (vector >= total) continue;
        const auto load = [&](const Heads& heads) {
          const char* from = head_of(heads, view.head_size, token + of_run, head);
          return reinterpret_cast<const uint4*>(from)[vector - of_run * each];
        };
        keys[i] = load(write.key);
        values[i] = load(write.value);
      }
      for (char* target : targets) {
        if (target == nullptr) continue;
        uint4* to = reinterpret_cast<uint4*>(target + in_row * parts.head_bytes);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int vector = first + 32 * i;
          if (vector >= total) continue;
          to[vector] = keys[i];
          to[vector + parts.values / 16] = values[i];
        }
      }
    }
  }
  const bool stores_int8 = view.int8_rows && (targets[0] != nullptr || in_slot);
  if (!(write.parts & kCodes) && !stores_int8) return;
  const int begin = in_row % kPieceTokens;  // in the piece
  float keys[kAhead][kParts][4], values[kAhead][kParts][4];
  const auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= count) continue;
      load_head(keys[i], write.key, view.head_size, token + first + i, head);
      if (stores_int8) load_head(values[i], write.value, view.head_size, token + first + i, head);
    }
  };
  load(0);
  Transform<kParts> transform;
  transform.load(view, head);
  transform.invert();
#pragma unroll 1
  for (int first = 0; first < count; first += kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= count) continue;
      transform.apply(view, keys[i]);
      const Range range(keys[i], view.head_size);
      if (write.parts & kCodes) {
        write_code(view, keys[i], range, codes_of(view, page, head), offset + first + i);
      }
      if (!stores_int8) continue;
      // The search goes on between what it does not wait for.
      if (first + i == 0) search.read_word();
      piece.quantise(view, keys[i], range.magnitude(), begin + first + i, false);
      if (first + i == 0) search.stamp();
      piece.quantise(view, values[i], magnitude_of(values[i]), begin + first + i, true);
    }
    if (first + kAhead < count) load(first + kAhead);
  }
  if (!stores_int8) return;
  find_target();
  __syncwarp();
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    char* target = i == 0 ? targets[0] : targets[1];
    if (target != nullptr) piece.store(view, target, in_row - begin, begin, count);
  }
  __syncwarp();  // the next run's piece comes after
}

// A warp stores the runs of one KV head that begin among `window` tokens, kPieceTokens at most.
template <int kParts, int kAhead>
__global__ void __launch_bounds__(32 * kWarps)
    write_kernel(const __grid_constant__ LayerView view, const __grid_constant__ WriteRows write,
                 int window) {
  __shared__ Piece<kParts> pieces[kWarps];
  // In this order: what begins now may take it that all launches before this one have ended.
  wait_for_launch_before();
  let_next_launch_begin();
  const int warp = static_cast<int>(threadIdx.x / 32);
  // In 32 bits, which the binding has checked: a division of 64 takes as long as a load.
  const int tokens = static_cast<int>(write.num_tokens), warps = gridDim.x * kWarps;
  const int items = (tokens + window - 1) / window * view.num_kv_heads;
#pragma unroll 1
  for (int item = blockIdx.x * kWarps + warp; item < items; item += warps) {
    // From the token before the window to the end of the last run.
    const int before = item / view.num_kv_heads * window - 1;
    const Runs runs(view, write, before);
    unsigned begins = runs.begins & ((2u << window) - 2);
#pragma unroll 1
    for (; begins != 0; begins &= begins - 1) {
      const int first = __ffs(static_cast<int>(begins)) - 1;
      write_run<kParts, kAhead>(view, write, pieces[warp], before + first,
                                __shfl_sync(kAllLanes, runs.place, first), runs.tokens(first),
                                item % view.num_kv_heads);
    }
  }
}

// K and V of some tokens of a row, from `first` on, as they are.
__device__ inline void copy_heads(const LayerView& view, const GatherRows& gather, const char* row,
                                  int first, int64_t out_row, int head, int tokens) {
  constexpr int kAhead = 4;
  const RowParts parts(view);
  const int each = parts.head_bytes / 16, total = tokens * each;
  const uint4* from = reinterpret_cast<const uint4*>(row + first * parts.head_bytes);
  for (int begin = threadIdx.x & 31; begin < total; begin += 32 * kAhead) {
    uint4 keys[kAhead], values[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int vector = begin + 32 * i;
      if (vector >= total) continue;
      keys[i] = __ldcg(from + vector);
      values[i] = __ldcg(from + vector + parts.values / 16);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int vector = begin + 32 * i, token = vector / each;
      if (vector >= total) continue;
      const auto store = [&](const Heads& heads, const uint4& what) {
        char* to = head_of(heads, view.head_size, out_row + token, head);
        reinterpret_cast<uint4*>(to)[vector - token * each] = what;
      };
      store(gather.keys, keys[i]);
      store(gather.values, values[i]);
    }
  }
}

// The same of int8 rows, as K and V.
template <int kParts>
__device__ inline void restore_heads(const LayerView& view, const GatherRows& gather,
                                     Piece<kParts>& piece, const char* row, int first,
                                     int64_t out_row, int head, int tokens) {
  piece.load(view, row, first);
  float mean[kParts][4], deviation[kParts][4];
  load_floats(mean, view.mean + head * view.head_size, view.head_size);
  load_floats(deviation, view.deviation + head * view.head_size, view.head_size);
  __syncwarp();
  const auto dequantise = [&](float (&x)[kParts][4], int token, bool is_value) {
    const float scale = halves_to_floats(piece.scale(view, token, is_value)).x;
    const unsigned* words = piece.words(view, token, is_value);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int at = first_value(part, view.head_size);
      const unsigned word = at < 0 ? 0 : words[at / 4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[part][i] = static_cast<float>(static_cast<int8_t>(word >> (8 * i))) * scale;
      }
    }
  };
#pragma unroll 2
  for (int token = 0; token < tokens; ++token) {
    float x[kParts][4];
    dequantise(x, token, false);
    rotate(x, view.head_size, view.rotation);
    for_each(
        x, [&](int part, int i) { x[part][i] = x[part][i] * deviation[part][i] + mean[part][i]; });
    store_head(x, gather.keys, view.head_size, out_row + token, head);
    dequantise(x, token, true);
    store_head(x, gather.values, view.head_size, out_row + token, head);
  }
  __syncwarp();  // the next piece comes after
}

// A warp takes one piece of a row at a time.
template <int kParts>
__global__ void __launch_bounds__(32 * kWarps)
    gather_kernel(const __grid_constant__ LayerView view,
                  const __grid_constant__ GatherRows gather) {
  __shared__ Piece<kParts> pieces[kWarps];
  const int in_piece = piece_tokens(view), warp = static_cast<int>(threadIdx.x / 32);
  const int each = (gather.max_length + in_piece - 1) / in_piece;
  const int64_t total = static_cast<int64_t>(gather.num_requests) * each * view.num_kv_heads;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
#pragma unroll 1
  for (int64_t item = blockIdx.x * kWarps + warp; item < total; item += warps) {
    const int head = static_cast<int>(item % view.num_kv_heads);
    const int64_t of_all = item / view.num_kv_heads;
    const int request = static_cast<int>(of_all / each);
    const int first = static_cast<int>(of_all % each) * in_piece;
    const int tokens = min(in_piece, gather.lengths[request] - first);
    if (tokens <= 0) continue;
    const int token = gather.starts[request] + first, in_row = token % view.block_tokens;
    const int page = gather.page_table[request * gather.table_stride + token / view.page_tokens];
    const int64_t row =
        (static_cast<int64_t>(page) * view.num_kv_heads + head) * view.blocks_per_page +
        token % view.page_tokens / view.block_tokens;
    const int64_t out_row = static_cast<int64_t>(gather.first_rows[request]) + first;
    const auto take = [&](const char* from) {
      if (view.int8_rows) {
        restore_heads(view, gather, pieces[warp], from, in_row, out_row, head, tokens);
      } else {
        copy_heads(view, gather, from, in_row, out_row, head, tokens);
      }
    };
    // GPU memory has many times the link's bandwidth.
    const int64_t owner = view.layer_rows + row;
    const bool is_first = (threadIdx.x & 31) == 0;
    const int slot =
        __shfl_sync(kAllLanes, is_first && view.num_slots > 0 ? find_copied(view, owner) : -1, 0);
    if (slot >= 0) take(view.slots + static_cast<int64_t>(slot) * view.row_bytes);
    const bool there = slot >= 0 && still_holds(view, slot, owner);
    if (__ballot_sync(kAllLanes, !there) != 0) take(view.host_rows + row * view.row_bytes);
  }
}

int blocks_for(int64_t items, int most) {
  const int64_t needed = (items + kWarps - 1) / kWarps;
  return static_cast<int>(std::min<int64_t>(needed, most > 0 ? most : 1 << 30));
}

}  // namespace

cudaError_t launch_write_rows(const LayerView& view, const WriteRows& write, int most_blocks,
                              bool dependent, cudaStream_t stream) {
  // A warp for each row of a prompt.
  const int64_t warps = most_blocks > 0 ? static_cast<int64_t>(most_blocks) * kWarps : kManyWarps;
  const int window = static_cast<int>(
      std::clamp<int64_t>(write.num_tokens * view.num_kv_heads / warps, 1, piece_tokens(view)));
  // Runs of decodes are a token each, or a few.
  const bool of_decodes = write.allocate_tokens >= write.num_tokens;
  if (of_decodes && window == 1 && most_blocks == 0 && write.num_tokens <= kMostDecodeTokens) {
    return launch_write_tokens(view, write, dependent, stream);
  }
  const int64_t items = (write.num_tokens + window - 1) / window * view.num_kv_heads;
  const auto launch = [&](auto kernel) {
    return launch_kernel(dependent, kernel, blocks_for(items, most_blocks), 32 * kWarps, stream,
                         view, write, window);
  };
  return parts_of(view.head_size) == 2 ? launch(write_kernel<2, 1>) : launch(write_kernel<1, 2>);
}

cudaError_t launch_gather_rows(const LayerView& view, const GatherRows& gather, int most_blocks,
                               cudaStream_t stream) {
  const int in_piece = piece_tokens(view);
  const int64_t pieces = (gather.max_length + in_piece - 1) / in_piece;
  const auto launch = [&](auto kernel) {
    return launch_kernel(false, kernel,
                         blocks_for(gather.num_requests * pieces * view.num_kv_heads, most_blocks),
                         32 * kWarps, stream, view, gather);
  };
  return parts_of(view.head_size) == 1 ? launch(gather_kernel<1>) : launch(gather_kernel<2>);
}

}  // namespace kcache
