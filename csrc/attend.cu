// SPDX-License-Identifier: Apache-2.0
// Attention over the selected V blocks, from rows of int8, on tensor cores. Definition:
// vllm_kcache/reference/attend.py.
//
// A warp takes 16 tokens of a list at once (tile.cuh). In the products with V the upper eight rows
// are weighted with the probabilities, the lower ones with the clipped.
//
// Weights of V are float16. Times V's scale they could leave its range at either end, so a warp
// keeps a power of two for each query head, by the largest that it has met: the estimate of one may
// be far below its scores, and its weights far above those of the others.
#include "dependent.cuh"
#include "launch.h"
#include "runs.cuh"
#include "tile.cuh"

namespace kcache {
namespace {

constexpr int kTileHeads = 8;         // query heads of a warp
constexpr int kMaxTiles = 2;          // of query heads; warps are dealt to them
constexpr int kLookedAt = 32;         // tokens whose estimates are looked at
constexpr unsigned kRangeBits = 11;   // the largest weight of V begins at 2^11,
constexpr float kRange = 60000.0f;    // and may grow to this
constexpr float kUnit = 128.0f;       // weights are in parts of the estimated total
constexpr float kUnitBits = 7.0f;     // base-2 logarithm of it
constexpr float kMostWeight = 1e30f;  // an estimate may be far below a score
static_assert(kMaxTiles * kTileHeads == kMaxGroup);

// A kernel is compiled for `kSteps`, products that a head of K takes, and for the clipped tail.
template <int kSteps_, bool kClip_>
struct Size {
  static constexpr int kSteps = kSteps_;
  static constexpr bool kClip = kClip_;
  static constexpr int kSides = kClip ? 2 : 1;
  static constexpr int kChannels = 32 * kSteps;              // of a head, with those that pad it
  static constexpr int kColumns = 4 * kSteps;                // products that a head of V takes
  static constexpr int kStride = kChannels + 4;              // of sums in shared memory
  static constexpr int kBuffers = kSteps == 8 ? 2 : kWarps;  // of warps' sums: 48 KiB hold no more
  static constexpr int kLeastBlocks = kSteps == 8 ? 2 : kSteps == 4 ? 3 : 4;
};

// Sums of a thread block: of each warp, or of each two, its query heads' rows. In the end the first
// warp's of a tile of query heads has those of all.
template <typename Z>
struct Shared {
  float sums[Z::kBuffers][Z::kSides * kTileHeads][Z::kStride];
  float weights[Z::kBuffers][Z::kSides * kTileHeads];
  float largest[kWarps][kTileHeads], all_largest[kMaxTiles][kTileHeads];
  RunsShared runs;
  Part part;
  unsigned epoch;
  bool last;

  // Rows of a list: one of each query head, then, with a clip, one more of each.
  __device__ float* sum(int side, int head) {
    return sums[head / kTileHeads][side * kTileHeads + head % kTileHeads];
  }
  __device__ float& weight(int side, int head) {
    return weights[head / kTileHeads][side * kTileHeads + head % kTileHeads];
  }
};

// Tiles of query heads: warps are dealt to them.
__device__ inline int head_tiles(const LayerView& view) {
  return (view.group + kTileHeads - 1) / kTileHeads;
}

// The weights of a query head on their way through a list, and V weighted with them.
template <typename Z>
class WeightedSum {
 public:
  // shift, limit: of the clipped tail, base 2 and in `kUnit`.
  __device__ WeightedSum(float shift, float limit)
      : largest_(Z::kClip ? shift : -1e30f), limit_(limit) {}

  __device__ void add(const float (&scores)[4], const Scales& scales,
                      const Values<Z::kSteps>& values) {
    float rescale = 1.0f;
    if constexpr (!Z::kClip) {
      float larger = fmaxf(fmaxf(scores[0], scores[1]), fmaxf(scores[2], scores[3]));
      for (int bit = 1; bit < 4; bit *= 2) {
        larger = fmaxf(larger, __shfl_xor_sync(kAllLanes, larger, bit));
      }
      larger = fmaxf(larger, largest_);
      rescale = fast_exp2(largest_ - larger);
      largest_ = larger;
      weight_[0] *= rescale;
    }
    float weights[Z::kSides][4], most = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float weight = fast_exp2(scores[i] - largest_);
      if constexpr (Z::kClip) weight = fminf(weight, kMostWeight);
      weight_[0] += weight;
      weights[0][i] = weight * scales.value[i];
      most = fmaxf(most, weights[0][i]);
      if constexpr (Z::kClip) {
        const float clipped = fminf(weight, limit_);
        weight_[1] += clipped;
        weights[1][i] = clipped * scales.value[i];
      }
    }
    if (__ballot_sync(kAllLanes, most * down_ > kRange) != 0) rescale *= fit(most);
    if (__ballot_sync(kAllLanes, rescale != 1.0f) != 0) scale_sums(rescale);
    unsigned rows[4] = {};
#pragma unroll
    for (int side = 0; side < Z::kSides; ++side) {
      const float (&w)[4] = weights[side];
      rows[side] = floats_to_halves(w[0] * down_, w[1] * down_);
      rows[2 + side] = floats_to_halves(w[2] * down_, w[3] * down_);
    }
#pragma unroll
    for (int word = 0; word < Z::kSteps; ++word) {
      unsigned one[4], other[4];
      widen(one, values.words[0][word], values.words[1][word]);
      widen(other, values.words[2][word], values.words[3][word]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const unsigned columns[2] = {one[i], other[i]};
        multiply_add(sums_[4 * word + i], rows, columns);
      }
    }
  }

  // The thread block's sums, always in the same order.
  __device__ void leave(Shared<Z>& shared, int warp, int tiles) {
    const int lane = threadIdx.x & 31, group = lane / 4, quarter = lane % 4;
    float factor = 1.0f / down_;
    for (int bit = 1; bit < 4; bit *= 2) {
#pragma unroll
      for (int side = 0; side < Z::kSides; ++side) {
        weight_[side] += __shfl_xor_sync(kAllLanes, weight_[side], bit);
      }
    }
    if constexpr (!Z::kClip) {
      if (quarter == 0) shared.largest[warp][group] = largest_;
      __syncthreads();
      float larger = largest_;
      for (int other = warp % tiles; other < kWarps; other += tiles) {
        larger = fmaxf(larger, shared.largest[other][group]);
      }
      const float share = fast_exp2(largest_ - larger);
      if (warp < tiles && quarter == 0) shared.all_largest[warp][group] = larger;
      weight_[0] *= share;
      factor *= share;
    }
#pragma unroll 1
    for (int turn = 0; turn < kWarps / Z::kBuffers; ++turn) {
      if (warp / Z::kBuffers == turn) {
        const int buffer = warp % Z::kBuffers;
#pragma unroll
        for (int side = 0; side < Z::kSides; ++side) {
          const int row = side * kTileHeads + group;
          if (quarter == 0) {
            float& weight = shared.weights[buffer][row];
            weight = weight_[side] + (turn == 0 ? 0.0f : weight);
          }
#pragma unroll
          for (int column = 0; column < 2; ++column) {
            auto* to = reinterpret_cast<float4*>(shared.sums[buffer][row] +
                                                 (2 * quarter + column) * Z::kColumns);
#pragma unroll
            for (int word = 0; word < Z::kSteps; ++word) {
              float4 sum{};
              if (turn != 0) sum = to[word];
              sum.x = fmaf(sums_[4 * word][2 * side + column], factor, sum.x);
              sum.y = fmaf(sums_[4 * word + 1][2 * side + column], factor, sum.y);
              sum.z = fmaf(sums_[4 * word + 2][2 * side + column], factor, sum.z);
              sum.w = fmaf(sums_[4 * word + 3][2 * side + column], factor, sum.w);
              to[word] = sum;
            }
          }
        }
      }
      __syncthreads();
    }
    add_buffers(shared, tiles);
    __syncthreads();
  }

 private:
  // Those of all warps of a tile of query heads to the first of them.
  __device__ static void add_buffers(Shared<Z>& shared, int tiles) {
    constexpr int kFours = Z::kChannels / 4, kRows = Z::kSides * kTileHeads;
#pragma unroll 1
    for (int i = threadIdx.x; i < tiles * kRows * kFours; i += kThreads) {
      const int tile = i / (kRows * kFours), row = i / kFours % kRows, four = i % kFours;
      const auto sum_of = [&](int buffer) {
        return reinterpret_cast<float4*>(shared.sums[buffer][row]) + four;
      };
      float4 sum = *sum_of(tile);
#pragma unroll 1
      for (int buffer = tile + tiles; buffer < Z::kBuffers; buffer += tiles) {
        const float4 its = *sum_of(buffer);
        sum.x += its.x;
        sum.y += its.y;
        sum.z += its.z;
        sum.w += its.w;
      }
      *sum_of(tile) = sum;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < tiles * kRows; i += kThreads) {
      const int tile = i / kRows, row = i % kRows;
#pragma unroll 1
      for (int buffer = tile + tiles; buffer < Z::kBuffers; buffer += tiles) {
        shared.weights[tile][row] += shared.weights[buffer][row];
      }
    }
  }
  // Takes the largest weight of a query head that left the range to the upper end of float16.
  // Returns what sums are to be scaled with.
  __device__ float fit(float most) {
    for (int bit = 1; bit < 4; bit *= 2) {
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, bit));
    }
    if (most * down_ <= kRange) return 1.0f;
    const int exponent = max(static_cast<int>(__float_as_uint(most) >> 23) - 127, -100);
    const float down = __uint_as_float(static_cast<unsigned>(127 + kRangeBits - exponent) << 23);
    const float factor = down / down_;
    down_ = down;
    return factor;
  }
  __device__ void scale_sums(float factor) {
#pragma unroll
    for (auto& column : sums_) {
#pragma unroll
      for (float& sum : column) sum *= factor;
    }
  }

  float largest_;  // score; with the clipped tail what all are measured by
  const float limit_;
  float weight_[Z::kSides] = {};
  float down_ = 0x1p100f;  // so large that the first tile with some V makes it fit
  float sums_[Z::kColumns][4] = {};
};

// Leave the thread block's sums, and as the last of its list add them all up.
template <typename Z>
__device__ inline bool add_parts(const LayerView& view, const AttendRows& attend, Shared<Z>& shared,
                                 const Part& part) {
  constexpr int kFours = Z::kChannels / 4, kAhead = 8;
  const int rows = Z::kSides * view.group;
  const auto sums_of = [&](int number, int row) {
    return reinterpret_cast<float4*>(
        attend.sums + (static_cast<int64_t>(part.place + number) * rows + row) * Z::kChannels);
  };
  const auto weights_of = [&](int number, int row) {
    return reinterpret_cast<float2*>(attend.weights) +
           (static_cast<int64_t>(part.place + number) * rows + row);
  };
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * kFours; i += kThreads) {
    const int row = i / kFours, four = i % kFours;
    sums_of(part.number, row)[four] =
        reinterpret_cast<const float4*>(shared.sum(row / view.group, row % view.group))[four];
  }
#pragma unroll 1
  for (int row = threadIdx.x; row < rows; row += kThreads) {
    *weights_of(part.number, row) =
        float2{Z::kClip ? 0.0f : shared.all_largest[row / kTileHeads][row % kTileHeads],
               shared.weight(row / view.group, row % view.group)};
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    // Of all threads of the block: what came before their barrier comes before the fence.
    fence_gpu();
    shared.last = atomicAdd(attend.arrivals + part.list, 1) == part.of - 1;
    fence_gpu();
    if (shared.last) attend.arrivals[part.list] = 0;  // for the next launch
  }
  __syncthreads();
  if (!shared.last) return false;
  // Loads bypass the first-level cache, which does not see what other thread blocks wrote.
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * kFours; i += kThreads) {
    const int row = i / kFours, four = i % kFours;
    float largest = -1e30f, weight = 0.0f;
    float4 sum{};
#pragma unroll 1
    for (int first = 0; first < part.of; first += kAhead) {
      float4 sums[kAhead];
      float2 weights[kAhead];
#pragma unroll
      for (int p = 0; p < kAhead; ++p) {
        const int number = min(first + p, part.of - 1);
        sums[p] = __ldcg(sums_of(number, row) + four);
        weights[p] = __ldcg(weights_of(number, row));
      }
      float larger = largest;
#pragma unroll
      for (int p = 0; p < kAhead; ++p) larger = fmaxf(larger, weights[p].x);
      const float rescale = fast_exp2(largest - larger);
      largest = larger;
      weight *= rescale;
      sum = float4{sum.x * rescale, sum.y * rescale, sum.z * rescale, sum.w * rescale};
#pragma unroll
      for (int p = 0; p < kAhead; ++p) {
        const float factor = first + p < part.of ? fast_exp2(weights[p].x - larger) : 0.0f;
        weight = fmaf(weights[p].y, factor, weight);
        sum.x = fmaf(sums[p].x, factor, sum.x);
        sum.y = fmaf(sums[p].y, factor, sum.y);
        sum.z = fmaf(sums[p].z, factor, sum.z);
        sum.w = fmaf(sums[p].w, factor, sum.w);
      }
    }
    reinterpret_cast<float4*>(shared.sum(row / view.group, row % view.group))[four] = sum;
    if (four == 0) shared.weight(row / view.group, row % view.group) = weight;
  }
  __syncthreads();
  return true;
}

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

// The result of a list. With the clipped tail the dropped mass is shared out by the clipped
// weights; without, a list of nothing gives 0.
template <typename Z>
__device__ inline void store_result(const LayerView& view, const AttendRows& attend,
                                    Shared<Z>& shared, int list, bool selected) {
  const int request = list / view.num_kv_heads;
  const int fours = view.head_size / 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < view.group * fours; i += kThreads) {
    const int in_group = i / fours, four = i % fours;
    const int row = list * view.group + in_group;
    float factor, share = 0.0f;
    if constexpr (Z::kClip) {
      const float dropped = fmaxf(attend.dropped[row], 0.0f) * kUnit;
      factor = 1.0f / fmaxf(shared.weight(0, in_group) + dropped, 1e-30f);
      share = factor * (dropped / fmaxf(shared.weight(1, in_group), 1e-30f));
    } else {
      factor = selected ? 1.0f / shared.weight(0, in_group) : 0.0f;
    }
    const float* from = shared.sum(0, in_group) + 4 * four;
    float x[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      x[k] = from[k] * factor;
      if constexpr (Z::kClip) x[k] = fmaf(from[kTileHeads * Z::kStride + k], share, x[k]);
    }
    store_four(attend.out, view.head_size, request,
               list % view.num_kv_heads * view.group + in_group, four, x);
  }
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
  const int list = static_cast<int>(below(of_lists, static_cast<unsigned>(step.num_lists)));
  const int count = step.counts[list], block_tokens = view.block_tokens;
  if (count == 0) return;
  const ListRows rows(view, step, list, count, step.seq_lens[list / view.num_kv_heads]);
  const int tiles = head_tiles(view);
  constexpr int kTiles = kLookedAt / kTileTokens;
  const int chunks = (rows.tiles() + kTiles - 1) / kTiles;
  const int chunk = static_cast<int>(below(of_tokens, static_cast<unsigned>(chunks)));
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  float* all_scores = shared.sums[0][0];  // [heads, kLookedAt]
  if (warp < tiles) {
    const int head = warp * kTileHeads + lane / 4;
    const Query<Z::kSteps> query(view, attend, list, head);
#pragma unroll 1
    for (int tile = 0; tile < kTiles; ++tile) {
      const int number = chunk * kTiles + tile;
      const ListRows::Token token = rows.find(number, rows.place(number));
      Keys<Z::kSteps> keys;
      Scales scales;
      float scores[4];
      keys.load(token);
      scales.take(token);
      multiply(scores, query, keys, scales);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        all_scores[head * kLookedAt + tile * kTileTokens + token_of_lane(i)] = scores[i];
      }
    }
  }
  __syncthreads();
  const int blocks = kLookedAt / block_tokens;
#pragma unroll 1
  for (int i = threadIdx.x; i < view.group * blocks; i += kThreads) {
    const int head = i / blocks, column = chunk * blocks + i % blocks;
    if (column >= count) continue;
    const float* scores = all_scores + head * kLookedAt + i % blocks * block_tokens;
    float largest = scores[0], sum = 0.0f;
#pragma unroll 1
    for (int token = 1; token < block_tokens; ++token) largest = fmaxf(largest, scores[token]);
#pragma unroll 1
    for (int token = 0; token < block_tokens; ++token) sum += fast_exp2(scores[token] - largest);
    const float refined = (largest + fast_log2(sum)) * kLn2;
    const int64_t place = (static_cast<int64_t>(list) * view.group + head) * step.max_blocks;
    const int block = step.blocks[static_cast<int64_t>(list) * step.columns + column];
    const float error = fabsf(step.block_lse[place + block] - refined);
    atomicAdd(view.counters + kFirstEstimateBucket + estimate_bucket(error), 1);
  }
}

// V of the part of a list, weighted; in shared memory, with the weights.
template <typename Z>
__device__ inline void attend_part(const LayerView& view, const Step& step,
                                   const AttendRows& attend, Shared<Z>& shared, const Part& part) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int tiles = head_tiles(view), head = warp % tiles * kTileHeads + lane / 4;
  const int64_t list = part.list;
  const int num_tokens = step.seq_lens[part.list / view.num_kv_heads];
  float shift = 0.0f, limit = 0.0f;
  if constexpr (Z::kClip) {
    if (head < view.group) shift = attend.lse[list * view.group + head] * kLog2E - kUnitBits;
    const float length = static_cast<float>(max(num_tokens, 1));
    // Beyond so many tokens the clip falls as the threshold does.
    limit = attend.clip * sqrtf(fminf(attend.clip_length / length, 1.0f)) * kUnit;
  }
  WeightedSum<Z> sum(shift, limit);
  const ListRows rows(view, step, list, part.count, num_tokens);
  const int workers = kWarps / tiles, first = part.begin + warp / tiles;
  const int last = min(part.end, rows.tiles());
  if (first < last) {
    ListRows::Token token = rows.find(first, rows.place(first));
    Keys<Z::kSteps> keys;
    Values<Z::kSteps> values, ahead;
    Scales scales;
    keys.load(token);
    values.load(token, rows.value_distance());
    // A tile ahead of what is loaded.
    ListRows::Place next = rows.place(first + workers);
    const Query<Z::kSteps> query(view, attend, list, head);
#pragma unroll 1
    for (int tile = first; tile < last; tile += workers) {
      const bool more = tile + workers < last;
      float scores[4];
      scales.take(token);
      multiply(scores, query, keys, scales);
      // The next tile is on its way while this one is weighted.
      if (more) {
        token = rows.find(tile + workers, next);
        keys.load(token);
        ahead.load(token, rows.value_distance());
        next = rows.place(tile + 2 * workers);
      }
      sum.add(scores, scales, values);
      values = ahead;
    }
  }
  sum.leave(shared, warp, tiles);
}

template <typename Z>
__global__ void __launch_bounds__(kThreads, Z::kLeastBlocks)
    attend_kernel(const __grid_constant__ LayerView view, const __grid_constant__ Step step,
                  const __grid_constant__ AttendRows attend) {
  using SharedSums = Shared<Z>;
  __shared__ SharedSums shared;
  wait_for_launch_before();
  const Runs runs(view, step, attend, shared.runs);
#pragma unroll 1
  for (int run = blockIdx.x; run < runs.count(); run += attend.programs) {
#pragma unroll 1
    for (int tile = runs.begin(run); tile < runs.end(run);) {
      runs.find(run, tile, shared.part);
      __syncthreads();
      const Part part = shared.part;
      attend_part(view, step, attend, shared, part);
      if (part.of == 1 || add_parts(view, attend, shared, part)) {
        store_result(view, attend, shared, part.list, part.count > 0);
      }
      tile = part.next;
    }
  }
  if (blockIdx.x != 0) return;
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

template <int kSteps>
cudaError_t launch_steps(const LayerView& view, const Step& step, const AttendRows& attend,
                         bool dependent, cudaStream_t stream) {
  const auto launch = [&](auto size) {
    return launch_kernel(dependent, attend_kernel<decltype(size)>, attend.programs, kThreads,
                         stream, view, step, attend);
  };
  return attend.clip < 0 ? launch(Size<kSteps, false>{}) : launch(Size<kSteps, true>{});
}

}  // namespace

cudaError_t launch_attend_rows(const LayerView& view, const Step& step, const AttendRows& attend,
                               bool dependent, cudaStream_t stream) {
  switch ((view.head_size + 31) / 32) {
    case 2:
      return launch_steps<2>(view, step, attend, dependent, stream);
    case 3:
      return launch_steps<3>(view, step, attend, dependent, stream);
    case 4:
      return launch_steps<4>(view, step, attend, dependent, stream);
    case 8:
      return launch_steps<8>(view, step, attend, dependent, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace kcache
