// SPDX-License-Identifier: Apache-2.0
// Attention over the selected V blocks, from rows of int8, on tensor cores. Definition:
// vllm_kcache/reference/attend.py.
//
// A list has a thread block, or where it is long some, which take equal parts of it; a warp takes
// 16 tokens at once (tile.cuh), for four query heads. Sums of the warps are added up in shared
// memory, those of a list's thread blocks by the last of them.
//
// Tokens of a request may have one list (csrc/joint.cuh): then its query heads are those of all of
// them, each row of K and V is read once for all, and masked where a token did not select it. Long
// lists are cut so that all thread blocks run at once (shares.cuh).
#include "dependent.cuh"
#include "launch.h"
#include "weighted_sum.cuh"

namespace kcache {
namespace {

constexpr int kLookedAt = 32;  // tokens whose estimates are looked at

// Of a query head and four channels: V weighted, and the sum of weights; whole and clipped.
template <typename Z>
struct Sums {
  float4 four[Z::kSides] = {};
  float weight[Z::kSides] = {};
  float largest = 0.0f;  // without a clip: what the weights are measured by

  __device__ void add(int side, const float4& its, float its_weight, float factor) {
    four[side].x = fmaf(its.x, factor, four[side].x);
    four[side].y = fmaf(its.y, factor, four[side].y);
    four[side].z = fmaf(its.z, factor, four[side].z);
    four[side].w = fmaf(its.w, factor, four[side].w);
    weight[side] = fmaf(its_weight, factor, weight[side]);
  }
};

// Of the thread block, always in the same order. `dealt`: to as many sets of query heads the warps
// are.
template <typename Z>
__device__ inline Sums<Z> sums_of_warps(const Shared<Z>& shared, int dealt, int head, int four) {
  const int in_set = head % Z::kHeads, set = head / Z::kHeads;
  const int tile = in_set / kTileHeads, in_tile = in_set % kTileHeads;
  const int buffers = min(Z::kBuffers, Z::warps());
  Sums<Z> sums;
  if constexpr (!Z::kClip) sums.largest = shared.largest[set][in_set];
#pragma unroll 4
  for (int buffer = set; buffer < buffers; buffer += dealt) {
#pragma unroll
    for (int side = 0; side < Z::kSides; ++side) {
      const int row = row_of_sums<Z>(tile, side, in_tile);
      sums.add(side, reinterpret_cast<const float4*>(shared.sums[buffer][row])[four],
               shared.weights[buffer][row], 1.0f);
    }
  }
  return sums;
}

// The sums of a list's thread blocks, in the workspace.
template <typename Z>
class ListParts {
 public:
  __device__ ListParts(const LayerView& view, const Step& step, const AttendRows& attend,
                       const Part& part)
      : heads_(part.rows * view.group),
        stride_((Z::kJoint ? step.together * view.group : view.group) * Z::kSides),
        sums_(reinterpret_cast<float4*>(attend.sums)),
        weights_(reinterpret_cast<float2*>(attend.weights)),
        first_row_(static_cast<int64_t>(part.first) * stride_) {}

  __device__ void store(int number, int head, int four, const Sums<Z>& sums) const {
#pragma unroll
    for (int side = 0; side < Z::kSides; ++side) {
      const int64_t row = row_of(number, side, head);
      sums_[row * Z::kFours + four] = sums.four[side];
      if (four == 0) weights_[row] = float2{sums.largest, sums.weight[side]};
    }
  }

  // All of a list. Loads bypass the first-level cache, which does not see what other thread blocks
  // wrote.
  __device__ Sums<Z> add_up(int parts, int head, int four) const {
    constexpr int kAhead = (Z::kTiles > 1 ? 16 : 8) / Z::kSides;
    Sums<Z> all;
    if constexpr (!Z::kClip) all.largest = -1e30f;
#pragma unroll 1
    for (int first = 0; first < parts; first += kAhead) {
      float4 fours[kAhead][Z::kSides];
      float2 weights[kAhead][Z::kSides];
#pragma unroll
      for (int p = 0; p < kAhead; ++p) {
#pragma unroll
        for (int side = 0; side < Z::kSides; ++side) {
          const int64_t row = row_of(first + p, side, head);
          fours[p][side] = {};
          weights[p][side] = {-1e30f, 0.0f};
          if (first + p < parts) {
            fours[p][side] = __ldcg(sums_ + row * Z::kFours + four);
            weights[p][side] = __ldcg(weights_ + row);
          }
        }
      }
      if constexpr (!Z::kClip) {
        float larger = all.largest;
#pragma unroll
        for (int p = 0; p < kAhead; ++p) larger = fmaxf(larger, weights[p][0].x);
        const float rescale = fast_exp2(all.largest - larger);
        Sums<Z> rescaled;
        rescaled.largest = larger;
        rescaled.add(0, all.four[0], all.weight[0], rescale);
        all = rescaled;
      }
#pragma unroll
      for (int p = 0; p < kAhead; ++p) {
        float factor = 1.0f;
        if constexpr (!Z::kClip) factor = fast_exp2(weights[p][0].x - all.largest);
#pragma unroll
        for (int side = 0; side < Z::kSides; ++side) {
          all.add(side, fours[p][side], weights[p][side].y, factor);
        }
      }
    }
    return all;
  }

 private:
  __device__ int64_t row_of(int number, int side, int head) const {
    return first_row_ + number * stride_ + side * heads_ + head;
  }

  const int heads_, stride_;  // of a part, and from one to the next
  float4* const sums_;
  float2* const weights_;
  const int64_t first_row_;
};

__device__ inline void store_four(const Heads& out, int head_size, int64_t request, int head,
                                  int four, const float (&x)[4]) {
  char* to = head_of(out, head_size, request, head);
  if (out.dtype == Dtype::kFloat32) {
    reinterpret_cast<float4*>(to)[four] = float4{x[0], x[1], x[2], x[3]};
    return;
  }
  unsigned bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bits[i] = out.dtype == Dtype::kFloat16 ? float_to_half(x[i]) : float_to_bfloat16(x[i]);
  }
  reinterpret_cast<uint2*>(to)[four] = make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
}

// A query head of a row of the batch, of the model's.
struct Own {
  int row, head;

  __device__ Own(const LayerView& view, const Part& part, int head_of_list) {
    const int later = row_of_head(view, part.rows, head_of_list);
    row = part.row + later;
    head = (part.head - later) * view.group + head_of_list;
  }
  __device__ int64_t in_batch(const LayerView& view) const {
    return static_cast<int64_t>(row) * view.num_kv_heads * view.group + head;
  }
};

// Base-2 score of a query head's learned sink.
__device__ inline float sink_of(const AttendRows& attend, int head) {
  if (attend.sinks_dtype == Dtype::kFloat32) {
    return reinterpret_cast<const float*>(attend.sinks)[head] * kLog2E;
  }
  const unsigned bits = reinterpret_cast<const unsigned short*>(attend.sinks)[head];
  const bool is_half = attend.sinks_dtype == Dtype::kFloat16;
  return (is_half ? halves_to_floats(bits).x : __uint_as_float(bits << 16)) * kLog2E;
}

// What a sink leaves to the tokens of a list: vllm_kcache/reference/sinks.py. Those selected have
// the sum of weights, the others what is estimated.
template <typename Z>
__device__ inline float share_of_tokens(const LayerView& view, const AttendRows& attend,
                                        const Own& own, const Sums<Z>& sums) {
  const int64_t in_batch = own.in_batch(view);
  const float sink = sink_of(attend, own.head);
  const float estimated = attend.lse[in_batch] * kLog2E;
  const float unit = Z::kClip ? estimated - kUnitBits : sums.largest;
  const float ours = unit + fast_log2(fmaxf(sums.weight[0], 1e-30f));
  // -infinity where nothing is left out.
  const float others = estimated + fast_log2(fmaxf(attend.dropped[in_batch], 0.0f));
  const float more = fmaxf(ours, others);
  const float tokens = more + fast_log2(fast_exp2(ours - more) + fast_exp2(others - more));
  return fast_reciprocal(1.0f + fast_exp2(sink - tokens));
}

// With the clipped tail the dropped mass is shared out by the clipped weights. `head`: of the list.
template <typename Z>
__device__ inline void store_sums(const LayerView& view, const AttendRows& attend,
                                  const Shared<Z>& shared, const Part& part, int head, int four,
                                  const Sums<Z>& sums) {
  const Own own(view, part, head);
  float factor, share = 0.0f;
  if constexpr (Z::kClip) {
    const float dropped = fmaxf(shared.query.dropped[head], 0.0f) * kUnit;
    factor = 1.0f / fmaxf(sums.weight[0] + dropped, 1e-30f);
    share = factor * (dropped / fmaxf(sums.weight[1], 1e-30f));
  } else {
    factor = 1.0f / sums.weight[0];
  }
  if (attend.sinks != nullptr) {
    const float tokens = share_of_tokens(view, attend, own, sums);
    factor *= tokens;
    share *= tokens;
  }
  const float4& whole = sums.four[0];
  float x[4] = {whole.x * factor, whole.y * factor, whole.z * factor, whole.w * factor};
  if constexpr (Z::kClip) {
    const float4& clipped = sums.four[1];
    x[0] = fmaf(clipped.x, share, x[0]);
    x[1] = fmaf(clipped.y, share, x[1]);
    x[2] = fmaf(clipped.z, share, x[2]);
    x[3] = fmaf(clipped.w, share, x[3]);
  }
  store_four(attend.out, view.head_size, own.row, own.head, four, x);
}

// `visit` each query head of a list, a warp one, and each four of its channels, a lane one.
template <typename Z, typename Visit>
__device__ inline void for_each_four(const LayerView& view, int rows, const Visit& visit) {
#pragma unroll 1
  for (int head = threadIdx.x / 32; head < rows * view.group; head += Z::warps()) {
#pragma unroll 1
    for (int four = threadIdx.x & 31; four < view.head_size / 4; four += 32) visit(head, four);
  }
}

// Of all thread blocks of a list, the last that comes here: it sees what the others stored.
template <typename Z>
__device__ inline bool is_last(const LayerView& view, const AttendRows& attend, Shared<Z>& shared,
                               const Part& part) {
  __syncthreads();
  if (threadIdx.x == 0) {
    // Of all threads of the block: what came before their barrier comes before the fence.
    fence_gpu();
    int* arrivals = attend.arrivals + part.list(view);
    shared.last = atomicAdd(arrivals, 1) == part.of - 1;
    fence_gpu();
    if (shared.last) *arrivals = 0;  // for the next launch
  }
  __syncthreads();
  return shared.last;
}

// Word of the counters, from the first, that an error is counted in.
__device__ inline int estimate_bucket(float error) {
  // vllm_kcache/cache/hot_cache.py. What is above all, or no number, is in the last bucket.
  const float edges[kEstimateBuckets - 1] = {0.01f, 0.02f, 0.05f, 0.1f, 0.2f,
                                             0.5f,  1.0f,  2.0f,  5.0f};
  int bucket = 0;
#pragma unroll
  for (int i = 0; i < kEstimateBuckets - 1; ++i) bucket += error <= edges[i] ? 0 : 1;
  return bucket;
}

// A number that looks random.
__device__ inline unsigned hash_number(unsigned x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

__device__ inline unsigned below(unsigned random, unsigned bound) {
  return static_cast<unsigned>(static_cast<unsigned long long>(random) * bound >> 32);
}

// In one launch of some, drawn at random: how far the estimates are off of some V blocks of a list,
// drawn too. One thread block does it, of rows that the launch has just read.
template <typename Z>
__device__ inline void count_estimate_errors(const LayerView& view, const Step& step,
                                             const AttendRows& attend, Shared<Z>& shared) {
  const unsigned drawn = hash_number(shared.epoch);
  if (below(drawn, static_cast<unsigned>(attend.every)) != 0) return;
  const unsigned of_lists = hash_number(drawn), of_tokens = hash_number(of_lists);
  int list = static_cast<int>(below(of_lists, static_cast<unsigned>(step.num_lists))), rows = 1;
  if constexpr (Z::kJoint) {
    // The list that the row drawn has.
    const int num_rows = step.num_lists / view.num_kv_heads, drawn_row = list / view.num_kv_heads;
    const int row = drawn_row - min(step.spans[drawn_row].x, drawn_row) % step.together;
    list += (row - drawn_row) * view.num_kv_heads;
    rows = rows_led(step.spans[row], row, step.together, num_rows);
  }
  const int count = step.counts[list], block_tokens = view.block_tokens;
  if (count == 0) return;
  const ListRows<Z::kJoint> list_rows(view, step, list, count,
                                      step.seq_lens[list / view.num_kv_heads]);
  const int num_heads = rows * view.group, tiles = head_tiles(num_heads);
  constexpr int kTiles = kLookedAt / kTileTokens;
  const int chunks = (list_rows.tiles() + kTiles - 1) / kTiles;
  const int chunk = static_cast<int>(below(of_tokens, static_cast<unsigned>(chunks)));
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  float* all_scores = shared.sums[0][0];  // [heads, kLookedAt]
  prepare_query<Z::kTiles, Z::kClip>(shared.query, view, attend, list, rows, list_rows.num_tokens(),
                                     tiles * kTileHeads);
  __syncthreads();
  if (warp < tiles) {
    const int head = warp * kTileHeads + lane % 4;
    const Query<Z::kSteps, Z::kJoint, 1> query(shared.query, warp * kTileHeads);
    const RowBits<Z::kJoint, 1> rows_of_heads(view, rows, warp * kTileHeads);
#pragma unroll 1
    for (int tile = 0; tile < kTiles; ++tile) {
      const int number = chunk * kTiles + tile;
      const Token token = list_rows.find(number, list_rows.place(number));
      Keys<Z::kSteps> keys;
      Scales scales;
      float scores[1][2];
      keys.load_tile(true, token);
      scales.take<Z::kJoint>(token);
      multiply<Z::kCapped>(scores, query, keys, scales, rows_of_heads, attend.cap);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        all_scores[head * kLookedAt + tile * kTileTokens + token_of_score(i)] = scores[0][i];
      }
    }
  }
  __syncthreads();
  const int blocks = kLookedAt / block_tokens;
#pragma unroll 1
  for (int i = threadIdx.x; i < num_heads * blocks; i += 32 * Z::warps()) {
    const int head = i / blocks, column = chunk * blocks + i % blocks;
    if (column >= count) continue;
    const int entry = step.blocks[static_cast<int64_t>(list) * step.columns + column];
    if (Z::kJoint && !(entry >> kBlockBits >> row_of_head(view, rows, head) & 1)) continue;
    const float* scores = all_scores + head * kLookedAt + i % blocks * block_tokens;
    float largest = scores[0], sum = 0.0f;
#pragma unroll 1
    for (int token = 1; token < block_tokens; ++token) largest = fmaxf(largest, scores[token]);
#pragma unroll 1
    for (int token = 0; token < block_tokens; ++token) sum += fast_exp2(scores[token] - largest);
    const float refined = (largest + fast_log2(sum)) * kLn2;
    const int64_t place = head_in_batch(view, list, rows, head) * step.max_blocks;
    const int block = entry & (kMaxBlocks - 1);
    const float error = fabsf(step.block_lse[place + block] - refined);
    atomicAdd(view.counters + kFirstEstimateBucket + estimate_bucket(error), 1);
  }
}

// A warp's way through the tiles of a part: every n-th. A tile is on its way while the one before
// is weighted.
template <typename Z>
class Tiles {
  using WarpQuery = Query<Z::kSteps, Z::kJoint, Z::kTiles>;

 public:
  __device__ Tiles(const ListRows<Z::kJoint>& rows, const SoftCap& cap, int first, int stride,
                   int end, const RowBits<Z::kJoint, Z::kTiles>& rows_of_heads)
      : rows_(rows),
        cap_(cap),
        tile_(first),
        stride_(stride),
        end_(end),
        rows_of_heads_(rows_of_heads),
        next_(rows.place(first)) {
    load(first < end, here_, first);
  }

  __device__ void run(const WarpQuery& query, WeightedSum<Z>& sum) {
    // Registers cannot be numbered: two tiles a turn.
#pragma unroll 1
    while (take(query, sum, here_, ahead_) && take(query, sum, ahead_, here_)) {
    }
  }

 private:
  __device__ bool take(const WarpQuery& query, WeightedSum<Z>& sum, const Values<Z::kSteps>& values,
                       Values<Z::kSteps>& others) {
    if (tile_ >= end_) return false;
    Scales scales;
    float scores[Z::kTiles][2];
    scales.take<Z::kJoint>(token_);
    multiply<Z::kCapped>(scores, query, keys_, scales, rows_of_heads_, cap_);
    tile_ += stride_;
    load(tile_ < end_, others, tile_);
    sum.add(query, scores, scales, values);
    // With so many sums a multiprocessor has room for few warps, which do not hide a load.
    if (Z::kTiles > 1 && tile_ + stride_ < end_) rows_.fetch_ahead(tile_ + stride_, next_);
    return true;
  }
  __device__ void load(bool wanted, Values<Z::kSteps>& values, int tile) {
    token_ = rows_.find(tile, next_);
    keys_.load_tile(wanted, token_);
    values.load_tile(wanted, token_, rows_.value_distance());
    next_ = rows_.place(tile + stride_);
  }

  const ListRows<Z::kJoint>& rows_;
  const SoftCap& cap_;
  int tile_;
  const int stride_, end_;
  const RowBits<Z::kJoint, Z::kTiles> rows_of_heads_;
  typename ListRows<Z::kJoint>::Place next_;  // of the tile after those that are loaded
  Token token_ = {};
  Keys<Z::kSteps> keys_;
  Values<Z::kSteps> here_, ahead_;
};

// V of the part of a list, weighted; in shared memory, with the weights. A barrier comes after it.
template <typename Z>
__device__ inline void attend_part(const LayerView& view, const AttendRows& attend,
                                   Shared<Z>& shared, const ListRows<Z::kJoint>& rows,
                                   const Part& part) {
  const int num_heads = part.rows * view.group;
  const int warp = threadIdx.x / 32, dealt = sets_of_heads<Z>(num_heads);
  const int first_head = warp % dealt * Z::kHeads;
  Tiles<Z> way(rows, attend.cap, part.begin + warp / dealt, Z::warps() / dealt,
               first_head < num_heads ? part.end : 0, {view, part.rows, first_head});
  prepare_query<Z::kTiles, Z::kClip>(shared.query, view, attend, part.list(view), part.rows,
                                     rows.num_tokens(), dealt * Z::kHeads);
  WeightedSum<Z> sum;
  __syncthreads();
  const Query<Z::kSteps, Z::kJoint, Z::kTiles> query(shared.query, first_head);
  way.run(query, sum);
  sum.leave(shared, warp, dealt);
}

// The result of the list, by the last of its thread blocks.
template <typename Z>
__device__ inline void attend_list(const LayerView& view, const Step& step,
                                   const AttendRows& attend, Shared<Z>& shared,
                                   const ListRows<Z::kJoint>& rows, const Part& part) {
  attend_part(view, attend, shared, rows, part);
  __syncthreads();
  const int dealt = sets_of_heads<Z>(part.rows * view.group);
  if (part.of == 1) {
    for_each_four<Z>(view, part.rows, [&](int head, int four) {
      store_sums(view, attend, shared, part, head, four, sums_of_warps(shared, dealt, head, four));
    });
  } else {
    const ListParts<Z> parts(view, step, attend, part);
    for_each_four<Z>(view, part.rows, [&](int head, int four) {
      parts.store(part.number, head, four, sums_of_warps(shared, dealt, head, four));
    });
    if (is_last(view, attend, shared, part)) {
      for_each_four<Z>(view, part.rows, [&](int head, int four) {
        store_sums(view, attend, shared, part, head, four, parts.add_up(part.of, head, four));
      });
    }
  }
}

// A thread block's part of a list of `count` V blocks, the first row of which has `num_tokens`.
template <typename Z>
__device__ inline void attend_rows(const LayerView& view, const Step& step,
                                   const AttendRows& attend, Shared<Z>& shared, const Part& part,
                                   int count, int num_tokens) {
  if (part.number >= part.of) return;
  if (count == 0) {
    for_each_four<Z>(view, part.rows, [&](int head, int four) {
      const Own own(view, part, head);
      store_four(attend.out, view.head_size, own.row, own.head, four, {});
    });
    return;
  }
  const ListRows<Z::kJoint> rows(view, step, part.list(view), count, num_tokens);
  attend_list(view, step, attend, shared, rows, part);
}

// Rows that pad the batch, which no list is of. Reads lengths, which no launch of a step writes,
// and writes what the launch before does not look at.
template <typename Z>
__device__ inline void store_padding(const LayerView& view, const Step& step,
                                     const AttendRows& attend) {
  const int num_rows = step.num_lists / view.num_kv_heads;
#pragma unroll 1
  for (int row = blockIdx.x; row < num_rows; row += gridDim.x) {
    if (step.seq_lens[row] != 0) continue;
    for_each_four<Z>(view, view.num_kv_heads, [&](int head, int four) {
      store_four(attend.out, view.head_size, row, head, four, {});
    });
  }
}

template <typename Z>
__global__ void __launch_bounds__(32 * kMostWarps, Z::kLeastBlocks)
    attend_kernel(const __grid_constant__ LayerView view, const __grid_constant__ Step step,
                  const __grid_constant__ AttendRows attend) {
  using SharedSums = Shared<Z>;
  __shared__ SharedSums shared;
  if constexpr (Z::kJoint) store_padding<Z>(view, step, attend);
  wait_for_launch_before();
  if constexpr (Z::kJoint) {
    int number = static_cast<int>(blockIdx.x);
#pragma unroll 1
    do {
      find_part(view, step, shared.shares, number, attend.least_tiles);
      __syncthreads();
      const Part& part = shared.shares.part;
      if (part.rows > 0) {
        attend_rows(view, step, attend, shared, part, shared.shares.count,
                    shared.shares.num_tokens);
      }
      number += static_cast<int>(gridDim.x);
      __syncthreads();
    } while (number < shared.shares.total);
  } else {
    // A thread block finds its place without a division.
    const int row = static_cast<int>(blockIdx.y), head = static_cast<int>(blockIdx.x);
    const int list = row * static_cast<int>(gridDim.x) + head, count = step.counts[list];
    const Part part = part_of(attend, row, head, list * attend.splits, static_cast<int>(blockIdx.z),
                              tiles_of(view, count));
    attend_rows(view, step, attend, shared, part, count, step.seq_lens[row]);
  }
  if (blockIdx.x != 0 || blockIdx.y != 0 || blockIdx.z != 0) return;
  // The step's epoch ends here: this is its last launch, and no other thread block of it looks at
  // the epoch.
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.epoch = static_cast<unsigned>(view.state[kEpoch]);
    view.state[kEpoch] = static_cast<int>(shared.epoch + 1);
  }
  __syncthreads();
  count_estimate_errors(view, step, attend, shared);
}

// Warps of a thread block: half of the most where otherwise only one of two that there are for a
// multiprocessor would have room there.
template <typename Z>
cudaError_t warps_of(const AttendRows& attend, int& warps) {
  warps = kMostWarps;
  if constexpr (Z::kTiles > 1) {
    int device, multiprocessors;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    if (attend.splits > multiprocessors) warps = kMostWarps / 2;
  }
  return cudaSuccess;
}

template <int kSteps, bool kCapped, bool kJoint, int kTiles>
cudaError_t launch_tiles(const LayerView& view, const Step& step, const AttendRows& attend,
                         bool dependent, cudaStream_t stream) {
  const auto launch = [&](auto size) {
    int warps;
    if (const cudaError_t error = warps_of<decltype(size)>(attend, warps)) return error;
    const int num_rows = step.num_lists / view.num_kv_heads;
    const dim3 grid =
        kJoint ? dim3(attend.splits) : dim3(view.num_kv_heads, num_rows, attend.splits);
    return launch_kernel(dependent, attend_kernel<decltype(size)>, grid, 32 * warps, stream, view,
                         step, attend);
  };
  return attend.clip < 0 ? launch(Size<kSteps, false, kCapped, kJoint, kTiles>{})
                         : launch(Size<kSteps, true, kCapped, kJoint, kTiles>{});
}

template <int kSteps, bool kCapped, bool kJoint>
cudaError_t launch_steps(const LayerView& view, const Step& step, const AttendRows& attend,
                         bool dependent, cudaStream_t stream) {
  if constexpr (kJoint && kSteps <= 4) {
    const int tiles = head_tiles(step.together * view.group);
    if (tiles == 4) {
      return launch_tiles<kSteps, kCapped, kJoint, 4>(view, step, attend, dependent, stream);
    }
    if (tiles == 2) {
      return launch_tiles<kSteps, kCapped, kJoint, 2>(view, step, attend, dependent, stream);
    }
  }
  return launch_tiles<kSteps, kCapped, kJoint, 1>(view, step, attend, dependent, stream);
}

template <bool kCapped, bool kJoint>
cudaError_t launch_sizes(const LayerView& view, const Step& step, const AttendRows& attend,
                         bool dependent, cudaStream_t stream) {
  switch ((view.head_size + 31) / 32) {
    case 2:
      return launch_steps<2, kCapped, kJoint>(view, step, attend, dependent, stream);
    case 3:
      return launch_steps<3, kCapped, kJoint>(view, step, attend, dependent, stream);
    case 4:
      return launch_steps<4, kCapped, kJoint>(view, step, attend, dependent, stream);
    case 8:
      return launch_steps<8, kCapped, kJoint>(view, step, attend, dependent, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_attend_rows(const LayerView& view, const Step& step, const AttendRows& attend,
                               bool dependent, cudaStream_t stream) {
  // Several rows have a list only where nothing caps their scores.
  if (step.together > 1) return launch_sizes<false, true>(view, step, attend, dependent, stream);
  return attend.cap.most == 0 ? launch_sizes<false, false>(view, step, attend, dependent, stream)
                              : launch_sizes<true, false>(view, step, attend, dependent, stream);
}

}  // namespace kcache
