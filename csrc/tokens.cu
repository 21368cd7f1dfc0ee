// SPDX-License-Identifier: Apache-2.0
// Codes and rows of the newest tokens, which a decode step waits for. Definitions:
// vllm_kcache/reference/{codes,write}.py; rows of prompts: csrc/rows.cu.
//
// What counts is how long one token takes. Its K has one warp and its V another, which looks for
// the slot meanwhile. What a warp has goes from its registers to the host, and from there to the
// slot as soon as that is known: nothing waits for what is on its way to the host.
#include "dependent.cuh"
#include "launch.h"
#include "ptx.cuh"
#include "rows.cuh"

namespace kcache {
namespace {

// Divides by what the host knows: the GPU would make the reciprocal first.
class Divisor {
 public:
  // Of at least 1 and below 2^31; 2^shift / divisor, rounded up, has 32 bits.
  explicit Divisor(unsigned divisor) {
    while ((1u << (shift_ - 31)) < divisor) ++shift_;
    factor_ = static_cast<unsigned>(((1ull << shift_) + divisor - 1) / divisor);
  }
  // Of what is below 2^31.
  __device__ unsigned quotient(unsigned dividend) const {
    return static_cast<unsigned>((static_cast<uint64_t>(dividend) * factor_) >> shift_);
  }

 private:
  int shift_ = 31;
  unsigned factor_;
};

// A head as the model has it: of kBytes a value.
template <int kParts, int kBytes>
struct Raw {
  unsigned words[kParts][kBytes];

  // Lanes past the head's size load its first values: no load has a branch.
  __device__ void load(const char* head, int head_size) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const char* from = head + max(first_value(part, head_size), 0) * kBytes;
      if constexpr (kBytes == 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(from);
        words[part][0] = four.x;
        words[part][1] = four.y;
        words[part][2] = four.z;
        words[part][3] = four.w;
      } else {
        const uint2 two = *reinterpret_cast<const uint2*>(from);
        words[part][0] = two.x;
        words[part][1] = two.y;
      }
    }
  }

  __device__ void store(char* head, int head_size) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int first = first_value(part, head_size);
      if (first < 0) continue;
      if constexpr (kBytes == 4) {
        *reinterpret_cast<uint4*>(head + 4 * first) =
            uint4{words[part][0], words[part][1], words[part][2], words[part][3]};
      } else {
        *reinterpret_cast<uint2*>(head + 2 * first) = make_uint2(words[part][0], words[part][1]);
      }
    }
  }

  __device__ void to_floats(float (&x)[kParts][4], int head_size, bool is_half) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const bool exists = first_value(part, head_size) >= 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float value;
        if constexpr (kBytes == 4) {
          value = __uint_as_float(words[part][i]);
        } else {
          const unsigned two = words[part][i / 2];
          const float2 halves = halves_to_floats(two);
          const float half = i % 2 == 0 ? halves.x : halves.y;
          value = is_half ? half : __uint_as_float(i % 2 == 0 ? two << 16 : two & 0xffff0000u);
        }
        x[part][i] = exists ? value : 0.0f;
      }
    }
  }
};

// A token's K or V on its way to a row: as the model has it, or as int8 with a scale.
template <int kParts, int kBytes>
struct RowPart {
  Raw<kParts, kBytes> raw;
  unsigned words[kParts];
  uint16_t scale;

  __device__ void store(const LayerView& view, char* row, int in_row, bool is_value) const {
    const RowParts parts(view);
    char* head = row + (is_value ? parts.values : 0) + in_row * parts.head_bytes;
    if (!view.int8_rows) return raw.store(head, view.head_size);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int first = first_value(part, view.head_size);
      if (first >= 0) *reinterpret_cast<unsigned*>(head + first) = words[part];
    }
    if ((threadIdx.x & 31) != 0) return;
    const int scales = is_value ? parts.value_scales : parts.key_scales;
    *reinterpret_cast<uint16_t*>(row + scales + 2 * in_row) = scale;
  }
};

// A thread block stores the run of one KV head that begins at a token, where one does: its first
// warp K, its second V.
template <int kParts, int kBytes>
__global__ void __launch_bounds__(64)
    write_kernel(const __grid_constant__ LayerView view, const __grid_constant__ WriteRows write,
                 const __grid_constant__ Divisor page_tokens) {
  __shared__ int found;
  const int head = static_cast<int>(blockIdx.x), token = static_cast<int>(blockIdx.y);
  const bool is_value = threadIdx.x >= 32, is_half = write.key.dtype == Dtype::kFloat16;
  const Heads& heads = is_value ? write.value : write.key;
  const char* from = head_of(heads, view.head_size, token, head);
  // No launch of a step writes these.
  const Transform<kParts> transform(view, head);
  // In this order: what begins now may take it that all launches before this one have ended.
  wait_for_launch_before();
  let_next_launch_begin();
  RowPart<kParts, kBytes> part;
  part.raw.load(from, view.head_size);
  const unsigned epoch = epoch_of(view);
  const Runs runs(view, write, token - 1);
  const unsigned place = static_cast<unsigned>(__shfl_sync(kAllLanes, runs.place, 1));
  if ((runs.begins & 2) == 0) return;
  const int count = runs.tokens(1);
  const unsigned page = page_tokens.quotient(place), offset = place - page * view.page_tokens;
  const int block = static_cast<int>(offset) / view.block_tokens;
  const int64_t row =
      (static_cast<int64_t>(page) * view.num_kv_heads + head) * view.blocks_per_page + block;
  const int in_row = static_cast<int>(offset) - block * view.block_tokens;
  const bool in_host = write.parts & kRowHost;
  // The stamp keeps a slot that is written here from being claimed by another warp.
  const bool in_slot = (write.parts & kRowSlot) && view.num_slots > 0;
  const int64_t owner = view.layer_rows + row;
  const bool searches = in_slot && threadIdx.x == 32;
  SlotSearch search(view, owner, epoch, searches);
  const bool quantises = view.int8_rows && (in_host || in_slot);
  int slot = -1;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    float x[kParts][4], magnitude = 0.0f;
    part.raw.to_floats(x, view.head_size, is_half);
    if (is_value) {
      if (quantises) magnitude = magnitude_of(x);
      if (i == 0) search.read_word();
    } else if (quantises || (write.parts & kCodes)) {
      transform.apply(view, x);
      const Range range(x, view.head_size);
      magnitude = range.magnitude();
      if (write.parts & kCodes) {
        write_code(view, x, range, codes_of(view, page, head), static_cast<int>(offset) + i);
      }
    }
    if (quantises) part.scale = quantise_int8(part.words, x, magnitude);
    if (in_host) part.store(view, view.host_rows + row * view.row_bytes, in_row + i, is_value);
    if (i == 0 && in_slot) {
      if (is_value) {
        search.stamp();
        slot = slot_of(view, write, search, owner, epoch, token, in_row, count);
        if (searches) found = slot;
      }
      __syncthreads();
      slot = found;
    }
    if (slot >= 0) {
      part.store(view, view.slots + static_cast<int64_t>(slot) * view.row_bytes, in_row + i,
                 is_value);
    }
    if (i + 1 < count) part.raw.load(from + (i + 1) * heads.stride, view.head_size);
  }
}

}  // namespace

cudaError_t launch_write_tokens(const LayerView& view, const WriteRows& write, bool dependent,
                                cudaStream_t stream) {
  const Divisor page_tokens(static_cast<unsigned>(view.page_tokens));
  const dim3 grid(static_cast<unsigned>(view.num_kv_heads), static_cast<unsigned>(write.num_tokens));
  const auto launch = [&](auto kernel) {
    return launch_kernel(dependent, kernel, grid, 64, stream, view, write, page_tokens);
  };
  const bool is_float = write.key.dtype == Dtype::kFloat32;
  if (parts_of(view.head_size) == 2) {
    return is_float ? launch(write_kernel<2, 4>) : launch(write_kernel<2, 2>);
  }
  return is_float ? launch(write_kernel<1, 4>) : launch(write_kernel<1, 2>);
}

}  // namespace kcache
