// SPDX-License-Identifier: Apache-2.0
// Schemas and checked entry points of the CUDA operations, on PyTorch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>

#include "checks.h"
#include "launch.h"

namespace kcache {
namespace {

// Bytes of a row of K and V, as RowFormat.bytes of vllm_kcache/cache/formats.py.
int64_t bytes_of_row(const LayerView& view) {
  const int64_t values = 2ll * view.block_tokens * view.head_size;
  if (!view.int8_rows) return values * view.value_bytes;
  return (values + 4 * view.block_tokens + 15) / 16 * 16;
}

void use_codes(LayerView& view, const Tensor& codes, const Tensor& mean, const Tensor& deviation,
               int64_t page_tokens, int64_t head_size, int64_t num_rows) {
  const int64_t padded = (head_size + 31) / 32 * 32;
  STD_TORCH_CHECK(
      head_size % 16 == 0 && (padded == 64 || padded == 96 || padded == 128 || padded == 256),
      "head_size=", head_size, ": K codes are for heads of 64, 80, 96, 128 or 256");
  STD_TORCH_CHECK(page_tokens % 16 == 0, "page_tokens=", page_tokens,
                  ": must be a multiple of 16 with K codes");
  STD_TORCH_CHECK(view.block_tokens <= 32 && (view.block_tokens & (view.block_tokens - 1)) == 0,
                  "block_tokens=", view.block_tokens,
                  ": must be a power of two of at most 32 with K codes");
  STD_TORCH_CHECK(view.value_bytes == 2 || view.value_bytes == 4, "value_bytes=", view.value_bytes,
                  ": must be 2 or 4");
  view.page_tokens = static_cast<int>(page_tokens);
  view.head_size = static_cast<int>(head_size);
  const int64_t head_bytes = page_tokens * (padded / 2 + 4);
  const int64_t pages = num_rows / (view.num_kv_heads * view.blocks_per_page);
  check_gpu("codes", codes, mean);
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.dim() == 3 &&
                      codes.size(0) == pages && codes.size(1) == view.num_kv_heads &&
                      codes.size(2) == head_bytes && codes.stride(2) == 1 &&
                      (view.num_kv_heads == 1 || codes.stride(1) == head_bytes),
                  "codes: must be uint8 [M=", pages, ", Hkv=", view.num_kv_heads, ", ", head_bytes,
                  "], contiguous in each page");
  const int64_t page_bytes = codes.stride(0);
  STD_TORCH_CHECK(page_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(codes.data_ptr()) % 16 == 0,
                  "codes: every page must begin at a multiple of 16 bytes");
  // Places in pages are counted in 16 bytes.
  STD_TORCH_CHECK(pages * page_bytes / 16 < 1ll << 32, "codes: must be at most 64 GiB");
  for (const auto& [name, tensor] : {std::pair("mean", &mean), {"deviation", &deviation}}) {
    check_tensor(name, *tensor, ScalarType::Float, {view.num_kv_heads, head_size}, codes);
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor->data_ptr()) % 16 == 0, name,
                    ": must begin at a multiple of 16 bytes");
  }
  STD_TORCH_CHECK(view.row_bytes == bytes_of_row(view), "host_rows: a row has ", view.row_bytes,
                  " bytes; K and V take ", bytes_of_row(view));
  view.codes = pointer<char>(codes);
  view.code_page_bytes = page_bytes;
  view.mean = pointer<float>(mean);
  view.deviation = pointer<float>(deviation);
  view.rotation = static_cast<float>(1 / std::sqrt(static_cast<double>(head_size & -head_size)));
}

// A layer, checked once: a CPU tensor of a LayerView. It points into the tensors given, which must
// outlive it.
Tensor layer_view(Tensor host_rows, Tensor slots, Tensor table, Tensor slot_word, Tensor state,
                  Tensor counters, int64_t layer, int64_t num_kv_heads, int64_t group,
                  int64_t page_tokens, int64_t block_tokens, int64_t top_n, double coverage,
                  double mass_threshold, int64_t threshold_length, int64_t sink_blocks,
                  int64_t recent_tokens, bool combine_max, std::optional<Tensor> codes,
                  std::optional<Tensor> mean, std::optional<Tensor> deviation, int64_t head_size,
                  int64_t value_bytes, bool int8_rows) {
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
  view.threshold_length = static_cast<float>(threshold_length);
  view.sink_blocks = static_cast<int>(sink_blocks);
  view.recent_tokens = static_cast<int>(recent_tokens);
  view.combine_max = combine_max;
  if (codes) {
    STD_TORCH_CHECK(mean && deviation, "mean, deviation: must come with codes");
    view.value_bytes = static_cast<int>(value_bytes);
    view.int8_rows = int8_rows;
    use_codes(view, *codes, *mean, *deviation, page_tokens, head_size, num_rows);
  }
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
                const Tensor& chunk_lse, int64_t chunk_blocks, int64_t num_requests,
                const Tensor& beside) {
  const int64_t num_heads = view.num_kv_heads * view.group;
  check_tensor("seq_lens", seq_lens, ScalarType::Int, {num_requests}, beside);
  check_tensor("block_lse", block_lse, ScalarType::Float, {num_requests, num_heads, kAnySize},
               beside);
  check_tensor("chunk_lse", chunk_lse, ScalarType::Float, {num_requests, num_heads, kAnySize},
               beside);
  const int64_t max_blocks = block_lse.size(2);
  STD_TORCH_CHECK(max_blocks <= kMaxBlocks, "block_lse: has P=", max_blocks,
                  " V blocks a request; must be at most ", kMaxBlocks);
  STD_TORCH_CHECK(chunk_blocks >= 1 && chunk_blocks <= kMaxBlocks, "chunk_blocks=", chunk_blocks,
                  ": must be 1 to ", kMaxBlocks);
  STD_TORCH_CHECK(chunk_lse.size(2) * chunk_blocks >= max_blocks,
                  "chunk_lse: has C=", chunk_lse.size(2), " chunks of ", chunk_blocks,
                  " V blocks for P=", max_blocks);
  step.seq_lens = pointer<int>(seq_lens);
  step.block_lse = pointer<float>(block_lse);
  step.chunk_lse = pointer<float>(chunk_lse);
  step.max_blocks = static_cast<int>(max_blocks);
  step.max_chunks = static_cast<int>(chunk_lse.size(2));
  step.chunk_blocks = static_cast<int>(chunk_blocks);
}

void use_chunk_max(Step& step, const std::optional<Tensor>& chunk_max, const Tensor& chunk_lse) {
  if (!chunk_max) return;
  check_tensor("chunk_max", *chunk_max, ScalarType::Float,
               {chunk_lse.size(0), chunk_lse.size(1), chunk_lse.size(2)}, chunk_lse);
  STD_TORCH_CHECK(step.chunk_blocks >= 4 && std::has_single_bit(unsigned(step.chunk_blocks)),
                  "chunk_max: chunk_blocks=", step.chunk_blocks,
                  ": must be a power of two, at least 4");
  step.chunk_max = pointer<float>(*chunk_max);
}

// What a call selects by, and what it says of its lists.
void use_selection(Step& step, const LayerView& view, const Tensor& seq_lens,
                   const Tensor& block_lse, const Tensor& chunk_lse, int64_t chunk_blocks,
                   const Tensor& blocks, const Tensor& counts, const Tensor& mass,
                   const Tensor& lse, const std::optional<Tensor>& dropped) {
  use_lists(step, view, blocks, counts);
  use_scores(step, view, seq_lens, block_lse, chunk_lse, chunk_blocks, blocks.size(0), blocks);
  const int64_t num_requests = blocks.size(0), num_heads = view.num_kv_heads * view.group;
  check_tensor("mass", mass, ScalarType::Float, {num_requests, view.num_kv_heads}, blocks);
  check_tensor("lse", lse, ScalarType::Float, {num_requests, num_heads}, blocks);
  const int64_t max_blocks = step.max_blocks;
  const int64_t needed = view.top_n < 0 ? max_blocks : std::min<int64_t>(view.top_n, max_blocks);
  STD_TORCH_CHECK(blocks.size(2) >= needed, "blocks: has N=", blocks.size(2),
                  " columns; must have at least ", needed);
  step.mass = pointer<float>(mass);
  step.lse = pointer<float>(lse);
  if (dropped) {
    check_tensor("dropped", *dropped, ScalarType::Float, {num_requests, num_heads}, blocks);
    step.dropped = pointer<float>(*dropped);
  }
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
                   int64_t chunk_blocks, Tensor blocks, Tensor counts, Tensor mass, Tensor lse,
                   std::optional<Tensor> dropped) {
  const LayerView view = unpack(layer);
  Step step{};
  use_selection(step, view, seq_lens, block_lse, chunk_lse, chunk_blocks, blocks, counts, mass, lse,
                dropped);
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

// Tokens of a request that have one list.
void use_spans(Step& step, const LayerView& view, const std::optional<Tensor>& spans,
               int64_t together, const Tensor& blocks) {
  step.spans = spans_of(spans, blocks.size(0), blocks);
  STD_TORCH_CHECK(together >= 1 && (together == 1 || (spans && together * view.group <= kMaxGroup &&
                                                      together <= kMostTogether)),
                  "together=", together, ": needs spans, and at most ", kMaxGroup,
                  " query heads and ", kMostTogether, " tokens");
  step.together = static_cast<int>(together);
}

// The columns past the end of a list are left alone: `counts` says where it ends.
void select_and_fetch(Tensor layer, Tensor seq_lens, Tensor block_table, Tensor block_lse,
                      Tensor chunk_lse, int64_t chunk_blocks, Tensor blocks, Tensor counts,
                      Tensor mass, Tensor lse, std::optional<Tensor> dropped, Tensor rows,
                      std::optional<Tensor> lists, std::optional<Tensor> chunk_max,
                      std::optional<Tensor> spans, int64_t together, bool dependent) {
  const LayerView view = unpack(layer);
  Step step{};
  use_selection(step, view, seq_lens, block_lse, chunk_lse, chunk_blocks, blocks, counts, mass, lse,
                dropped);
  use_chunk_max(step, chunk_max, chunk_lse);
  use_rows(step, block_table, blocks, rows);
  use_spans(step, view, spans, together, blocks);
  if (together > 1) {
    STD_TORCH_CHECK(!lists, "lists: none where tokens of a request have one");
    const int64_t most = view.top_n < 0 ? step.max_blocks : view.top_n * together;
    STD_TORCH_CHECK(step.columns >= std::min<int64_t>(most, step.max_blocks),
                    "blocks: has N=", step.columns, " columns; must have those of ", together,
                    " tokens");
  }
  if (lists) use_signals(step, *lists, blocks);
  if (step.num_lists == 0) return;
  const DeviceGuard guard(blocks.get_device_index());
  STD_CUDA_CHECK(launch_select(view, step, dependent, current_stream(blocks)));
}

// As many lists of the same as are scored in time, beside the kernel that adds to `lists`.
void follow_scores(Tensor layer, Tensor seq_lens, Tensor block_table, Tensor block_lse,
                   Tensor chunk_lse, int64_t chunk_blocks, Tensor blocks, Tensor counts,
                   Tensor mass, Tensor lse, std::optional<Tensor> dropped, Tensor rows,
                   Tensor lists, int64_t splits, int64_t most_thread_blocks,
                   int64_t least_thread_blocks) {
  const LayerView view = unpack(layer);
  Step step{};
  use_selection(step, view, seq_lens, block_lse, chunk_lse, chunk_blocks, blocks, counts, mass, lse,
                dropped);
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

// Where the heads of a tensor of the model lie: [n, heads, D], strided over the first dimension.
Heads heads_of(const char* name, const Tensor& tensor, const LayerView& view, int64_t size,
               int64_t heads, const Tensor& beside) {
  check_gpu(name, tensor, beside);
  const Dtype dtype = dtype_of(name, tensor);
  const int64_t bytes = dtype == Dtype::kFloat32 ? 4 : 2;
  STD_TORCH_CHECK(bytes == view.value_bytes, name, ": has ", bytes,
                  " bytes a value; the layer has ", view.value_bytes);
  STD_TORCH_CHECK(tensor.dim() == 3 && (size == kAnySize || tensor.size(0) == size) &&
                      tensor.size(1) == heads && tensor.size(2) == view.head_size &&
                      (heads == 1 || tensor.stride(1) == view.head_size) && tensor.stride(2) == 1,
                  name, ": must be [n, ", heads, ", ", view.head_size, "], contiguous in each n");
  const int64_t stride = tensor.stride(0) * bytes;
  STD_TORCH_CHECK(stride % 16 == 0 && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0,
                  name, ": each head must begin at a multiple of 16 bytes");
  return {pointer<char>(tensor), stride, dtype};
}

LayerView unpack_codes(const Tensor& layer) {
  const LayerView view = unpack(layer);
  STD_TORCH_CHECK(view.codes != nullptr, "layer: has no K codes");
  return view;
}

void score_codes(Tensor layer, Tensor query, Tensor seq_lens, Tensor block_table, Tensor block_lse,
                 Tensor chunk_lse, std::optional<Tensor> chunk_max, Tensor transformed, Tensor bias,
                 std::optional<Tensor> spans, double scale, std::optional<double> soft_cap,
                 int64_t together, int64_t splits, bool dependent, bool after_write) {
  const LayerView view = unpack_codes(layer);
  const int64_t num_requests = query.size(0), num_heads = view.num_kv_heads * view.group;
  Step step{};
  use_scores(step, view, seq_lens, block_lse, chunk_lse, kChunkTokens / view.block_tokens,
             num_requests, query);
  use_chunk_max(step, chunk_max, chunk_lse);
  check_block_table(block_table, num_requests, query);
  step.block_table = pointer<int>(block_table);
  step.table_stride = block_table.stride(0);
  check_tensor("transformed", transformed, ScalarType::Float,
               {num_requests, num_heads, view.head_size}, query);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(transformed.data_ptr()) % 16 == 0,
                  "transformed: must begin at a multiple of 16 bytes");
  check_tensor("bias", bias, ScalarType::Float, {num_requests, num_heads}, query);
  STD_TORCH_CHECK(scale > 0, "scale=", scale, ": must be above 0");
  const int2* its_spans = spans_of(spans, num_requests, query);
  STD_TORCH_CHECK(together >= 1 && (together == 1 || (spans && together * view.group <= kMaxGroup)),
                  "together=", together, ": needs spans, and at most ", kMaxGroup, " query heads");
  STD_TORCH_CHECK(splits >= 1 && splits <= kMaxBlocks, "splits=", splits, ": must be 1 to ",
                  kMaxBlocks);
  const int64_t num_lists = num_requests * view.num_kv_heads;
  STD_TORCH_CHECK(num_lists * splits < 1ll << 31, "splits=", splits, ": too many for ", num_lists,
                  " lists");
  step.num_lists = static_cast<int>(num_lists);
  const ScoreCodes score{heads_of("query", query, view, num_requests, num_heads, query),
                         pointer<float>(transformed),
                         pointer<float>(bias),
                         static_cast<float>(scale),
                         static_cast<int>(splits),
                         static_cast<int>(block_table.size(1)),
                         dependent && after_write,
                         its_spans,
                         static_cast<int>(together),
                         soft_cap_of(soft_cap)};
  // Without a column nobody has tokens.
  if (num_lists == 0 || block_table.size(1) == 0) return;
  const DeviceGuard guard(query.get_device_index());
  STD_CUDA_CHECK(launch_score_codes(view, step, score, dependent, current_stream(query)));
}

void attend_int8_rows(Tensor layer, Tensor blocks, Tensor counts, Tensor rows, Tensor seq_lens,
                      Tensor block_lse, Tensor query, Tensor bias, std::optional<Tensor> lse,
                      std::optional<Tensor> dropped, std::optional<Tensor> sinks, Tensor sums,
                      Tensor weights, Tensor arrivals, Tensor out, std::optional<Tensor> spans,
                      int64_t together, double scale, std::optional<double> soft_cap, double clip,
                      double clip_length, int64_t splits, int64_t least_tiles, int64_t every,
                      bool dependent) {
  const LayerView view = unpack_codes(layer);
  STD_TORCH_CHECK(view.int8_rows, "layer: its rows are not int8");
  const int64_t num_requests = blocks.size(0), num_heads = view.num_kv_heads * view.group;
  STD_TORCH_CHECK(num_requests * num_heads < 1ll << 31, "blocks: has ", num_requests,
                  " requests; too many for ", num_heads, " heads");
  Step step{};
  use_lists(step, view, blocks, counts);
  use_spans(step, view, spans, together, blocks);
  STD_TORCH_CHECK(together == 1 || !soft_cap, "soft_cap: not with lists of several rows");
  check_tensor("rows", rows, ScalarType::Int, {num_requests, view.num_kv_heads, blocks.size(2)},
               blocks);
  check_tensor("seq_lens", seq_lens, ScalarType::Int, {num_requests}, blocks);
  check_tensor("block_lse", block_lse, ScalarType::Float, {num_requests, num_heads, kAnySize},
               blocks);
  step.rows = pointer<int>(rows);
  step.seq_lens = pointer<int>(seq_lens);
  step.block_lse = pointer<float>(block_lse);
  step.max_blocks = static_cast<int>(block_lse.size(2));
  check_tensor("query", query, ScalarType::Float, {num_requests, num_heads, view.head_size},
               blocks);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(query.data_ptr()) % 16 == 0,
                  "query: must begin at a multiple of 16 bytes");
  check_tensor("bias", bias, ScalarType::Float, {num_requests, num_heads}, blocks);
  STD_TORCH_CHECK(scale > 0, "scale=", scale, ": must be above 0");
  const bool clips = clip >= 0;
  STD_TORCH_CHECK((!clips && !sinks) || (lse && dropped), "clip=", clip,
                  ", sinks: need lse and dropped");
  for (const auto& [name, tensor] : {std::pair("lse", &lse), {"dropped", &dropped}}) {
    if (*tensor) {
      check_tensor(name, **tensor, ScalarType::Float, {num_requests, num_heads}, blocks);
    }
  }
  if (sinks) check_tensor("sinks", *sinks, sinks->scalar_type(), {num_heads}, blocks);
  STD_TORCH_CHECK(clip_length > 0, "clip_length=", clip_length, ": must be above 0");
  for (const auto& [name, value] : {std::pair("splits", splits), {"least_tiles", least_tiles}}) {
    STD_TORCH_CHECK(value >= 1 && value <= kMaxBlocks, name, "=", value, ": must be 1 to ",
                    kMaxBlocks);
  }
  STD_TORCH_CHECK(every >= 1 && every < 1ll << 31, "every=", every, ": must be at least 1");
  STD_TORCH_CHECK(splits * step.num_lists < 1ll << 31, "splits=", splits, ": too many for ",
                  step.num_lists, " lists");
  STD_TORCH_CHECK(together == 1 || std::has_single_bit(static_cast<uint64_t>(least_tiles)),
                  "least_tiles=", least_tiles,
                  ": must be a power of two with lists of several rows");
  // With several rows to a list `splits` is of the launch, and each thread block may leave a part.
  const int64_t rows_of_parts = splits * (together > 1 ? together : step.num_lists);
  const int64_t parts = rows_of_parts * view.group * (clips ? 2 : 1);
  const int64_t padded = (view.head_size + 31) / 32 * 32;
  for (const auto& [name, tensor, size] :
       {std::tuple("sums", &sums, parts * padded), {"weights", &weights, parts * 2}}) {
    check_tensor(name, *tensor, ScalarType::Float, {kAnySize}, blocks);
    STD_TORCH_CHECK(
        tensor->size(0) >= size && reinterpret_cast<uintptr_t>(tensor->data_ptr()) % 16 == 0, name,
        ": has ", tensor->size(0), " values; must have at least ", size);
  }
  check_tensor("arrivals", arrivals, ScalarType::Int, {kAnySize}, blocks);
  STD_TORCH_CHECK(arrivals.size(0) >= step.num_lists, "arrivals: has ", arrivals.size(0),
                  " entries; must have at least ", step.num_lists);
  const AttendRows attend{pointer<float>(query),
                          pointer<float>(bias),
                          lse ? pointer<float>(*lse) : nullptr,
                          dropped ? pointer<float>(*dropped) : nullptr,
                          pointer<float>(sums),
                          pointer<float>(weights),
                          pointer<int>(arrivals),
                          heads_of("out", out, view, num_requests, num_heads, blocks),
                          static_cast<float>(scale),
                          static_cast<float>(clip),
                          static_cast<float>(clip_length),
                          static_cast<int>(splits),
                          static_cast<int>(least_tiles),
                          static_cast<int>(every),
                          soft_cap_of(soft_cap),
                          sinks ? pointer<char>(*sinks) : nullptr,
                          sinks ? dtype_of("sinks", *sinks) : Dtype::kFloat32};
  if (step.num_lists == 0) return;
  const DeviceGuard guard(blocks.get_device_index());
  STD_CUDA_CHECK(launch_attend_rows(view, step, attend, dependent, current_stream(blocks)));
}

void write_rows(Tensor layer, Tensor key, Tensor value, Tensor slot_mapping, int64_t parts,
                int64_t allocate_tokens, bool fills, int64_t most_thread_blocks, bool dependent) {
  const LayerView view = unpack_codes(layer);
  const int64_t num_tokens = slot_mapping.size(0);
  check_tensor("slot_mapping", slot_mapping, ScalarType::Long, {num_tokens}, key);
  STD_TORCH_CHECK(parts >= 1 && parts <= (kCodes | kRowHost | kRowSlot), "parts=", parts,
                  ": must be 1 to 7");
  STD_TORCH_CHECK(most_thread_blocks >= 0 && most_thread_blocks < 1ll << 31,
                  "most_thread_blocks=", most_thread_blocks, ": must be at least 0");
  const WriteRows write{heads_of("key", key, view, num_tokens, view.num_kv_heads, slot_mapping),
                        heads_of("value", value, view, num_tokens, view.num_kv_heads, slot_mapping),
                        pointer<int64_t>(slot_mapping),
                        num_tokens,
                        allocate_tokens,
                        fills,
                        static_cast<int>(parts)};
  STD_TORCH_CHECK(write.key.dtype == write.value.dtype, "value: must have the dtype of key");
  STD_TORCH_CHECK(num_tokens * view.num_kv_heads < 1 << 30, "slot_mapping: has ", num_tokens,
                  " tokens; too many for ", view.num_kv_heads, " KV heads");
  if (num_tokens == 0) return;
  const DeviceGuard guard(key.get_device_index());
  STD_CUDA_CHECK(launch_write_rows(view, write, static_cast<int>(most_thread_blocks), dependent,
                                   current_stream(key)));
}

void gather_rows(Tensor layer, Tensor page_table, Tensor starts, Tensor lengths, Tensor first_rows,
                 int64_t max_length, Tensor keys, Tensor values, int64_t most_thread_blocks) {
  const LayerView view = unpack_codes(layer);
  const int64_t num_requests = page_table.size(0);
  check_block_table(page_table, num_requests, keys);
  check_tensor("starts", starts, ScalarType::Int, {num_requests}, keys);
  check_tensor("lengths", lengths, ScalarType::Int, {num_requests}, keys);
  // One more says where the last run ends.
  check_tensor("first_rows", first_rows, ScalarType::Int, {kAnySize}, keys);
  STD_TORCH_CHECK(first_rows.size(0) >= num_requests, "first_rows: has ", first_rows.size(0),
                  " entries; must have at least ", num_requests);
  STD_TORCH_CHECK(max_length >= 0 && max_length < 1ll << 31, "max_length=", max_length,
                  ": must be at least 0");
  STD_TORCH_CHECK(most_thread_blocks >= 1 && most_thread_blocks < 1ll << 31,
                  "most_thread_blocks=", most_thread_blocks, ": must be at least 1");
  const GatherRows gather{pointer<int>(page_table),
                          pointer<int>(starts),
                          pointer<int>(lengths),
                          pointer<int>(first_rows),
                          page_table.stride(0),
                          static_cast<int>(num_requests),
                          static_cast<int>(max_length),
                          heads_of("keys", keys, view, kAnySize, view.num_kv_heads, keys),
                          heads_of("values", values, view, keys.size(0), view.num_kv_heads, keys)};
  STD_TORCH_CHECK(gather.keys.dtype == gather.values.dtype, "values: must have the dtype of keys");
  if (num_requests == 0 || max_length == 0) return;
  const DeviceGuard guard(keys.get_device_index());
  STD_CUDA_CHECK(
      launch_gather_rows(view, gather, static_cast<int>(most_thread_blocks), current_stream(keys)));
}

}  // namespace
}  // namespace kcache

#define KCACHE_LISTS \
  "Tensor(a!) blocks, Tensor(b!) counts, Tensor(c!) mass, Tensor(d!) lse, Tensor(e!)? dropped"
#define KCACHE_STEP                                                                         \
  "Tensor layer, Tensor seq_lens, Tensor block_table, Tensor block_lse, Tensor chunk_lse, " \
  "int chunk_blocks, " KCACHE_LISTS ", Tensor(f!) rows"

STABLE_TORCH_LIBRARY(kcache, library) {
  library.def(
      "layer_view(Tensor host_rows, Tensor slots, Tensor table, Tensor slot_word, Tensor state, "
      "Tensor counters, int layer, int num_kv_heads, int group, int page_tokens, "
      "int block_tokens, int top_n, float coverage, float mass_threshold, int threshold_length, "
      "int sink_blocks, "
      "int recent_tokens, bool combine_max, Tensor? codes=None, Tensor? mean=None, "
      "Tensor? deviation=None, int head_size=0, int value_bytes=0, bool int8_rows=False) -> "
      "Tensor");
  library.def(
      "select_blocks(Tensor layer, Tensor seq_lens, Tensor block_lse, Tensor chunk_lse, "
      "int chunk_blocks, " KCACHE_LISTS ") -> ()");
  library.def(
      "fetch_blocks(Tensor layer, Tensor blocks, Tensor counts, Tensor block_table, "
      "Tensor(a!) rows) -> ()");
  library.def(
      "select_and_fetch(" KCACHE_STEP
      ", Tensor(g!)? lists, Tensor? chunk_max, Tensor? spans, int together, bool dependent) "
      "-> ()");
  library.def(
      "follow_scores(" KCACHE_STEP
      ", Tensor(g!) lists, int splits, int most_thread_blocks, int least_thread_blocks) -> ()");
  library.def(
      "score_codes(Tensor layer, Tensor query, Tensor seq_lens, Tensor block_table, "
      "Tensor(a!) block_lse, Tensor(b!) chunk_lse, Tensor(e!)? chunk_max, "
      "Tensor(c!) transformed, Tensor(d!) bias, Tensor? spans, float scale, float? soft_cap, int "
      "together, int splits, bool dependent, "
      "bool after_write) -> ()");
  library.def(
      "attend_int8_rows(Tensor layer, Tensor blocks, Tensor counts, Tensor rows, Tensor seq_lens, "
      "Tensor block_lse, Tensor query, Tensor bias, Tensor? lse, Tensor? dropped, Tensor? sinks, "
      "Tensor(a!) sums, Tensor(b!) weights, Tensor(c!) arrivals, Tensor(d!) out, Tensor? spans, "
      "int together, float scale, float? soft_cap, float clip, float clip_length, int splits, "
      "int least_tiles, int every, bool dependent) -> ()");
  library.def(
      "write_rows(Tensor layer, Tensor key, Tensor value, Tensor slot_mapping, int parts, "
      "int allocate_tokens, bool fills, int most_thread_blocks, bool dependent) -> ()");
  library.def(
      "gather_rows(Tensor layer, Tensor page_table, Tensor starts, Tensor lengths, "
      "Tensor first_rows, int max_length, Tensor(a!) keys, Tensor(b!) values, "
      "int most_thread_blocks) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kcache, CUDA, library) {
  library.impl("layer_view", TORCH_BOX(&kcache::layer_view));
  library.impl("select_blocks", TORCH_BOX(&kcache::select_blocks));
  library.impl("fetch_blocks", TORCH_BOX(&kcache::fetch_blocks));
  library.impl("select_and_fetch", TORCH_BOX(&kcache::select_and_fetch));
  library.impl("follow_scores", TORCH_BOX(&kcache::follow_scores));
  library.impl("score_codes", TORCH_BOX(&kcache::score_codes));
  library.impl("attend_int8_rows", TORCH_BOX(&kcache::attend_int8_rows));
  library.impl("write_rows", TORCH_BOX(&kcache::write_rows));
  library.impl("gather_rows", TORCH_BOX(&kcache::gather_rows));
}
