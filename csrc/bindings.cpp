// SPDX-License-Identifier: Apache-2.0
// Schemas and checked entry points of the CUDA operations, on PyTorch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"
#include "launch.h"

namespace kcache {
namespace {

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

Word* counter_pointer(const std::optional<Tensor>& counters, const Tensor& beside) {
  if (!counters.has_value()) return nullptr;
  check_tensor("counters", *counters, ScalarType::Long, {kCounterWords}, beside);
  return pointer<Word>(*counters);
}

SelectArgs select_args(const Tensor& block_lse, const Tensor& seq_lens, int64_t v_block_tokens,
                       int64_t top_n, double coverage, double mass_threshold, int64_t sink_blocks,
                       int64_t recent_tokens, bool combine_max, const Tensor& blocks,
                       const Tensor& counts, const Tensor& mass, const std::optional<Tensor>& lse,
                       const std::optional<Tensor>& counters,
                       const std::optional<Tensor>& chunk_lse, int64_t chunk_blocks) {
  check_tensor("block_lse", block_lse, ScalarType::Float, {kAnySize, kAnySize, kAnySize},
               block_lse);
  const int64_t num_requests = block_lse.size(0), num_heads = block_lse.size(1);
  check_tensor("seq_lens", seq_lens, ScalarType::Int, {num_requests}, block_lse);
  check_tensor("blocks", blocks, ScalarType::Int, {num_requests, kAnySize, kAnySize}, block_lse);
  const int64_t num_kv_heads = blocks.size(1);
  check_tensor("counts", counts, ScalarType::Int, {num_requests, num_kv_heads}, block_lse);
  check_tensor("mass", mass, ScalarType::Float, {num_requests, num_kv_heads}, block_lse);
  STD_TORCH_CHECK(
      num_kv_heads > 0 && num_heads % num_kv_heads == 0 && num_heads / num_kv_heads <= kMaxGroup,
      "block_lse: has ", num_heads, " query heads for ", num_kv_heads,
      " KV heads; a KV head must have 1 to ", kMaxGroup);
  const int64_t max_blocks = block_lse.size(2);
  STD_TORCH_CHECK(max_blocks <= kMaxBlocks, "block_lse: has P=", max_blocks,
                  " V blocks a request; at most ", kMaxBlocks, " fit the GPU's shared memory");
  STD_TORCH_CHECK(v_block_tokens >= 1, "v_block_tokens=", v_block_tokens, ": must be at least 1");
  STD_TORCH_CHECK(recent_tokens >= 1, "recent_tokens=", recent_tokens, ": must be at least 1");
  STD_TORCH_CHECK(coverage < 0 || mass_threshold < 0, "mass_threshold=", mass_threshold,
                  ": not together with coverage=", coverage);
  STD_TORCH_CHECK(top_n == -1 || top_n >= 1, "top_n=", top_n,
                  ": must be at least 1, or -1 for no cap");
  const int64_t needed = top_n < 0 ? max_blocks : std::min(top_n, max_blocks);
  STD_TORCH_CHECK(blocks.size(2) >= needed, "blocks: has N=", blocks.size(2),
                  " columns; must have at least ", needed);
  SelectArgs args{};
  args.block_lse = pointer<float>(block_lse);
  args.seq_lens = pointer<int>(seq_lens);
  args.blocks = pointer<int>(blocks);
  args.counts = pointer<int>(counts);
  args.mass = pointer<float>(mass);
  if (lse.has_value()) {
    check_tensor("lse", *lse, ScalarType::Float, {num_requests, num_heads}, block_lse);
    args.lse = pointer<float>(*lse);
  }
  args.counters = counter_pointer(counters, block_lse);
  if (chunk_lse.has_value()) {
    check_tensor("chunk_lse", *chunk_lse, ScalarType::Float, {num_requests, num_heads, kAnySize},
                 block_lse);
    STD_TORCH_CHECK(chunk_blocks >= 1, "chunk_blocks=", chunk_blocks, ": must be at least 1");
    STD_TORCH_CHECK(chunk_lse->size(2) * chunk_blocks >= max_blocks,
                    "chunk_lse: has C=", chunk_lse->size(2), " chunks of ", chunk_blocks,
                    " V blocks for P=", max_blocks);
    args.chunk_lse = pointer<float>(*chunk_lse);
    args.max_chunks = static_cast<int>(chunk_lse->size(2));
    args.chunk_blocks = static_cast<int>(chunk_blocks);
  }
  args.v_block_tokens = static_cast<int>(v_block_tokens);
  args.group = static_cast<int>(num_heads / num_kv_heads);
  args.num_kv_heads = static_cast<int>(num_kv_heads);
  args.max_blocks = static_cast<int>(max_blocks);
  args.columns = static_cast<int>(blocks.size(2));
  args.top_n = static_cast<int>(top_n);
  args.coverage = static_cast<float>(coverage);
  args.mass_threshold = static_cast<float>(mass_threshold);
  args.sink_blocks = static_cast<int>(sink_blocks);
  args.recent_tokens = static_cast<int>(recent_tokens);
  args.combine_max = combine_max;
  return args;
}

HeadRange head_range(const Tensor& blocks, int64_t first_head, int64_t num_heads) {
  STD_TORCH_CHECK(first_head >= 0 && num_heads >= 0 && first_head + num_heads <= blocks.size(1),
                  "first_head=", first_head, ", num_heads=", num_heads, ": must lie in 0 to ",
                  blocks.size(1));
  STD_TORCH_CHECK(blocks.size(0) <= 65535, "blocks: has ", blocks.size(0),
                  " requests; must be at most 65535");
  return HeadRange{static_cast<int>(blocks.size(0)), static_cast<int>(first_head),
                   static_cast<int>(num_heads)};
}

FetchArgs fetch_args(const Tensor& blocks, const Tensor& block_table, const Tensor& v_pool,
                     int64_t v_block_tokens, int64_t layer, bool hot, const Tensor& rows,
                     const Tensor& v_rows, const Tensor& table, const Tensor& slot_word,
                     const Tensor& state, const Tensor& counters) {
  const int64_t num_requests = blocks.size(0);
  check_host_pool(v_pool, v_rows, v_block_tokens);
  check_tensor("rows", rows, ScalarType::Int, {num_requests, v_pool.size(1), blocks.size(2)},
               blocks);
  STD_TORCH_CHECK(blocks.size(1) == v_pool.size(1), "blocks: has ", blocks.size(1),
                  " KV heads; v_pool has ", v_pool.size(1));
  check_block_table(block_table, num_requests, blocks);
  const int64_t layer_rows = v_pool.size(0) * v_pool.size(1) * v_pool.size(2) / v_block_tokens;
  FetchArgs args{};
  if (hot) {
    check_tensor("table", table, ScalarType::Int, {kAnySize, layer_rows}, blocks);
    check_tensor("slot_word", slot_word, ScalarType::Long, {v_rows.size(0)}, blocks);
    check_tensor("state", state, ScalarType::Int, {kStateWords}, blocks);
    check_tensor("counters", counters, ScalarType::Long, {kCounterWords}, blocks);
    STD_TORCH_CHECK(layer >= 0 && layer < table.size(0), "layer=", layer, ": must be 0 to ",
                    table.size(0) - 1);
    STD_TORCH_CHECK(v_rows.size(0) >= 1, "v_rows: the hot V cache has no slots");
    args.cache = Residency{pointer<int>(table), pointer<Word>(slot_word), pointer<int>(state),
                           static_cast<unsigned>(v_rows.size(0))};
    args.counters = pointer<Word>(counters);
    args.layer_rows = layer * layer_rows;
  }
  args.hot = hot;
  args.block_table = pointer<int>(block_table);
  args.table_stride = block_table.stride(0);
  args.v_pool = pointer<char>(v_pool);
  args.v_rows = pointer<char>(v_rows);
  args.num_rows = v_rows.size(0);
  args.rows = pointer<int>(rows);
  args.blocks_per_page = static_cast<int>(v_pool.size(2) / v_block_tokens);
  args.num_kv_heads = static_cast<int>(v_pool.size(1));
  args.columns = static_cast<int>(blocks.size(2));
  args.row_bytes = static_cast<int>(v_block_tokens * v_pool.size(3) * v_pool.element_size());
  return args;
}

// Misses go to a list that copy_misses works off, and are counted in a word of `state`.
void use_miss_list(FetchArgs& args, const Tensor& miss_list, int64_t wave, const Tensor& blocks,
                   int64_t num_heads) {
  check_tensor("miss_list", miss_list, ScalarType::Int, {kAnySize, 2}, blocks);
  STD_TORCH_CHECK(wave >= 0 && wave < kMaxWaves, "wave=", wave, ": must be 0 to ", kMaxWaves - 1);
  const int64_t needed = blocks.size(0) * num_heads * blocks.size(2);
  STD_TORCH_CHECK(miss_list.size(0) >= needed, "miss_list: has ", miss_list.size(0),
                  " entries; must have at least ", needed);
  args.miss_list = pointer<int2>(miss_list);
  args.miss_count = args.cache.state + kFirstMissCount + wave;
}

void select_blocks(Tensor block_lse, Tensor seq_lens, int64_t v_block_tokens, int64_t top_n,
                   double coverage, double mass_threshold, int64_t sink_blocks,
                   int64_t recent_tokens, bool combine_max, int64_t first_head, int64_t num_heads,
                   Tensor blocks, Tensor counts, Tensor mass, std::optional<Tensor> lse,
                   std::optional<Tensor> counters, std::optional<Tensor> chunk_lse,
                   int64_t chunk_blocks) {
  SelectArgs args = select_args(block_lse, seq_lens, v_block_tokens, top_n, coverage,
                                mass_threshold, sink_blocks, recent_tokens, combine_max, blocks,
                                counts, mass, lse, counters, chunk_lse, chunk_blocks);
  args.pad = true;
  const HeadRange range = head_range(blocks, first_head, num_heads);
  if (range.num_requests == 0 || range.num_heads == 0) return;
  const DeviceGuard guard(block_lse.get_device_index());
  STD_CUDA_CHECK(launch_select(args, range, current_stream(block_lse)));
}

void fetch_blocks(Tensor blocks, Tensor counts, Tensor block_table, Tensor v_pool,
                  int64_t v_block_tokens, int64_t layer, bool hot, Tensor rows, Tensor v_rows,
                  Tensor table, Tensor slot_word, Tensor state, Tensor counters) {
  check_tensor("blocks", blocks, ScalarType::Int, {kAnySize, kAnySize, kAnySize}, blocks);
  check_tensor("counts", counts, ScalarType::Int, {blocks.size(0), blocks.size(1)}, blocks);
  FetchArgs args = fetch_args(blocks, block_table, v_pool, v_block_tokens, layer, hot, rows, v_rows,
                              table, slot_word, state, counters);
  args.pad = true;
  const HeadRange range = head_range(blocks, 0, blocks.size(1));
  if (range.num_requests == 0 || range.num_heads == 0) return;
  const DeviceGuard guard(blocks.get_device_index());
  STD_CUDA_CHECK(launch_fetch(args, pointer<int>(blocks), pointer<int>(counts), range,
                              current_stream(blocks)));
}

// The columns past the end of a list are left alone: `counts` says where it ends.
void select_fetch(Tensor block_lse, Tensor seq_lens, int64_t v_block_tokens, int64_t top_n,
                  double coverage, double mass_threshold, int64_t sink_blocks,
                  int64_t recent_tokens, bool combine_max, int64_t first_head, int64_t num_heads,
                  Tensor blocks, Tensor counts, Tensor mass, std::optional<Tensor> lse,
                  std::optional<Tensor> chunk_lse, int64_t chunk_blocks, Tensor block_table,
                  Tensor v_pool, int64_t layer, Tensor rows, Tensor v_rows, Tensor table,
                  Tensor slot_word, Tensor state, Tensor counters, std::optional<Tensor> miss_list,
                  int64_t wave, bool dependent) {
  const SelectArgs select = select_args(
      block_lse, seq_lens, v_block_tokens, top_n, coverage, mass_threshold, sink_blocks,
      recent_tokens, combine_max, blocks, counts, mass, lse, counters, chunk_lse, chunk_blocks);
  FetchArgs fetch = fetch_args(blocks, block_table, v_pool, v_block_tokens, layer, true, rows,
                               v_rows, table, slot_word, state, counters);
  if (miss_list.has_value()) use_miss_list(fetch, *miss_list, wave, blocks, num_heads);
  const HeadRange range = head_range(blocks, first_head, num_heads);
  if (range.num_requests == 0 || range.num_heads == 0) return;
  const DeviceGuard guard(block_lse.get_device_index());
  STD_CUDA_CHECK(launch_select_fetch(select, fetch, range, dependent, current_stream(block_lse)));
}

// As select_fetch for all heads, beside the score kernel that counts in `parts_scored`. `state` is
// that of the epoch before; it moves on when the call ends.
void follow_scores(Tensor block_lse, Tensor seq_lens, int64_t v_block_tokens, int64_t top_n,
                   double coverage, double mass_threshold, int64_t sink_blocks,
                   int64_t recent_tokens, bool combine_max, Tensor blocks, Tensor counts,
                   Tensor mass, std::optional<Tensor> lse, std::optional<Tensor> chunk_lse,
                   int64_t chunk_blocks, Tensor block_table, Tensor v_pool, int64_t layer,
                   Tensor rows, Tensor v_rows, Tensor table, Tensor slot_word, Tensor state,
                   Tensor counters, Tensor parts_scored, int64_t parts, int64_t most_thread_blocks,
                   int64_t least_thread_blocks) {
  const SelectArgs select = select_args(
      block_lse, seq_lens, v_block_tokens, top_n, coverage, mass_threshold, sink_blocks,
      recent_tokens, combine_max, blocks, counts, mass, lse, counters, chunk_lse, chunk_blocks);
  FetchArgs fetch = fetch_args(blocks, block_table, v_pool, v_block_tokens, layer, true, rows,
                               v_rows, table, slot_word, state, counters);
  fetch.epochs_ahead = 1;
  const int64_t num_lists = blocks.size(0) * blocks.size(1);
  check_tensor("parts_scored", parts_scored, ScalarType::Int, {kAnySize}, blocks);
  STD_TORCH_CHECK(parts_scored.size(0) >= num_lists, "parts_scored: has ", parts_scored.size(0),
                  " entries; must have at least ", num_lists);
  STD_TORCH_CHECK(parts >= 1, "parts=", parts, ": must be at least 1");
  // More could leave the score kernel no place to run, and both would wait for ever.
  STD_TORCH_CHECK(most_thread_blocks >= 1 && most_thread_blocks <= 128,
                  "most_thread_blocks=", most_thread_blocks, ": must be 1 to 128");
  STD_TORCH_CHECK(least_thread_blocks >= 1 && least_thread_blocks <= most_thread_blocks,
                  "least_thread_blocks=", least_thread_blocks, ": must be 1 to ",
                  most_thread_blocks);
  if (num_lists == 0) return;
  const int64_t most = std::min(most_thread_blocks, num_lists);
  const FollowArgs follow{pointer<int>(parts_scored), static_cast<int>(parts),
                          static_cast<int>(num_lists),
                          static_cast<int>(std::min(least_thread_blocks, most))};
  const DeviceGuard guard(block_lse.get_device_index());
  STD_CUDA_CHECK(
      launch_follow(select, fetch, follow, static_cast<int>(most), current_stream(block_lse)));
}

void copy_misses(Tensor miss_list, Tensor state, int64_t wave, Tensor v_pool,
                 int64_t v_block_tokens, Tensor v_rows, int64_t num_thread_blocks) {
  check_tensor("miss_list", miss_list, ScalarType::Int, {kAnySize, 2}, miss_list);
  check_tensor("state", state, ScalarType::Int, {kStateWords}, miss_list);
  check_host_pool(v_pool, v_rows, v_block_tokens);
  STD_TORCH_CHECK(wave >= 0 && wave < kMaxWaves, "wave=", wave, ": must be 0 to ", kMaxWaves - 1);
  STD_TORCH_CHECK(num_thread_blocks >= 1 && num_thread_blocks <= 1024,
                  "num_thread_blocks=", num_thread_blocks, ": must be 1 to 1024");
  FetchArgs args{};
  args.v_pool = pointer<char>(v_pool);
  args.v_rows = pointer<char>(v_rows);
  args.row_bytes = static_cast<int>(v_block_tokens * v_pool.size(3) * v_pool.element_size());
  args.miss_list = pointer<int2>(miss_list);
  args.miss_count = pointer<int>(state) + kFirstMissCount + wave;
  const DeviceGuard guard(miss_list.get_device_index());
  STD_CUDA_CHECK(
      launch_copy_misses(args, static_cast<int>(num_thread_blocks), current_stream(miss_list)));
}

}  // namespace
}  // namespace kcache

#define KCACHE_SELECT_SCHEMA                                                               \
  "Tensor block_lse, Tensor seq_lens, int v_block_tokens, int top_n, float coverage, "     \
  "float mass_threshold, int sink_blocks, int recent_tokens, bool combine_max, "           \
  "int first_head, int num_heads, Tensor(a!) blocks, Tensor(b!) counts, Tensor(c!) mass, " \
  "Tensor(d!)? lse"

STABLE_TORCH_LIBRARY(kcache, library) {
  library.def("select_blocks(" KCACHE_SELECT_SCHEMA
              ", Tensor(e!)? counters, Tensor? chunk_lse, int chunk_blocks) -> ()");
  library.def(
      "fetch_blocks(Tensor blocks, Tensor counts, Tensor block_table, Tensor v_pool, "
      "int v_block_tokens, int layer, bool hot, Tensor(a!) rows, Tensor(b!) v_rows, "
      "Tensor(c!) table, Tensor(d!) slot_word, Tensor(e!) state, Tensor(f!) counters) -> ()");
  library.def(
      "select_fetch(" KCACHE_SELECT_SCHEMA
      ", Tensor? chunk_lse, int chunk_blocks, Tensor block_table, Tensor v_pool, int layer, "
      "Tensor(e!) rows, Tensor(f!) v_rows, "
      "Tensor(g!) table, Tensor(h!) slot_word, Tensor(i!) state, Tensor(j!) counters, "
      "Tensor(k!)? miss_list, int wave, bool dependent) -> ()");
  library.def(
      "follow_scores(Tensor block_lse, Tensor seq_lens, int v_block_tokens, int top_n, "
      "float coverage, float mass_threshold, int sink_blocks, int recent_tokens, "
      "bool combine_max, Tensor(a!) blocks, Tensor(b!) counts, Tensor(c!) mass, "
      "Tensor(d!)? lse, Tensor? chunk_lse, int chunk_blocks, Tensor block_table, "
      "Tensor v_pool, int layer, Tensor(e!) rows, "
      "Tensor(f!) v_rows, Tensor(g!) table, Tensor(h!) slot_word, Tensor(i!) state, "
      "Tensor(j!) counters, Tensor(k!) parts_scored, int parts, int most_thread_blocks, "
      "int least_thread_blocks) -> ()");
  library.def(
      "copy_misses(Tensor miss_list, Tensor state, int wave, Tensor v_pool, int v_block_tokens, "
      "Tensor(a!) v_rows, int num_thread_blocks) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kcache, CUDA, library) {
  library.impl("select_blocks", TORCH_BOX(&kcache::select_blocks));
  library.impl("fetch_blocks", TORCH_BOX(&kcache::fetch_blocks));
  library.impl("select_fetch", TORCH_BOX(&kcache::select_fetch));
  library.impl("follow_scores", TORCH_BOX(&kcache::follow_scores));
  library.impl("copy_misses", TORCH_BOX(&kcache::copy_misses));
}
