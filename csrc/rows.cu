// SPDX-License-Identifier: Apache-2.0
// K codes and rows of new tokens, and rows back as K and V. Definitions:
// vllm_kcache/reference/{codes,write,full}.py.
#include <algorithm>

#include "dependent.cuh"
#include "head.cuh"
#include "launch.h"
#include "residency.cuh"

namespace kcache {
namespace {

constexpr int kWriteWarps = 4, kGatherWarps = 8;
constexpr float kLevels = 15.0f, kInt8Most = 127.0f;
// The least normal float16, and the largest: vllm_kcache/reference/codes.py.
constexpr float kLeastScale = 6.103515625e-5f, kMostHalf = 65504.0f;

__device__ inline unsigned half_scale(float scale) {
  return float_to_half(fminf(fmaxf(scale, kLeastScale), kMostHalf));
}

// Where the parts of a row lie.
struct RowParts {
  int head_bytes, values, key_scales, value_scales;

  __device__ explicit RowParts(const LayerView& view)
      : head_bytes(view.head_size * (view.int8_rows ? 1 : view.value_bytes)),
        values(view.block_tokens * head_bytes),
        key_scales(2 * values),
        value_scales(2 * values + 2 * view.block_tokens) {}
};

// A token's code: 4 bits a value, then scale and zero of all.
template <int kParts>
__device__ inline void write_code(const LayerView& view, const float (&x)[kParts][4], char* head,
                                  int offset) {
  const int lane = threadIdx.x & 31, words = (view.head_size + 31) / 32 * 4;
  float most = -INFINITY, least = INFINITY;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    if (first_value(part, view.head_size) < 0) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      most = fmaxf(most, x[part][i]);
      least = fminf(least, x[part][i]);
    }
  }
  most = warp_max(most);
  least = -warp_max(-least);
  const unsigned zero_bits = float_to_half(fminf(fmaxf(least, -kMostHalf), kMostHalf));
  const unsigned scale_bits = half_scale((most - least) / kLevels);
  const float zero = halves_to_floats(zero_bits).x, scale = halves_to_floats(scale_bits).x;
  unsigned* codes = reinterpret_cast<unsigned*>(head) + offset * words;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    unsigned own = 0;
    if (first_value(part, view.head_size) >= 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float step = rintf((x[part][i] - zero) / scale);
        own |= static_cast<unsigned>(fminf(fmaxf(step, 0.0f), kLevels)) << (8 * i);
      }
    }
    // Low nibbles of a word are of the even lane, high ones of the odd.
    const unsigned other = __shfl_xor_sync(kAllLanes, own, 1);
    const int word = part * 16 + lane / 2;
    if (lane % 2 == 0 && word < words) codes[word] = own | other << 4;
  }
  if (lane == 0) {
    unsigned* scales = reinterpret_cast<unsigned*>(head) + view.page_tokens * words;
    scales[offset] = scale_bits | zero_bits << 16;
  }
}

// Four values of each part as int8, and the bits of their scale.
template <int kParts>
__device__ inline unsigned quantise_int8(const float (&x)[kParts][4], unsigned (&words)[kParts]) {
  float most = 0.0f;
  for_each(x, [&](int part, int i) { most = fmaxf(most, fabsf(x[part][i])); });
  const unsigned bits = half_scale(warp_max(most) / kInt8Most);
  const float scale = halves_to_floats(bits).x;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    words[part] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = fminf(fmaxf(rintf(x[part][i] / scale), -kInt8Most), kInt8Most);
      words[part] |= (static_cast<unsigned>(static_cast<int>(value)) & 255u) << (8 * i);
    }
  }
  return bits;
}

template <int kParts>
__device__ inline void store_int8(const LayerView& view, const unsigned (&words)[kParts],
                                  unsigned scale, char* row, int values, int scales, int token) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int first = first_value(part, view.head_size);
    if (first < 0) continue;
    *reinterpret_cast<unsigned*>(row + values + token * view.head_size + first) = words[part];
  }
  if ((threadIdx.x & 31) == 0) {
    reinterpret_cast<uint16_t*>(row + scales)[token] = static_cast<uint16_t>(scale);
  }
}

// The slot that holds a row, taken for it where it is to be; -1 without. In every lane.
__device__ inline int slot_of(const LayerView& view, int64_t owner, bool allocates) {
  const unsigned epoch = epoch_of(view);
  const bool first = (threadIdx.x & 31) == 0;
  // The stamp keeps a slot that is written here from being claimed by another warp.
  const int found = first ? find_slot(view, owner, epoch) : -1;
  const int claimed = claim_slot(view, first && allocates && found < 0, owner, epoch);
  return __shfl_sync(kAllLanes, found >= 0 ? found : claimed, 0);
}

template <int kParts>
__device__ inline void write_token(const LayerView& view, const WriteRows& write, int64_t token,
                                   int head) {
  const int64_t place = write.slot_mapping[token];
  if (place < 0) return;
  const int lane = threadIdx.x & 31;
  const int64_t page = place / view.page_tokens, in_layer = page * view.num_kv_heads + head;
  const int offset = static_cast<int>(place - page * view.page_tokens);
  const int64_t row = in_layer * view.blocks_per_page + offset / view.block_tokens;
  const int in_row = offset % view.block_tokens;
  char* targets[2] = {nullptr, nullptr};
  if (write.parts & kRowHost) targets[0] = view.host_rows + row * view.row_bytes;
  if ((write.parts & kRowSlot) && view.num_slots > 0) {
    const int slot =
        slot_of(view, view.layer_rows + row, in_row == 0 && token < write.allocate_tokens);
    if (slot >= 0) targets[1] = view.slots + static_cast<int64_t>(slot) * view.row_bytes;
  }
  const bool has_row = targets[0] != nullptr || targets[1] != nullptr;
  const RowParts parts(view);
  if (has_row && !view.int8_rows) {
    const auto* key =
        reinterpret_cast<const uint4*>(head_of(write.key, view.head_size, token, head));
    const auto* value =
        reinterpret_cast<const uint4*>(head_of(write.value, view.head_size, token, head));
    for (int i = lane; i < parts.head_bytes / 16; i += 32) {
      const uint4 own_key = key[i], own_value = value[i];
      for (char* target : targets) {
        if (target == nullptr) continue;
        char* to = target + in_row * parts.head_bytes;
        reinterpret_cast<uint4*>(to)[i] = own_key;
        reinterpret_cast<uint4*>(to + parts.values)[i] = own_value;
      }
    }
  }
  if (!(write.parts & kCodes) && !(has_row && view.int8_rows)) return;
  float x[kParts][4], mean[kParts][4], deviation[kParts][4];
  load_head(x, write.key, view.head_size, token, head);
  load_floats(mean, view.mean + head * view.head_size, view.head_size);
  load_floats(deviation, view.deviation + head * view.head_size, view.head_size);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    if (first_value(part, view.head_size) < 0) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) x[part][i] = (x[part][i] - mean[part][i]) / deviation[part][i];
  }
  rotate(x, view.head_size, view.rotation);
  if (write.parts & kCodes) {
    const int64_t head_bytes =
        static_cast<int64_t>(view.page_tokens) * ((view.head_size + 31) / 32 * 16 + 4);
    write_code(view, x, view.codes + page * view.code_page_bytes + head * head_bytes, offset);
  }
  if (!has_row || !view.int8_rows) return;
  float value[kParts][4];
  load_head(value, write.value, view.head_size, token, head);
  unsigned keys[kParts], values[kParts];
  const unsigned key_scale = quantise_int8(x, keys), value_scale = quantise_int8(value, values);
  for (char* target : targets) {
    if (target == nullptr) continue;
    store_int8(view, keys, key_scale, target, 0, parts.key_scales, in_row);
    store_int8(view, values, value_scale, target, parts.values, parts.value_scales, in_row);
  }
}

// A warp stores one token of one KV head.
template <int kParts>
__global__ void __launch_bounds__(32 * kWriteWarps)
    write_kernel(const __grid_constant__ LayerView view, const __grid_constant__ WriteRows write) {
  // In this order: what begins now may take it that all launches before this one have ended.
  wait_for_launch_before();
  let_next_launch_begin();
  const int64_t items = write.num_tokens * view.num_kv_heads;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWriteWarps;
  for (int64_t item = blockIdx.x * kWriteWarps + threadIdx.x / 32; item < items; item += warps) {
    write_token<kParts>(view, write, item / view.num_kv_heads,
                        static_cast<int>(item % view.num_kv_heads));
  }
}

// Heads of some tokens of a row as they are. `row`: of keys or values.
__device__ inline void copy_heads(const char* from, const Heads& to, const LayerView& view,
                                  int64_t row, int head, int tokens) {
  constexpr int kAhead = 4;
  const int lane = threadIdx.x & 31, each = view.head_size * view.value_bytes / 16;
  const int total = tokens * each;
  for (int first = lane; first < total; first += 32 * kAhead) {
    uint4 vectors[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int vector = first + 32 * i;
      if (vector < total) vectors[i] = __ldcs(reinterpret_cast<const uint4*>(from) + vector);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int vector = first + 32 * i;
      if (vector >= total) continue;
      char* head_at = head_of(to, view.head_size, row + vector / each, head);
      reinterpret_cast<uint4*>(head_at)[vector % each] = vectors[i];
    }
  }
}

template <int kParts>
__device__ inline void dequantise(const unsigned (&words)[kParts], unsigned scale_bits,
                                  float (&x)[kParts][4]) {
  const float scale = halves_to_floats(scale_bits).x;
  for_each(x, [&](int part, int i) {
    x[part][i] = static_cast<float>(static_cast<int8_t>(words[part] >> (8 * i))) * scale;
  });
}

// The same of int8 rows, as K and V.
template <int kParts>
__device__ inline void restore_heads(const LayerView& view, const GatherRows& gather,
                                     const char* from, int64_t row, int head, int tokens) {
  constexpr int kAhead = 4;
  const RowParts parts(view);
  float mean[kParts][4], deviation[kParts][4];
  load_floats(mean, view.mean + head * view.head_size, view.head_size);
  load_floats(deviation, view.deviation + head * view.head_size, view.head_size);
  for (int first = 0; first < tokens; first += kAhead) {
    unsigned keys[kAhead][kParts], values[kAhead][kParts];
    unsigned key_scales[kAhead], value_scales[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= tokens) continue;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        keys[i][part] = values[i][part] = 0;
        const int at = first_value(part, view.head_size);
        if (at < 0) continue;
        const char* word = from + (first + i) * parts.head_bytes + at;
        keys[i][part] = __ldcs(reinterpret_cast<const unsigned*>(word));
        values[i][part] = __ldcs(reinterpret_cast<const unsigned*>(word + parts.values));
      }
      key_scales[i] = reinterpret_cast<const uint16_t*>(from + parts.key_scales)[first + i];
      value_scales[i] = reinterpret_cast<const uint16_t*>(from + parts.value_scales)[first + i];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= tokens) continue;
      float x[kParts][4];
      dequantise(keys[i], key_scales[i], x);
      rotate(x, view.head_size, view.rotation);
      for_each(x, [&](int part, int j) {
        x[part][j] = x[part][j] * deviation[part][j] + mean[part][j];
      });
      store_head(x, gather.keys, view.head_size, row + first + i, head);
      dequantise(values[i], value_scales[i], x);
      store_head(x, gather.values, view.head_size, row + first + i, head);
    }
  }
}

// A warp takes one row at a time.
template <int kParts>
__global__ void __launch_bounds__(32 * kGatherWarps)
    gather_kernel(const __grid_constant__ LayerView view,
                  const __grid_constant__ GatherRows gather) {
  const int rows = (gather.max_length + view.block_tokens - 1) / view.block_tokens;
  const int64_t total = static_cast<int64_t>(gather.num_requests) * rows * view.num_kv_heads;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kGatherWarps;
  for (int64_t item = blockIdx.x * kGatherWarps + threadIdx.x / 32; item < total; item += warps) {
    const int head = static_cast<int>(item % view.num_kv_heads);
    const int64_t of_all = item / view.num_kv_heads;
    const int request = static_cast<int>(of_all / rows);
    const int first = static_cast<int>(of_all % rows) * view.block_tokens;
    const int tokens = min(view.block_tokens, gather.lengths[request] - first);
    if (tokens <= 0) continue;
    const int token = gather.starts[request] + first;
    const int page = gather.page_table[request * gather.table_stride + token / view.page_tokens];
    const int64_t row =
        (static_cast<int64_t>(page) * view.num_kv_heads + head) * view.blocks_per_page +
        token % view.page_tokens / view.block_tokens;
    const char* from = view.host_rows + row * view.row_bytes;
    const int64_t out_row = static_cast<int64_t>(gather.first_rows[request]) + first;
    if (view.int8_rows) {
      restore_heads<kParts>(view, gather, from, out_row, head, tokens);
    } else {
      copy_heads(from, gather.keys, view, out_row, head, tokens);
      copy_heads(from + RowParts(view).values, gather.values, view, out_row, head, tokens);
    }
  }
}

int blocks_for(int64_t items, int warps, int most) {
  const int64_t needed = (items + warps - 1) / warps;
  return static_cast<int>(std::min<int64_t>(needed, most > 0 ? most : 1 << 30));
}

}  // namespace

cudaError_t launch_write_rows(const LayerView& view, const WriteRows& write, int most_blocks,
                              bool dependent, cudaStream_t stream) {
  const auto launch = [&](auto kernel) {
    const int64_t items = write.num_tokens * view.num_kv_heads;
    return launch_kernel(dependent, kernel, blocks_for(items, kWriteWarps, most_blocks),
                         32 * kWriteWarps, stream, view, write);
  };
  return parts_of(view.head_size) == 1 ? launch(write_kernel<1>) : launch(write_kernel<2>);
}

cudaError_t launch_gather_rows(const LayerView& view, const GatherRows& gather, int most_blocks,
                               cudaStream_t stream) {
  const auto launch = [&](auto kernel) {
    const int64_t rows = (gather.max_length + view.block_tokens - 1) / view.block_tokens;
    const int64_t items = gather.num_requests * rows * view.num_kv_heads;
    return launch_kernel(false, kernel, blocks_for(items, kGatherWarps, most_blocks),
                         32 * kGatherWarps, stream, view, gather);
  };
  return parts_of(view.head_size) == 1 ? launch(gather_kernel<1>) : launch(gather_kernel<2>);
}

}  // namespace kcache
