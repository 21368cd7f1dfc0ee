// SPDX-License-Identifier: Apache-2.0
// Score every V block from K codes on int8 tensor cores. Definition:
// vllm_kcache/reference/score.py.
//
// A product takes 16 tokens and 32 channels, which lie in the pages as a thread wants them, and
// eight columns, q' of as many query heads in int8. Tokens are dealt so that a thread ends with
// eight that follow each other, and with one query head of each tile, two of a product: up to
// blocks of eight nothing crosses lanes.
#include "dependent.cuh"
#include "head.cuh"
#include "launch.h"
#include "spans.cuh"
#include "warp.cuh"

namespace kcache {
namespace {

constexpr int kWarps = 4;  // vllm_kcache/kernels/score_codes.py
constexpr int kThreads = 32 * kWarps;
constexpr int kOwnTokens = 8;               // of a thread
constexpr int kRunTokens = 8 * kOwnTokens;  // of a warp, at once
constexpr int kTileHeads = 4;               // query heads of every other column of a product
// Sums of products begin at an int whose bits are this float: then their bits are this float plus
// the sum, up to 2^22, and nothing converts them. A sum is at most 256 * 15 * 127.
constexpr int kFirstSum = 0x4b400000;
constexpr float kFirstFloat = 12582912.0f;
static_assert(kChunkTokens == 32 * kOwnTokens, "each lane finds the place of eight tokens");

// A kernel is compiled for `kSteps`, products that a head takes, `kTiles`, fours of query heads,
// for rows that are each a request, or several tokens of one (`kJoint`): their query heads are
// taken together, so that codes are read once for all; and for scores with a soft cap.
template <int kSteps_, int kTiles_, bool kJoint_, bool kCapped_>
struct Size {
  static constexpr int kSteps = kSteps_, kTiles = kTiles_;
  static constexpr bool kJoint = kJoint_, kCapped = kCapped_;
  static constexpr int kHeads = kTileHeads * kTiles, kProducts = (kTiles + 1) / 2;
  static constexpr int kParts = parts_of(32 * kSteps);
  // Loads in flight rather than warps hide the latency; heads of more values want registers.
  static constexpr int kLeastBlocks = kSteps == 8 ? 2 : kTiles == 4 ? 3 : kTiles == 2 ? 4 : 5;
};

// The queries of a list, made once by a thread block.
template <typename Z>
struct QueryShared {
  unsigned columns[Z::kProducts * Z::kSteps * 32][2];  // operands as lanes take them
  float unit[Z::kHeads];  // base-2 logarithm of a weight in one step of q' times one code
  float sum[Z::kHeads];   // of q', in steps
  float bias[Z::kHeads];  // scale * (q . mean)
};

// q' of a query head with one warp; heads past the group are zeros.
template <typename Z>
__device__ inline void prepare_head(const LayerView& view, const ScoreCodes& score,
                                    QueryShared<Z>& shared, int list, int rows, int head,
                                    bool writes) {
  const int lane = threadIdx.x & 31, kv_head = list % view.num_kv_heads;
  const int later = Z::kJoint ? head / view.group : 0, in_group = head - later * view.group;
  float x[Z::kParts][4] = {};
  float bias = 0.0f, sum = 0.0f, most = 0.0f;
  if (head < rows * view.group) {
    float mean[Z::kParts][4], deviation[Z::kParts][4];
    const int query_head = kv_head * view.group + in_group;
    const int64_t request = list / view.num_kv_heads + later;
    load_head(x, score.query, view.head_size, request, query_head);
    load_floats(mean, view.mean + kv_head * view.head_size, view.head_size);
    load_floats(deviation, view.deviation + kv_head * view.head_size, view.head_size);
    for_each(x, [&](int p, int i) {
      bias += x[p][i] * mean[p][i];
      x[p][i] *= deviation[p][i];
    });
    rotate(x, view.head_size, view.rotation);
    const int64_t row = request * view.num_kv_heads * view.group + query_head;
    bias = warp_sum(bias) * score.scale;
    if (writes) {
      store_floats(x, score.transformed + row * view.head_size, view.head_size);
      if (lane == 0) score.bias[row] = bias;
    }
    for_each(x, [&](int p, int i) { most = fmaxf(most, fabsf(x[p][i])); });
    most = fmaxf(warp_max(most), 1e-20f);
  }
  const float steps = most > 0.0f ? 127.0f / most : 0.0f;
  for_each(x, [&](int p, int i) {
    x[p][i] = rintf(x[p][i] * steps);
    sum += x[p][i];  // of whole numbers: exact in any order
  });
  sum = warp_sum(sum);
#pragma unroll
  for (int p = 0; p < Z::kParts; ++p) {
    unsigned bytes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bytes |= (static_cast<unsigned>(__float2int_rn(x[p][i])) & 255u) << (8 * i);
    }
    // Four values that follow each other; eight are a word of codes, of its low and high nibbles.
    const int four = lane + 32 * p, word = four / 2;
    if (word >= 4 * Z::kSteps) continue;
    const int product = head / (2 * kTileHeads) * Z::kSteps + word % Z::kSteps;
    const int column = 2 * (head % kTileHeads) + head / kTileHeads % 2;
    const int quarter = word / Z::kSteps;
    shared.columns[product * 32 + column * 4 + quarter][four % 2] = bytes;
  }
  if (lane == 0) {
    shared.unit[head] = score.scale * kLog2E * most / 127.0f;
    shared.sum[head] = sum;
    shared.bias[head] = bias;
  }
}

// Where eight tokens begin, from the first page, in 16 bytes.
struct Place {
  unsigned codes, scales;
};

// Codes and scales of a thread's tokens: of each, a quarter of its codes.
template <int kSteps>
struct Run {
  unsigned codes[kOwnTokens][kSteps];
  unsigned scales[kOwnTokens];  // scale and zero, float16

  __device__ void load(const char* pages, Place place, int quarter) {
    const char* from =
        pages + static_cast<size_t>(place.codes) * 16 + static_cast<unsigned>(quarter) * 4 * kSteps;
#pragma unroll
    for (int token = 0; token < kOwnTokens; ++token) {
      load_words<kSteps>(codes[token], from + token * 16 * kSteps);
    }
    const char* scales_from = pages + static_cast<size_t>(place.scales) * 16;
    load_words<4>(scales, scales_from);
    load_words<4>(scales + 4, scales_from + 16);
  }
};

// A sum of weights, 2^largest * sum.
struct LogSum {
  float largest = -1e30f, sum = 0.0f;

  __device__ void add(float log) {
    const float larger = fmaxf(largest, log);
    sum = sum * fast_exp2(largest - larger) + fast_exp2(log - larger);
    largest = larger;
  }
  // Of some lanes, `first` to `last` bits apart.
  __device__ void add_lanes(int first, int last) {
    for (int bit = first; bit <= last; bit *= 2) {
      const float other = __shfl_xor_sync(kAllLanes, largest, bit);
      const float other_sum = __shfl_xor_sync(kAllLanes, sum, bit);
      const float larger = fmaxf(largest, other);
      sum = sum * fast_exp2(largest - larger) + other_sum * fast_exp2(other - larger);
      largest = larger;
    }
  }
  __device__ float log() const { return largest + fast_log2(sum); }
};

template <typename Z>
class ListScores {
 public:
  // `num_tokens`: of the last of `rows`, each of which has one more than the row before.
  __device__ ListScores(const LayerView& view, const Step& step, const QueryShared<Z>& shared,
                        int list, int rows, int num_tokens)
      : view_(view),
        step_(step),
        shared_(shared),
        list_(list),
        num_tokens_(num_tokens),
        chunks_((num_tokens + kChunkTokens - 1) / kChunkTokens),
        group_(static_cast<int>(threadIdx.x & 31) / 4),
        quarter_(static_cast<int>(threadIdx.x & 3)),
        out_(const_cast<float*>(step.block_lse) +
             (static_cast<int64_t>(list) * view.group + quarter_) * step.max_blocks),
        least_tokens_(num_tokens - rows + 1) {
    if constexpr (Z::kJoint) {
#pragma unroll
      for (int tile = 0; tile < Z::kTiles; ++tile) {
        const int head = tile * kTileHeads + quarter_, later = head / view.group;
        heads_[tile] = (list + later * view.num_kv_heads) * view.group + head % view.group;
        lengths_[tile] = head < rows * view.group ? least_tokens_ + later : 0;
      }
    }
  }

  // What of a chunk does not need the length: the page of each lane's eight tokens. Past the length
  // it is anything that the table holds.
  __device__ static unsigned page_of(const LayerView& view, const Step& step,
                                     const ScoreCodes& score, int list, int chunk) {
    const unsigned token = static_cast<unsigned>(chunk) * kChunkTokens + first_token_of_lane();
    const unsigned column = min(token / static_cast<unsigned>(view.page_tokens),
                                static_cast<unsigned>(score.table_columns - 1));
    const int64_t request = list / view.num_kv_heads;
    return __ldg(step.block_table + request * step.table_stride + column);
  }

  // What does not need the queries. `page`: of the worker's first chunk.
  __device__ void begin(int worker, unsigned page) {
    if (worker >= chunks_) return;
    here_ = place_of(worker, page);
    load(0);
  }

  // Every n-th chunk.
  __device__ void run(const ScoreCodes& score, int worker, int workers) {
    if constexpr (Z::kProducts == 1) load_columns(0);
    for (int chunk = worker; chunk < chunks_; chunk += workers) {
      const int next = chunk + workers;
      const bool more = next < chunks_;
      const unsigned next_page = more ? page_of(view_, step_, score, list_, next) : 0;
      LogSum sums[Z::kTiles];
      const int first = chunk * kChunkTokens;
      const int runs = (min(kChunkTokens, num_tokens_ - first) + kRunTokens - 1) / kRunTokens;
#pragma unroll 1
      for (int run = 0; run < runs; ++run) {
        float scores[Z::kTiles][kOwnTokens];
        multiply(scores, score.cap);
        // The next run's are on their way while this one's are added up.
        const bool ends = run + 1 == runs;
        if (ends && more) here_ = place_of(next, next_page);
        if (!ends || more) load(ends ? 0 : run + 1);
        add_up(scores, first + run * kRunTokens + group_ * kOwnTokens, sums);
      }
#pragma unroll
      for (int tile = 0; tile < Z::kTiles; ++tile) {
        sums[tile].add_lanes(4, 16);
        const int head = tile * kTileHeads + quarter_;
        if (group_ == 0 && lives(tile) && first < tokens_of(tile)) {
          const int64_t row =
              Z::kJoint ? heads_[tile] : static_cast<int64_t>(list_) * view_.group + head;
          const_cast<float*>(step_.chunk_lse)[row * step_.max_chunks + chunk] =
              fmaf(sums[tile].log(), kLn2, bias(head));
        }
      }
    }
  }

 private:
  // Of scores as `multiply` leaves them: base-2 logarithm of a weight in 1, and what all have
  // beside it. A cap needs both before.
  __device__ float unit(int head) const { return Z::kCapped ? 1.0f : shared_.unit[head]; }
  __device__ float bias(int head) const { return Z::kCapped ? 0.0f : shared_.bias[head]; }

  // Of the lane's query head of a tile: whether there is one, its row's tokens, and its scores.
  __device__ bool lives(int tile) const {
    return Z::kJoint || tile * kTileHeads + quarter_ < view_.group;
  }
  __device__ int tokens_of(int tile) const { return Z::kJoint ? lengths_[tile] : num_tokens_; }
  __device__ float* out_of(int tile) const {
    if constexpr (Z::kJoint) {
      return const_cast<float*>(step_.block_lse) +
             static_cast<int64_t>(heads_[tile]) * step_.max_blocks;
    }
    return out_ + static_cast<int64_t>(tile) * kTileHeads * step_.max_blocks;
  }

  // Of a chunk, where a lane looks eight tokens up for all.
  __device__ static unsigned first_token_of_lane() { return (threadIdx.x & 31) * kOwnTokens; }

  // Past the length the first page is loaded, and not used.
  __device__ Place place_of(int chunk, unsigned page) const {
    const unsigned token = static_cast<unsigned>(chunk) * kChunkTokens + first_token_of_lane();
    const unsigned page_tokens = view_.page_tokens, in_page = token % page_tokens;
    const unsigned physical = token < static_cast<unsigned>(num_tokens_) ? page : 0;
    const unsigned head = list_ % view_.num_kv_heads;
    const unsigned head_vectors = page_tokens * (16 * Z::kSteps + 4) / 16;
    const unsigned begins =
        physical * static_cast<unsigned>(view_.code_page_bytes / 16) + head * head_vectors;
    return {begins + in_page * Z::kSteps, begins + page_tokens * Z::kSteps + in_page / 4};
  }

  __device__ void load(int run) {
    const int lane = run * 8 + group_;
    run_.load(
        view_.codes,
        {__shfl_sync(kAllLanes, here_.codes, lane), __shfl_sync(kAllLanes, here_.scales, lane)},
        quarter_);
  }

  __device__ void load_columns(int step) {
#pragma unroll
    for (int i = 0; i < (Z::kProducts == 1 ? Z::kSteps : Z::kProducts); ++i) {
      const int product = Z::kProducts == 1 ? i : i * Z::kSteps + step;
      const unsigned* columns = shared_.columns[product * 32 + (threadIdx.x & 31)];
      // With one tile every other column has no query head, and nothing was written there.
      const bool is_there = Z::kTiles > 1 || group_ % 2 == 0;
      columns_[i][0] = is_there ? columns[0] : 0;
      columns_[i][1] = is_there ? columns[1] : 0;
    }
  }

  // Scores of the thread's tokens with one query head of each tile, in units of that head; capped
  // ones are base-2.
  __device__ void multiply(float (&scores)[Z::kTiles][kOwnTokens], const SoftCap& cap) {
    constexpr unsigned kNibbles = 0x0f0f0f0fu;
    int products[Z::kProducts][kOwnTokens / 2][4];
#pragma unroll
    for (int i = 0; i < Z::kProducts * kOwnTokens * 2; ++i) {
      products[i / (2 * kOwnTokens)][i / 4 % (kOwnTokens / 2)][i % 4] = kFirstSum;
    }
#pragma unroll
    for (int step = 0; step < Z::kSteps; ++step) {
      if constexpr (Z::kProducts > 1) load_columns(step);
#pragma unroll
      for (int pair = 0; pair < kOwnTokens / 2; ++pair) {
        const unsigned one = run_.codes[2 * pair][step], other = run_.codes[2 * pair + 1][step];
        const unsigned rows[4] = {one & kNibbles, other & kNibbles, (one >> 4) & kNibbles,
                                  (other >> 4) & kNibbles};
#pragma unroll
        for (int i = 0; i < Z::kProducts; ++i) {
          multiply_add(products[i][pair], rows, columns_[Z::kProducts == 1 ? step : i]);
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < Z::kTiles; ++tile) {
      const int head = tile * kTileHeads + quarter_;
      const float sum = shared_.sum[head];
#pragma unroll
      for (int token = 0; token < kOwnTokens; ++token) {
        const int bits = products[tile / 2][token / 2][token % 2 * 2 + tile % 2];
        const float product = __uint_as_float(static_cast<unsigned>(bits)) - kFirstFloat;
        const float2 scales = halves_to_floats(run_.scales[token]);  // scale and zero
        float& score = scores[tile][token];
        score = fmaf(scales.x, product, scales.y * sum);
        if constexpr (Z::kCapped) {
          score = cap_score(cap, fmaf(score, shared_.unit[head], shared_.bias[head] * kLog2E));
        }
      }
    }
  }

  __device__ void add_up(float (&scores)[Z::kTiles][kOwnTokens], int first_token,
                         LogSum (&sums)[Z::kTiles]) {
    if (first_token + kOwnTokens > (Z::kJoint ? least_tokens_ : num_tokens_)) {
#pragma unroll
      for (int token = 0; token < kOwnTokens; ++token) {
        if (!Z::kJoint && first_token + token < num_tokens_) continue;
#pragma unroll
        for (int tile = 0; tile < Z::kTiles; ++tile) {
          if (first_token + token >= tokens_of(tile)) scores[tile][token] = -INFINITY;
        }
      }
    }
    switch (view_.block_tokens) {
      case 1:
        return add_blocks<1>(scores, first_token, sums);
      case 2:
        return add_blocks<2>(scores, first_token, sums);
      case 4:
        return add_blocks<4>(scores, first_token, sums);
      default:
        return add_blocks<kOwnTokens>(scores, first_token, sums);
    }
  }

  template <int kTokens>
  __device__ void add_blocks(const float (&scores)[Z::kTiles][kOwnTokens], int first_token,
                             LogSum (&sums)[Z::kTiles]) {
#pragma unroll
    for (int tile = 0; tile < Z::kTiles; ++tile) {
      const int head = tile * kTileHeads + quarter_;
      const float unit = this->unit(head), bias = this->bias(head);
      float* out = out_of(tile);
      const bool live = lives(tile);
      const int num_tokens = tokens_of(tile);
#pragma unroll
      for (int first = 0; first < kOwnTokens; first += kTokens) {
        float largest = scores[tile][first];
#pragma unroll
        for (int i = 1; i < kTokens; ++i) largest = fmaxf(largest, scores[tile][first + i]);
        // Past the length every score is -infinity: the sum is 0 then, not NaN.
        const float shift = largest == -INFINITY ? 0.0f : -unit * largest;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kTokens; ++i)
          sum += fast_exp2(fmaf(scores[tile][first + i], unit, shift));
        const float log = fast_log2(sum) - shift;
        sums[tile].add(log);
        const int token = first_token + first;
        if (kTokens < kOwnTokens || view_.block_tokens == kOwnTokens) {
          if (live && token < num_tokens) out[token / kTokens] = fmaf(log, kLn2, bias);
        } else {
          LogSum block;
          block.add(log);
          block.add_lanes(4, view_.block_tokens / 4);
          if (live && token < num_tokens && token % view_.block_tokens == 0) {
            out[token / view_.block_tokens] = fmaf(block.log(), kLn2, bias);
          }
        }
      }
    }
  }

  const LayerView& view_;
  const Step& step_;
  const QueryShared<Z>& shared_;
  const int list_, num_tokens_, chunks_;
  const int group_, quarter_;  // of the lane: which eight tokens, which quarter of their codes
  float* const out_;           // scores of the lane's query head of the first tile
  const int least_tokens_;     // of the first row
  // Of the lane's query head of each tile: which it is of all, and its row's tokens; 0 without one.
  // Where rows are taken together.
  int heads_[Z::kTiles], lengths_[Z::kTiles];
  Place here_{};  // of the chunk that is loaded, one a lane
  Run<Z::kSteps> run_;
  unsigned columns_[Z::kProducts == 1 ? Z::kSteps : Z::kProducts][2];
};

// A thread block's part of a list, for `rows` of the batch from `row` on.
template <typename Z>
__device__ inline void score_rows(const LayerView& view, const Step& step, const ScoreCodes& score,
                                  QueryShared<Z>& shared, int list, int split, int row, int rows) {
  const int warp = threadIdx.x / 32, workers = score.splits * kWarps;
  const int worker = split * kWarps + warp;
  const int num_tokens =
      max(min(step.seq_lens[row + rows - 1], step.max_blocks * view.block_tokens), 0);
  // On its way while the length is.
  const unsigned page = ListScores<Z>::page_of(view, step, score, list, worker);
  const int chunks = (num_tokens + kChunkTokens - 1) / kChunkTokens;
  // Of what this reads, the launch before wrote only the code of the newest token, and of those
  // just before it: the newest of another request, whose page this one shares, or those that a
  // draft comes after. The first warp waits in any case, so that no launch ends before the one
  // before it.
  const int last = (chunks - 1) % workers, before = last > 0 ? last - 1 : workers - 1;
  const bool waits =
      score.after_write && (worker == last || worker == before || (blockIdx.x == 0 && warp == 0));
  let_next_launch_begin();
  // A graph captured for longer requests has many such thread blocks: they should be short.
  if (split * kWarps >= chunks) {
    if (waits) wait_for_launch_before();
    return;
  }
  ListScores<Z> scores(view, step, shared, list, rows, num_tokens);
  if (!waits) scores.begin(worker, page);
  for (int head = warp; head < Z::kHeads; head += kWarps) {
    prepare_head<Z>(view, score, shared, list, rows, head, split == 0);
  }
  // As late as can be: where there is little to score, all wait for this warp.
  if (waits) {
    wait_for_launch_before();
    scores.begin(worker, page);
  }
  __syncthreads();
  if (worker < chunks) scores.run(score, worker, workers);
}

template <typename Z>
__global__ void __launch_bounds__(kThreads, Z::kLeastBlocks)
    score_kernel(const __grid_constant__ LayerView view, const __grid_constant__ Step step,
                 const __grid_constant__ ScoreCodes score) {
  using Shared = QueryShared<Z>;
  __shared__ Shared shared;
  if (!score.after_write) wait_for_launch_before();
  const int list = static_cast<int>(blockIdx.x) / score.splits;
  const int split = static_cast<int>(blockIdx.x) % score.splits;
  if constexpr (!Z::kJoint) {
    score_rows(view, step, score, shared, list, split, list / view.num_kv_heads, 1);
  } else {
    // As csrc/select.cu: where there are more lists than thread blocks they take turns.
    const int num_rows = step.num_lists / view.num_kv_heads, head = list % view.num_kv_heads;
    const int at_once = static_cast<int>(gridDim.x) / (score.splits * view.num_kv_heads);
#pragma unroll 1
    for (int number = list / view.num_kv_heads;; number += at_once) {
      const Led led = find_led(score.spans, score.together, num_rows, number);
      if (led.rows == 0) break;
      score_rows(view, step, score, shared, led.row * view.num_kv_heads + head, split, led.row,
                 led.rows);
      __syncthreads();
    }
  }
}

template <int kSteps, bool kCapped>
cudaError_t launch_steps(const LayerView& view, const Step& step, const ScoreCodes& score,
                         bool dependent, cudaStream_t stream) {
  const int num_rows = step.num_lists / view.num_kv_heads;
  const int lists = (num_rows + score.together - 1) / score.together * view.num_kv_heads;
  const auto launch = [&](auto size) {
    return launch_kernel(dependent, score_kernel<decltype(size)>, lists * score.splits, kThreads,
                         stream, view, step, score);
  };
  const int heads = view.group * score.together;
  if (score.together > 1) {
    if (heads <= kTileHeads) return launch(Size<kSteps, 1, true, kCapped>{});
    if (heads <= 2 * kTileHeads) return launch(Size<kSteps, 2, true, kCapped>{});
    return launch(Size<kSteps, 4, true, kCapped>{});
  }
  if (heads <= kTileHeads) return launch(Size<kSteps, 1, false, kCapped>{});
  if (heads <= 2 * kTileHeads) return launch(Size<kSteps, 2, false, kCapped>{});
  return launch(Size<kSteps, 4, false, kCapped>{});
}

template <bool kCapped>
cudaError_t launch_sizes(const LayerView& view, const Step& step, const ScoreCodes& score,
                         bool dependent, cudaStream_t stream) {
  switch ((view.head_size + 31) / 32) {
    case 2:
      return launch_steps<2, kCapped>(view, step, score, dependent, stream);
    case 3:
      return launch_steps<3, kCapped>(view, step, score, dependent, stream);
    case 4:
      return launch_steps<4, kCapped>(view, step, score, dependent, stream);
    case 8:
      return launch_steps<8, kCapped>(view, step, score, dependent, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_score_codes(const LayerView& view, const Step& step, const ScoreCodes& score,
                               bool dependent, cudaStream_t stream) {
  return score.cap.most == 0 ? launch_sizes<false>(view, step, score, dependent, stream)
                             : launch_sizes<true>(view, step, score, dependent, stream);
}

}  // namespace kcache
