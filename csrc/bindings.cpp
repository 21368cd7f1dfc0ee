// SPDX-License-Identifier: Apache-2.0
// Schemas and checked entry points of the CUDA operations, on PyTorch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "checks.h"
#include "launch.h"

namespace kcache {
namespace {

// A layer, checked once: a CPU tensor of a LayerView. It points into the tensors given, which must
// outlive it.
Tensor layer_view(Tensor host_rows, Tensor slots, Tensor table, Tensor slot_word, Tensor state,
                  Tensor counters, int64_t layer, int64_t num_kv_heads, int64_t group,
                  int64_t page_tokens, int64_t block_tokens, int64_t top_n, double coverage,
                  double mass_threshold, int64_t sink_blocks, int64_t recent_tokens,
                  bool combine_max) {
  STD_TORCH_CHECK(num_kv_heads >= 1, "num_kv_heads=", num_kv_heads, ": must be at least 1");
  STD_TORCH_CHECK(group >= 1 && group <= kMaxGroup, "group=", group, ": must be 1 to ", kMaxGroup,
                  " query heads of a KV head");
  STD_TORCH_CHECK(block_tokens >= 1 && page_tokens >= 1 && page_tokens % block_tokens == 0,
                  "block_tokens=", block_tokens, ": must divide the ", page_tokens,
                  " tokens of a page");
  STD_TORCH_CHECK(top_n == -1 || top_n >= 1, "top_n=", top_n,
                  ": must be at least 1, or -1 for no cap");
  STD_TORCH_CHECK(coverage < 0 || mass_threshold < 0, "mass_threshold=", mass_threshold,
                  ": not together with coverage=", coverage);
  STD_TORCH_CHECK(sink_blocks >= 0, "sink_blocks=", sink_blocks, ": must be at least 0");
  STD_TORCH_CHECK(recent_tokens >= 1, "recent_tokens=", recent_tokens, ": must be at least 1");
  const int64_t blocks_per_page = page_tokens / block_tokens;
  STD_TORCH_CHECK(host_rows.is_cpu(), "host_rows: must lie in mapped host memory");
  check_shape("host_rows", host_rows, ScalarType::Byte, {kAnySize, kAnySize});
  const int64_t num_rows = host_rows.size(0), row_bytes = host_rows.size(1);
  STD_TORCH_CHECK(num_rows % (num_kv_heads * blocks_per_page) == 0, "host_rows: has ", num_rows,
                  " rows; must be a multiple of the ", num_kv_heads * blocks_per_page,
                  " of a page");
  STD_TORCH_CHECK(row_bytes >= 16 && row_bytes % 16 == 0, "host_rows: a row has ", row_bytes,
                  " bytes; must be a multiple of 16");
  check_tensor("table", table, ScalarType::Int, {kAnySize, num_rows}, table);
  STD_TORCH_CHECK(layer >= 0 && layer < table.size(0), "layer=", layer, ": must be 0 to ",
                  table.size(0) - 1);
  check_tensor("slots", slots, ScalarType::Byte, {kAnySize, row_bytes}, table);
  check_tensor("slot_word", slot_word, ScalarType::Long, {slots.size(0)}, table);
  check_tensor("state", state, ScalarType::Int, {kStateWords}, table);
  check_tensor("counters", counters, ScalarType::Long, {kCounterWords}, table);
  for (const Tensor& rows : {host_rows, slots}) {
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(rows.data_ptr()) % 16 == 0,
                    "host_rows, slots: must begin at a multiple of 16 bytes");
  }
  LayerView view{};
  view.magic = kLayerMagic;
  view.host_rows = pointer<char>(host_rows);
  view.slots = pointer<char>(slots);
  view.table = pointer<int>(table);
  view.slot_word = pointer<Word>(slot_word);
  view.state = pointer<int>(state);
  view.counters = pointer<Word>(counters);
  view.layer_rows = layer * num_rows;
  view.num_slots = static_cast<unsigned>(slots.size(0));
  view.row_bytes = static_cast<int>(row_bytes);
  view.num_kv_heads = static_cast<int>(num_kv_heads);
  view.group = static_cast<int>(group);
  view.block_tokens = static_cast<int>(block_tokens);
  view.blocks_per_page = static_cast<int>(blocks_per_page);
  view.top_n = static_cast<int>(top_n);
  view.coverage = static_cast<float>(coverage);
  view.mass_threshold = static_cast<float>(mass_threshold);
  view.sink_blocks = static_cast<int>(sink_blocks);
  view.recent_tokens = static_cast<int>(recent_tokens);
  view.combine_max = combine_max;
  Tensor packed = torch::stable::new_empty(host_rows, {static_cast<int64_t>(sizeof(view))});
  std::memcpy(packed.data_ptr(), &view, sizeof(view));
  return packed;
}

LayerView unpack(const Tensor& layer) {
  LayerView view{};
  STD_TORCH_CHECK(layer.is_cpu() && layer.scalar_type() == ScalarType::Byte &&
                      layer.is_contiguous() && layer.numel() == sizeof(view),
                  "layer: must be what layer_view returned");
  std::memcpy(&view, layer.data_ptr(), sizeof(view));
  STD_TORCH_CHECK(view.magic == kLayerMagic, "layer: must be what layer_view returned");
  return view;
}

// The lists of a call: [B, Hkv, N].
void use_lists(Step& step, const LayerView& view, const Tensor& blocks, const Tensor& counts) {
  check_tensor("blocks", blocks, ScalarType::Int, {kAnySize, view.num_kv_heads, kAnySize}, blocks);
  check_tensor("counts", counts, ScalarType::Int, {blocks.size(0), view.num_kv_heads}, blocks);
  const int64_t num_lists = blocks.size(0) * view.num_kv_heads;
  STD_TORCH_CHECK(num_lists < 1 << 30, "blocks: has ", num_lists, " lists; must be below 2^30");
  step.blocks = pointer<int>(blocks);
  step.counts = pointer<int>(counts);
  step.num_lists = static_cast<int>(num_lists);
  step.columns = static_cast<int>(blocks.size(2));
}

void use_scores(Step& step, const LayerView& view, const Tensor& seq_lens, const Tensor& block_lse,
                const Tensor& chunk_lse, int64_t chunk_blocks, const Tensor& blocks,
                const Tensor& counts, const Tensor& mass, const Tensor& lse) {
  use_lists(step, view, blocks, counts);
  const int64_t num_requests = blocks.size(0), num_heads = view.num_kv_heads * view.group;
  check_tensor("seq_lens", seq_lens, ScalarType::Int, {num_requests}, blocks);
  check_tensor("block_lse", block_lse, ScalarType::Float, {num_requests, num_heads, kAnySize},
               blocks);
  check_tensor("chunk_lse", chunk_lse, ScalarType::Float, {num_requests, num_heads, kAnySize},
               blocks);
  check_tensor("mass", mass, ScalarType::Float, {num_requests, view.num_kv_heads}, blocks);
  check_tensor("lse", lse, ScalarType::Float, {num_requests, num_heads}, blocks);
  const int64_t max_blocks = block_lse.size(2);
  STD_TORCH_CHECK(max_blocks <= kMaxBlocks, "block_lse: has P=", max_blocks,
                  " V blocks a request; must be at most ", kMaxBlocks);
  STD_TORCH_CHECK(chunk_blocks >= 1 && chunk_blocks <= kMaxBlocks, "chunk_blocks=", chunk_blocks,
                  ": must be 1 to ", kMaxBlocks);
  STD_TORCH_CHECK(chunk_lse.size(2) * chunk_blocks >= max_blocks,
                  "chunk_lse: has C=", chunk_lse.size(2), " chunks of ", chunk_blocks,
                  " V blocks for P=", max_blocks);
  const int64_t needed = view.top_n < 0 ? max_blocks : std::min<int64_t>(view.top_n, max_blocks);
  STD_TORCH_CHECK(blocks.size(2) >= needed, "blocks: has N=", blocks.size(2),
                  " columns; must have at least ", needed);
  step.seq_lens = pointer<int>(seq_lens);
  step.block_lse = pointer<float>(block_lse);
  step.chunk_lse = pointer<float>(chunk_lse);
  step.mass = pointer<float>(mass);
  step.lse = pointer<float>(lse);
  step.max_blocks = static_cast<int>(max_blocks);
  step.max_chunks = static_cast<int>(chunk_lse.size(2));
  step.chunk_blocks = static_cast<int>(chunk_blocks);
}

void use_rows(Step& step, const Tensor& block_table, const Tensor& blocks, const Tensor& rows) {
  check_tensor("rows", rows, ScalarType::Int, {blocks.size(0), blocks.size(1), blocks.size(2)},
               blocks);
  check_block_table(block_table, blocks.size(0), blocks);
  step.block_table = pointer<int>(block_table);
  step.table_stride = block_table.stride(0);
  step.rows = pointer<int>(rows);
}

void use_signals(Step& step, const Tensor& lists, const Tensor& blocks) {
  check_tensor("lists", lists, ScalarType::Int, {kAnySize}, blocks);
  STD_TORCH_CHECK(lists.size(0) >= step.num_lists, "lists: has ", lists.size(0),
                  " entries; must have at least ", step.num_lists);
  step.lists = pointer<int>(lists);
}

void select_blocks(Tensor layer, Tensor seq_lens, Tensor block_lse, Tensor chunk_lse,
                   int64_t chunk_blocks, Tensor blocks, Tensor counts, Tensor mass, Tensor lse) {
  const LayerView view = unpack(layer);
  Step step{};
  use_scores(step, view, seq_lens, block_lse, chunk_lse, chunk_blocks, blocks, counts, mass, lse);
  if (step.num_lists == 0) return;
  const DeviceGuard guard(blocks.get_device_index());
  STD_CUDA_CHECK(launch_select(view, step, false, current_stream(blocks)));
}

void fetch_blocks(Tensor layer, Tensor blocks, Tensor counts, Tensor block_table, Tensor rows) {
  const LayerView view = unpack(layer);
  Step step{};
  use_lists(step, view, blocks, counts);
  use_rows(step, block_table, blocks, rows);
  if (step.num_lists == 0) return;
  const DeviceGuard guard(blocks.get_device_index());
  STD_CUDA_CHECK(launch_fetch(view, step, current_stream(blocks)));
}

// The columns past the end of a list are left alone: `counts` says where it ends.
void select_and_fetch(Tensor layer, Tensor seq_lens, Tensor block_table, Tensor block_lse,
                      Tensor chunk_lse, int64_t chunk_blocks, Tensor blocks, Tensor counts,
                      Tensor mass, Tensor lse, Tensor rows, Tensor lists, bool dependent) {
  const LayerView view = unpack(layer);
  Step step{};
  use_scores(step, view, seq_lens, block_lse, chunk_lse, chunk_blocks, blocks, counts, mass, lse);
  use_rows(step, block_table, blocks, rows);
  use_signals(step, lists, blocks);
  if (step.num_lists == 0) return;
  const DeviceGuard guard(blocks.get_device_index());
  STD_CUDA_CHECK(launch_select(view, step, dependent, current_stream(blocks)));
}

// As many lists of the same as are scored in time, beside the kernel that adds to `lists`.
void follow_scores(Tensor layer, Tensor seq_lens, Tensor block_table, Tensor block_lse,
                   Tensor chunk_lse, int64_t chunk_blocks, Tensor blocks, Tensor counts,
                   Tensor mass, Tensor lse, Tensor rows, Tensor lists, int64_t splits,
                   int64_t most_thread_blocks, int64_t least_thread_blocks) {
  const LayerView view = unpack(layer);
  Step step{};
  use_scores(step, view, seq_lens, block_lse, chunk_lse, chunk_blocks, blocks, counts, mass, lse);
  use_rows(step, block_table, blocks, rows);
  use_signals(step, lists, blocks);
  STD_TORCH_CHECK(splits >= 1 && splits <= kMaxBlocks, "splits=", splits, ": must be 1 to ",
                  kMaxBlocks);
  // More would leave the score kernel little room.
  STD_TORCH_CHECK(most_thread_blocks >= 1 && most_thread_blocks <= 128,
                  "most_thread_blocks=", most_thread_blocks, ": must be 1 to 128");
  STD_TORCH_CHECK(least_thread_blocks >= 1 && least_thread_blocks <= most_thread_blocks,
                  "least_thread_blocks=", least_thread_blocks, ": must be 1 to ",
                  most_thread_blocks);
  if (step.num_lists == 0) return;
  const int most = std::min(static_cast<int>(most_thread_blocks), step.num_lists);
  const Follow follow{static_cast<int>(splits),
                      std::min(static_cast<int>(least_thread_blocks), most)};
  const DeviceGuard guard(blocks.get_device_index());
  STD_CUDA_CHECK(launch_follow(view, step, follow, most, current_stream(blocks)));
}

}  // namespace
}  // namespace kcache

#define KCACHE_LISTS "Tensor(a!) blocks, Tensor(b!) counts, Tensor(c!) mass, Tensor(d!) lse"
#define KCACHE_STEP                                                                         \
  "Tensor layer, Tensor seq_lens, Tensor block_table, Tensor block_lse, Tensor chunk_lse, " \
  "int chunk_blocks, " KCACHE_LISTS ", Tensor(e!) rows, Tensor(f!) lists"

STABLE_TORCH_LIBRARY(kcache, library) {
  library.def(
      "layer_view(Tensor host_rows, Tensor slots, Tensor table, Tensor slot_word, Tensor state, "
      "Tensor counters, int layer, int num_kv_heads, int group, int page_tokens, "
      "int block_tokens, int top_n, float coverage, float mass_threshold, int sink_blocks, "
      "int recent_tokens, bool combine_max) -> Tensor");
  library.def(
      "select_blocks(Tensor layer, Tensor seq_lens, Tensor block_lse, Tensor chunk_lse, "
      "int chunk_blocks, " KCACHE_LISTS ") -> ()");
  library.def(
      "fetch_blocks(Tensor layer, Tensor blocks, Tensor counts, Tensor block_table, "
      "Tensor(a!) rows) -> ()");
  library.def("select_and_fetch(" KCACHE_STEP ", bool dependent) -> ()");
  library.def("follow_scores(" KCACHE_STEP
              ", int splits, int most_thread_blocks, int least_thread_blocks) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kcache, CUDA, library) {
  library.impl("layer_view", TORCH_BOX(&kcache::layer_view));
  library.impl("select_blocks", TORCH_BOX(&kcache::select_blocks));
  library.impl("fetch_blocks", TORCH_BOX(&kcache::fetch_blocks));
  library.impl("select_and_fetch", TORCH_BOX(&kcache::select_and_fetch));
  library.impl("follow_scores", TORCH_BOX(&kcache::follow_scores));
}
