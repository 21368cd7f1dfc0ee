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

// Finds tokens in pages by what the host has prepared: the GPU would make a reciprocal first.
class Places {
 public:
  explicit Places(const LayerView& view) : block_tokens_(view.block_tokens) {
    while ((1 << (shift_ - 31)) < view.page_tokens) ++shift_;
    while ((1 << block_shift_) < view.block_tokens) ++block_shift_;
    const uint64_t tokens = static_cast<uint64_t>(view.page_tokens);
    factor_ = static_cast<unsigned>(((1ull << shift_) + tokens - 1) / tokens);
  }
  // Of a place in the pool, which is below 2^31.
  __device__ unsigned page(unsigned place) const {
    return static_cast<unsigned>((static_cast<uint64_t>(place) * factor_) >> shift_);
  }
  // Of a place in a page: its row, and its place there.
  __device__ int row(int offset) const { return offset >> block_shift_; }
  __device__ int in_row(int offset) const { return offset & (block_tokens_ - 1); }

 private:
  // 2^shift / page_tokens, rounded up to what has 32 bits: exact for each dividend of 31.
  unsigned factor_;
  int shift_ = 31, block_shift_ = 0, block_tokens_;
};

// A head as the model has it, of kBytes a value; zeros past its size.
template <int kParts, int kBytes>
struct Raw {
  unsigned words[kParts][kBytes] = {};

  __device__ void load(const char* head, int head_size) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int first = first_value(part, head_size);
      load_now(first >= 0, words[part], head + first * kBytes);
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

  __device__ void to_floats(float (&x)[kParts][4], bool is_half) const {
    for_each(x, [&](int part, int i) {
      if constexpr (kBytes == 4) {
        x[part][i] = __uint_as_float(words[part][i]);
      } else {
        const unsigned two = words[part][i / 2];
        const float2 halves = halves_to_floats(two);
        const float half = i % 2 == 0 ? halves.x : halves.y;
        x[part][i] = is_half ? half : __uint_as_float(i % 2 == 0 ? two << 16 : two & 0xffff0000u);
      }
    });
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
                 const __grid_constant__ Places places) {
  __shared__ int found;
  const int head = static_cast<int>(blockIdx.x), token = static_cast<int>(blockIdx.y);
  const bool is_value = threadIdx.x >= 32, is_half = write.key.dtype == Dtype::kFloat16;
  const Heads& heads = is_value ? write.value : write.key;
  const char* from = head_of(heads, view.head_size, token, head);
  make_now(from);
  Transform<kParts> transform;
  // No launch of a step writes these, and nothing writes through a prefetch.
  if (!is_value) transform.load(view, head);
  if (is_value) prefetch(write.slot_mapping + token);
  if (is_value) prefetch(view.state + kEpoch);
  // In this order: what begins now may take it that all launches before this one have ended.
  wait_for_launch_before();
  let_next_launch_begin();
  RowPart<kParts, kBytes> part;
  part.raw.load(from, view.head_size);
  const int64_t its_place = load_volatile(write.slot_mapping + token);
  const unsigned epoch = static_cast<unsigned>(load_volatile(view.state + kEpoch)) + 1;
  const unsigned place = static_cast<unsigned>(its_place), page = places.page(place);
  const int offset = static_cast<int>(place - page * view.page_tokens);
  const unsigned in_layer = (page * view.num_kv_heads + head) * view.blocks_per_page;
  const int64_t row = in_layer + places.row(offset);  // 31 bits, as in the table
  const int in_row = places.in_row(offset);
  // The stamp keeps a slot that is written here from being claimed by another warp.
  const bool in_slot = (write.parts & kRowSlot) && view.num_slots > 0;
  const bool searches = in_slot && threadIdx.x == 32;
  const int64_t owner = view.layer_rows + row;
  SlotSearch search(view, owner, epoch, searches && its_place >= 0);
  const Runs runs(view, write, token - 1);
  if ((runs.begins & 2) == 0) return;
  const int count = runs.tokens(1);
  char* const host_row = write.parts & kRowHost ? view.host_rows + row * view.row_bytes : nullptr;
  const bool quantises = view.int8_rows && (host_row != nullptr || in_slot);
  const auto make = [&](int i) {
    float x[kParts][4], magnitude = 0.0f;
    part.raw.to_floats(x, is_half);
    if (is_value) {
      if (quantises) magnitude = magnitude_of(x);
      if (i == 0) search.read_word();  // goes on between what it does not wait for
    } else if (quantises || (write.parts & kCodes)) {
      transform.apply(view, x);
      const Range range(x, view.head_size);
      magnitude = range.magnitude();
      if (write.parts & kCodes) {
        write_code(view, x, range, codes_of(view, page, head), offset + i);
      }
    }
    if (quantises) part.scale = quantise_int8(part.words, x, magnitude);
    if (host_row != nullptr) part.store(view, host_row, in_row + i, is_value);
  };
  Raw<kParts, kBytes> next;
  const auto load = [&](int i) {
    if (i < count) next.load(from + i * heads.stride, view.head_size);
  };
  if (!is_value) transform.invert();
  make(0);
  load(1);
  char* slot_row = nullptr;
  if (in_slot) {
    if (is_value) {
      search.stamp();
      const int slot = slot_of(view, write, search, owner, epoch, token, in_row, count);
      if (searches) found = slot;
    }
    __syncthreads();
    if (found >= 0) slot_row = view.slots + static_cast<int64_t>(found) * view.row_bytes;
  }
  if (slot_row != nullptr) part.store(view, slot_row, in_row, is_value);
#pragma unroll 1
  for (int i = 1; i < count; ++i) {
    part.raw = next;
    load(i + 1);
    make(i);
    if (slot_row != nullptr) part.store(view, slot_row, in_row + i, is_value);
  }
}

}  // namespace

cudaError_t launch_write_tokens(const LayerView& view, const WriteRows& write, bool dependent,
                                cudaStream_t stream) {
  const Places places(view);
  const dim3 grid(static_cast<unsigned>(view.num_kv_heads),
                  static_cast<unsigned>(write.num_tokens));
  const auto launch = [&](auto kernel) {
    return launch_kernel(dependent, kernel, grid, 64, stream, view, write, places);
  };
  const bool is_float = write.key.dtype == Dtype::kFloat32;
  if (parts_of(view.head_size) == 2) {
    return is_float ? launch(write_kernel<2, 4>) : launch(write_kernel<2, 2>);
  }
  return is_float ? launch(write_kernel<1, 4>) : launch(write_kernel<1, 2>);
}

}  // namespace kcache
