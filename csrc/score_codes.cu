// SPDX-License-Identifier: Apache-2.0
// Score every V block from K codes on int8 tensor cores. Definition:
// vllm_kcache/reference/score.py.
//
// A product takes 16 tokens and 32 channels, which lie in the pages as a thread wants them, and
// eight columns, q' of as many query heads in int8. Tokens are dealt so that a thread ends with
// eight that follow each other, and with one query head of each tile, two of a product: up to
// blocks of eight nothing crosses lanes.
#include "code_queries.cuh"
#include "code_runs.cuh"
#include "dependent.cuh"
#include "head.cuh"
#include "launch.h"
#include "spans.cuh"
#include "warp.cuh"

namespace kcache {
namespace {

constexpr int kThreads = 32 * kWarps;
static_assert(kChunkTokens == 32 * kOwnTokens, "each lane finds the place of eight tokens");

// Where eight tokens begin, from the first page, in 16 bytes.
struct Place {
  unsigned codes, scales;
};

// A kernel is compiled for `kSteps`, products that a head takes, `kTiles`, fours of query heads,
// for rows that are each a request, or several tokens of one (`kJoint`): their query heads are
// taken together, so that codes are read once for all; and for scores with a soft cap.
template <int kSteps_, int kTiles_, bool kJoint_, bool kCapped_>
struct Size {
  static constexpr int kSteps = kSteps_, kTiles = kTiles_;
  static constexpr bool kJoint = kJoint_, kCapped = kCapped_;
  static constexpr int kHeads = kTileHeads * kTiles, kProducts = (kTiles + 1) / 2;
  static constexpr int kParts = parts_of(32 * kSteps);
  using Run =
      std::conditional_t<kTiles == 1 || kSteps == 8, RunInRegisters<kSteps>, RunInShared<kSteps>>;
  // Loads in flight rather than warps hide the latency; heads of more values want registers.
  static constexpr int kLeastBlocks = kSteps == 8            ? (kTiles == 4 ? 2 : 3)
                                      : kTiles > 1 || kJoint ? 4
                                                             : 5;
};

template <typename Z>
struct Shared {
  PreparedQueries<Z> query;
  typename Z::Run::Shared runs;
};

// A sum of weights, 2^largest * sum.
struct LogSum {
  float largest = -1e30f, sum = 0.0f;

  __device__ void add(const LogSum& other) {
    const float larger = fmaxf(largest, other.largest);
    sum = sum * fast_exp2(largest - larger) + other.sum * fast_exp2(other.largest - larger);
    largest = larger;
  }
  __device__ LogSum of_lane(int bits) const {
    return {__shfl_xor_sync(kAllLanes, largest, bits), __shfl_xor_sync(kAllLanes, sum, bits)};
  }
  __device__ float log() const { return largest + fast_log2(sum); }
};

template <typename Z>
class ListScores {
 public:
  // `num_tokens`: of the last of `rows`, each of which has one more than the row before.
  __device__ ListScores(const LayerView& view, const Step& step, Shared<Z>& shared, List list,
                        int rows, int num_tokens, int worker, int workers)
      : view_(view),
        step_(step),
        shared_(shared.query),
        list_(list),
        num_tokens_(num_tokens),
        worker_(worker),
        workers_(workers),
        group_(static_cast<int>(threadIdx.x & 31) / 4),
        quarter_(static_cast<int>(threadIdx.x & 3)),
        blocks_out_(const_cast<float*>(step.block_lse) + list.first_head(view) * step.max_blocks),
        least_tokens_(num_tokens - rows + 1),
        run_(shared.runs) {}

  // What of a chunk does not need the length: the page of each lane's eight tokens. Past the length
  // it is anything that the table holds.
  __device__ static unsigned page_of(const LayerView& view, const Step& step,
                                     const ScoreCodes& score, int row, int chunk) {
    const unsigned token = static_cast<unsigned>(chunk) * kChunkTokens + first_token_of_lane();
    const unsigned column = min(token / static_cast<unsigned>(view.page_tokens),
                                static_cast<unsigned>(score.table_columns - 1));
    return __ldg(step.block_table + row * step.table_stride + column);
  }

  // What does not need the queries. `page`: of the worker's first chunk.
  __device__ void begin(const ScoreCodes& score, unsigned page) {
    next_token_ = static_cast<unsigned>(worker_) * kChunkTokens;
    if (next_token_ >= static_cast<unsigned>(num_tokens_)) return;
    here_ = place_of(worker_, page);
    static_assert(Z::Run::kAhead * kRunTokens < kChunkTokens, "no other chunk yet");
#pragma unroll
    for (int i = 0; i < Z::Run::kAhead; ++i, next_token_ += kRunTokens) run_.load(next());
    next_page_ = page_of(view_, step_, score, list_.row, worker_ + workers_);
  }

  // Every n-th chunk.
  __device__ void run(const ScoreCodes& score) {
    if constexpr (Z::kProducts == 1) load_columns(0);
    for (int chunk = worker_; chunk * kChunkTokens < num_tokens_; chunk += workers_) {
      LogSum sums[Z::kTiles];
      const int first = chunk * kChunkTokens, end = min(first + kChunkTokens, num_tokens_);
#pragma unroll 1
      for (int token = first; token < end; token += kRunTokens) {
        float scores[Z::kTiles][kOwnTokens];
        multiply(scores, score.cap);
        advance(score);
        add_up(scores, token + group_ * kOwnTokens, sums);
      }
      store_chunk(sums, chunk);
    }
  }

 private:
  // The lane's of a tile, for scores as `multiply` leaves them: of capped ones the cap needed unit
  // and bias before.
  __device__ QueryHead head_of(int tile) const {
    QueryHead head = shared_.heads[tile * kTileHeads + quarter_];
    if constexpr (Z::kCapped) {
      head.unit = 1.0f;
      head.bias = 0.0f;
    }
    return head;
  }

  // Of a chunk, where a lane looks eight tokens up for all.
  __device__ static unsigned first_token_of_lane() { return (threadIdx.x & 31) * kOwnTokens; }

  // Past the length the first page is loaded, and not used.
  __device__ Place place_of(int chunk, unsigned page) const {
    const unsigned token = static_cast<unsigned>(chunk) * kChunkTokens + first_token_of_lane();
    const unsigned page_tokens = view_.page_tokens, in_page = token % page_tokens;
    const unsigned physical = token < static_cast<unsigned>(num_tokens_) ? page : 0;
    const unsigned head_vectors = page_tokens * (16 * Z::kSteps + 4) / 16;
    const unsigned begins =
        physical * static_cast<unsigned>(view_.code_page_bytes / 16) + list_.head * head_vectors;
    return {begins + in_page * Z::kSteps, begins + page_tokens * Z::kSteps + in_page / 4};
  }

  // The run after the last that is on its way.
  __device__ Source next() const {
    const int lane = static_cast<int>(next_token_ % kChunkTokens / kOwnTokens) + group_;
    const size_t codes = __shfl_sync(kAllLanes, here_.codes, lane);
    const size_t scales = __shfl_sync(kAllLanes, here_.scales, lane);
    return {next_token_ < static_cast<unsigned>(num_tokens_), view_.codes + codes * 16,
            view_.codes + scales * 16};
  }
  // After it was loaded: who waits for its codes waits for the page that is loaded here, too.
  __device__ void advance(const ScoreCodes& score) {
    next_token_ += kRunTokens;
    if (next_token_ % kChunkTokens != 0) return;
    next_token_ += (workers_ - 1) * kChunkTokens;
    const int chunk = static_cast<int>(next_token_ / kChunkTokens);
    here_ = place_of(chunk, next_page_);
    next_page_ = page_of(view_, step_, score, list_.row, chunk + workers_);
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
    run_.wait();
    const Source next = this->next();
    int products[Z::kProducts][kOwnTokens / 2][4];
#pragma unroll
    for (int i = 0; i < Z::kProducts * kOwnTokens * 2; ++i) {
      products[i / (2 * kOwnTokens)][i / 4 % (kOwnTokens / 2)][i % 4] = kFirstSum;
    }
#pragma unroll
    for (int pair = 0; pair < kOwnTokens / 2; ++pair) {
      unsigned one[Z::kSteps], other[Z::kSteps];
      run_.read_codes(one, 2 * pair);
      run_.read_codes(other, 2 * pair + 1);
#pragma unroll
      for (int step = 0; step < Z::kSteps; ++step) {
        if constexpr (Z::kProducts > 1) load_columns(step);
        const unsigned rows[4] = {one[step] & kNibbles, other[step] & kNibbles,
                                  (one[step] >> 4) & kNibbles, (other[step] >> 4) & kNibbles};
#pragma unroll
        for (int i = 0; i < Z::kProducts; ++i) {
          multiply_add(products[i][pair], rows, columns_[Z::kProducts == 1 ? step : i]);
        }
      }
      run_.replace_token(next, 2 * pair);
      run_.replace_token(next, 2 * pair + 1);
    }
    unsigned halves[kOwnTokens];
    run_.read_scales(halves);
#pragma unroll
    for (int token = 0; token < kOwnTokens; ++token) {
      const float2 scales = halves_to_floats(halves[token]);  // scale and zero
      const float first = -kFirstFloat * scales.x;  // exact, and so is its sum with a product
#pragma unroll
      for (int tile = 0; tile < Z::kTiles; ++tile) {
        const int bits = products[tile / 2][token / 2][token % 2 * 2 + tile % 2];
        const float product = fmaf(scales.x, __uint_as_float(static_cast<unsigned>(bits)), first);
        float& score = scores[tile][token];
        score = fmaf(scales.y, shared_.sum[tile * kTileHeads + quarter_], product);
        if constexpr (Z::kCapped) {
          const QueryHead& head = shared_.heads[tile * kTileHeads + quarter_];
          score = cap_score(cap, fmaf(score, head.unit, head.bias * kLog2E));
        }
      }
    }
    run_.replace_rest(next);
  }

  __device__ void add_up(float (&scores)[Z::kTiles][kOwnTokens], int first_token,
                         LogSum (&sums)[Z::kTiles]) {
    if (first_token + kOwnTokens > least_tokens_) {
#pragma unroll
      for (int tile = 0; tile < Z::kTiles; ++tile) {
        const int there = head_of(tile).tokens - first_token;
#pragma unroll
        for (int token = 0; token < kOwnTokens; ++token) {
          if (token >= there) scores[tile][token] = -INFINITY;
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
      case kOwnTokens:
        return add_blocks<kOwnTokens>(scores, first_token, sums);
      default:
        return add_wide_blocks(scores, first_token, sums);
    }
  }

  // Base-2 logarithm of the weights of some of the thread's tokens, without the bias.
  template <int kTokens>
  __device__ float sum_up(const float (&scores)[kOwnTokens], int first, float unit) const {
    float largest = scores[first];
#pragma unroll
    for (int i = 1; i < kTokens; ++i) largest = fmaxf(largest, scores[first + i]);
    // Past the length every score is -infinity: the sum is 0 then, not NaN.
    const float shift = largest == -INFINITY ? 0.0f : -unit * largest;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) sum += fast_exp2(fmaf(scores[first + i], unit, shift));
    return fast_log2(sum) - shift;
  }

  // Of the block that begins with `token`.
  __device__ void store(float log, const QueryHead& head, int token, int block_tokens) const {
    const float score = fmaf(log, kLn2, head.bias);
    const unsigned block = static_cast<unsigned>(token) / static_cast<unsigned>(block_tokens);
    store_if(token < head.tokens, blocks_out_ + (head.row * step_.max_blocks + block), score);
  }

  template <int kTokens>
  __device__ void add_blocks(const float (&scores)[Z::kTiles][kOwnTokens], int first_token,
                             LogSum (&sums)[Z::kTiles]) {
#pragma unroll
    for (int tile = 0; tile < Z::kTiles; ++tile) {
      const QueryHead head = head_of(tile);
#pragma unroll
      for (int first = 0; first < kOwnTokens; first += kTokens) {
        const float log = sum_up<kTokens>(scores[tile], first, head.unit);
        sums[tile].add({log, 1.0f});
        store(log, head, first_token + first, kTokens);
      }
    }
  }

  // Sums of a chunk over all groups. While there are several a lane keeps half of them, and gives
  // the other half away, so that it ends with one.
  __device__ void store_chunk(LogSum (&sums)[Z::kTiles], int chunk) const {
    int tile = 0;
#pragma unroll
    for (int bit = 4, width = Z::kTiles / 2; bit <= 16; bit *= 2, width /= 2) {
      const bool upper = (threadIdx.x & bit) != 0;
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const LogSum given = upper ? sums[i] : sums[i + width];
        if (upper) sums[i] = sums[i + width];
        sums[i].add(given.of_lane(bit));
      }
      if (width == 0) sums[0].add(sums[0].of_lane(bit));
      if (upper) tile += width;
    }
    const QueryHead head = head_of(tile);
    const bool writes = (threadIdx.x & (32 - 4 * Z::kTiles)) == 0;
    if (writes && chunk * kChunkTokens < head.tokens) {
      const int64_t row = list_.first_head(view_) + head.row, at = row * step_.max_chunks + chunk;
      const float log = sums[0].log();
      const_cast<float*>(step_.chunk_lse)[at] = fmaf(log, kLn2, head.bias);
      if (step_.chunk_max != nullptr) {
        // Of blocks of more tokens than a thread has the largest is not known: all together have
        // no less, but for rounding.
        const float most = view_.block_tokens <= kOwnTokens ? sums[0].largest : log + 0.001f;
        const_cast<float*>(step_.chunk_max)[at] = fmaf(most, kLn2, head.bias);
      }
    }
  }

  // Of more tokens than a thread has.
  __device__ void add_wide_blocks(const float (&scores)[Z::kTiles][kOwnTokens], int first_token,
                                  LogSum (&sums)[Z::kTiles]) {
#pragma unroll
    for (int tile = 0; tile < Z::kTiles; ++tile) {
      const QueryHead head = head_of(tile);
      const float log = sum_up<kOwnTokens>(scores[tile], 0, head.unit);
      sums[tile].add({log, 1.0f});
      LogSum block;
      block.add({log, 1.0f});
      for (int bit = 4; bit <= view_.block_tokens / 4; bit *= 2) block.add(block.of_lane(bit));
      if (first_token % view_.block_tokens == 0) {
        store(block.log(), head, first_token, view_.block_tokens);
      }
    }
  }

  const LayerView& view_;
  const Step& step_;
  const PreparedQueries<Z>& shared_;
  const List list_;
  const int num_tokens_;
  const int worker_, workers_;  // of those that share the list, which takes which chunks
  const int group_, quarter_;   // of the lane: which eight tokens, which quarter of their codes
  float* const blocks_out_;     // scores of the list's first query head
  const int least_tokens_;      // of the first row
  unsigned next_token_;         // where the next run begins that is loaded
  Place here_{};                // of its chunk, one a lane
  unsigned next_page_;          // of the chunk after
  typename Z::Run run_;
  unsigned columns_[Z::kProducts == 1 ? Z::kSteps : Z::kProducts][2];
};

// A thread block's part of a list, for `rows` of the batch from the list's on.
template <typename Z>
__device__ inline void score_rows(const LayerView& view, const Step& step, const ScoreCodes& score,
                                  Shared<Z>& shared, List list, int rows) {
  const int warp = threadIdx.x / 32, workers = score.splits * kWarps;
  const int split = static_cast<int>(blockIdx.x), worker = split * kWarps + warp;
  const int length = step.seq_lens[list.row + rows - 1];
  // On their way while the length is.
  const unsigned page = ListScores<Z>::page_of(view, step, score, list.row, worker);
  Queries<Z> queries(view, score, list, rows);
  const int num_tokens = max(min(length, step.max_blocks * view.block_tokens), 0);
  const int chunks = (num_tokens + kChunkTokens - 1) / kChunkTokens;
  // Of what this reads, the launch before wrote only the code of the newest token, and of those
  // just before it: the newest of another request, whose page this one shares, or those that a
  // draft comes after. The first warp waits in any case, so that no launch ends before the one
  // before it.
  const int last = (chunks - 1) % workers, before = last > 0 ? last - 1 : workers - 1;
  const bool is_first = (blockIdx.x | blockIdx.y | blockIdx.z | warp) == 0;
  const bool waits = score.after_write && (worker == last || worker == before || is_first);
  let_next_launch_begin();
  // A graph captured for longer requests has many such thread blocks: they should be short.
  if (split * kWarps >= chunks) {
    if (waits) wait_for_launch_before();
    return;
  }
  ListScores<Z> scores(view, step, shared, list, rows, num_tokens, worker, workers);
  if (!waits) scores.begin(score, page);
  queries.prepare(view, score, shared.query, num_tokens, split == 0);
  // As late as can be: where there is little to score, all wait for this warp.
  if (waits) {
    wait_for_launch_before();
    scores.begin(score, page);
  }
  __syncthreads();
  scores.run(score);
}

template <typename Z>
__global__ void __launch_bounds__(kThreads, Z::kLeastBlocks)
    score_kernel(const __grid_constant__ LayerView view, const __grid_constant__ Step step,
                 const __grid_constant__ ScoreCodes score) {
  using Shared = Shared<Z>;
  __shared__ Shared shared;
  if (!score.after_write) wait_for_launch_before();
  const int head = static_cast<int>(blockIdx.y);
  if constexpr (!Z::kJoint) {
    score_rows(view, step, score, shared, {static_cast<int>(blockIdx.z), head}, 1);
  } else {
    // As csrc/select.cu: where there are more lists than thread blocks they take turns.
    const int num_rows = step.num_lists / view.num_kv_heads;
    const int at_once = static_cast<int>(gridDim.z);
#pragma unroll 1
    for (int number = static_cast<int>(blockIdx.z);; number += at_once) {
      const Led led = find_led(score.spans, score.together, num_rows, number);
      if (led.rows == 0) break;
      score_rows(view, step, score, shared, {led.row, head}, led.rows);
      if (led.after < at_once) break;
      __syncthreads();
    }
  }
}

template <int kSteps, bool kCapped>
cudaError_t launch_steps(const LayerView& view, const Step& step, const ScoreCodes& score,
                         bool dependent, cudaStream_t stream) {
  const int num_rows = step.num_lists / view.num_kv_heads;
  const auto of = [](int number) { return static_cast<unsigned>(number); };
  const dim3 grid(of(score.splits), of(view.num_kv_heads),
                  of((num_rows + score.together - 1) / score.together));
  const auto launch = [&](auto size) {
    return launch_kernel(dependent, score_kernel<decltype(size)>, grid, kThreads, stream, view,
                         step, score);
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
