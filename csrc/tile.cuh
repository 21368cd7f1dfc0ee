// SPDX-License-Identifier: Apache-2.0
// 16 tokens of a list of int8 rows in a warp, from memory to scores.
//
// Tokens are the rows of the products that give scores, channels those of the products with V. Of K
// a lane has a run of channels of two tokens, of V the same channels of two pairs of tokens: any
// channel may be at any place of a product, so nothing crosses lanes between a row in memory and
// the tensor cores. Columns are four query heads times two: digits of q', high and low, then
// weights, whole and clipped.
#pragma once

#include "head.cuh"
#include "layer_view.h"
#include "ptx.cuh"
#include "warp.cuh"

namespace kcache {

constexpr int kTileTokens = 16;  // of a warp, at once

constexpr int kTileHeads = 4;  // query heads of a tile of them, of which a warp takes some

// Values of q' as two int8 numbers each, 15 bits together: q' = (kLowSteps high + low) unit.
constexpr int kLowSteps = 254;

struct Digits {
  unsigned high, low;  // of four values

  // `steps` takes the largest value to 127.
  __device__ Digits(const float* four, float steps) {
    // Added to a small number, it leaves the nearest integer in the lower bits.
    constexpr float kRounds = 12582912.0f;  // 1.5 * 2^23
    unsigned wholes[4], rests[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float in_steps = four[i] * steps, whole = in_steps + kRounds;
      wholes[i] = __float_as_uint(whole);
      rests[i] = __float_as_uint(fmaf(in_steps - (whole - kRounds), kLowSteps, kRounds));
    }
    high = lowest_bytes(wholes);
    low = lowest_bytes(rests);
  }

 private:
  __device__ static unsigned lowest_bytes(const unsigned (&words)[4]) {
    return permute_bytes(permute_bytes(words[0], words[1], 0x0040),
                         permute_bytes(words[2], words[3], 0x0040), 0x5410);
  }
};

// Base-2 logarithm of a weight in one low step of q' times 1; `most`: the largest value of q'.
__device__ inline float unit_of(float scale, float most) {
  return scale * most * (kLog2E / (127.0f * kLowSteps));
}

// What the weights of a query head are measured by, base-2 logarithms but for the last: of a weight
// in one step of q', of what every weight has, and with the clipped tail of the estimated total and
// the clip, in `kUnit`.
struct alignas(16) HeadTerms {
  float unit, bias, shift, limit;
};
constexpr float kUnit = 128.0f;    // weights are in parts of the estimated total
constexpr float kUnitBits = 7.0f;  // base-2 logarithm of it

// q' of the query heads of a list, in digits, for all warps of a thread block. Heads that a list
// does not have are zeros.
template <int kSteps>
struct QueryShared {
  static constexpr int kWords = 8 * kSteps;  // of four channels each
  unsigned digits[kMaxGroup][2][kWords + 4];
  HeadTerms terms[kMaxGroup];
  float dropped[kMaxGroup];  // estimated mass of what is not selected; with the clipped tail
};

// Where several rows have one list it has the query heads of all, one row's after another's: which
// row a head is of, from the first.
__device__ inline int row_of_head(const LayerView& view, int rows, int head) {
  // There are so few heads that a product is right in place of a division.
  return rows == 1 ? 0 : head * (65536 / view.group + 1) >> 16;
}

// Of all query heads of a batch, one of a list. `list`: of the first row.
__device__ inline int64_t head_in_batch(const LayerView& view, int64_t list, int rows, int head) {
  const int row = row_of_head(view, rows, head);
  return (list + row * view.num_kv_heads) * view.group + head - row * view.group;
}

// All warps of a thread block, and a barrier after it. `rows`: that have the list, the first of
// `num_tokens`. A warp loads so many heads at once.
template <int kHeads, bool kClip, int kSteps>
__device__ inline void prepare_query(QueryShared<kSteps>& shared, const LayerView& view,
                                     const AttendRows& attend, int64_t list, int rows,
                                     int num_tokens, int num_heads) {
  constexpr int kParts = (kSteps + 3) / 4;
  const int lane = threadIdx.x & 31, warps = blockDim.x / 32;
#pragma unroll 1
  for (int first = threadIdx.x / 32; first < num_heads; first += kHeads * warps) {
    float x[kHeads][kParts][4] = {}, bias[kHeads] = {}, lse[kHeads] = {}, dropped[kHeads] = {};
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const int head = first + i * warps;
      if (head >= rows * view.group) break;
      const int64_t in_batch = head_in_batch(view, list, rows, head);
      load_floats(x[i], attend.query + in_batch * view.head_size, view.head_size);
      bias[i] = attend.bias[in_batch];
      if constexpr (kClip) {
        lse[i] = attend.lse[in_batch];
        dropped[i] = attend.dropped[in_batch];
      }
    }
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const int head = first + i * warps;
      if (head >= num_heads) break;
      float most = 1e-20f;
      for_each(x[i], [&](int part, int j) { most = fmaxf(most, fabsf(x[i][part][j])); });
      most = warp_max(most);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int word = part * 32 + lane;
        const Digits digits(x[i][part], 127.0f * fast_reciprocal(most));
        if (word >= shared.kWords) continue;
        shared.digits[head][0][word] = digits.high;
        shared.digits[head][1][word] = digits.low;
      }
      if (lane != 0) continue;
      HeadTerms terms{unit_of(attend.scale, most), bias[i] * kLog2E, 0.0f, 0.0f};
      if constexpr (kClip) {
        terms.shift = lse[i] * kLog2E - kUnitBits;
        const int tokens = num_tokens + row_of_head(view, rows, head);
        // Beyond so many tokens the clip falls as the threshold does.
        const float share =
            attend.clip_length * fast_reciprocal(static_cast<float>(max(tokens, 1)));
        terms.limit = attend.clip * sqrtf(fminf(share, 1.0f)) * kUnit;
      }
      shared.terms[head] = terms;
      if constexpr (kClip) shared.dropped[head] = dropped[i];
    }
  }
}

// The same as a warp's products take it, of some tiles of query heads: a digit of a query head, and
// what scores need of another. Where several rows have one list all stays in shared memory, for
// want of registers.
template <int kSteps, bool kJoint, int kTiles>
class Query {
  static_assert(kJoint || kTiles == 1);

 public:
  // Of the heads from `first_head`.
  __device__ Query(const QueryShared<kSteps>& shared, int first_head)
      : shared_terms_(shared.terms + first_head + (threadIdx.x & 3)) {
    const int group = (threadIdx.x & 31) / 4, quarter = threadIdx.x & 3;
    words_ = shared.digits[first_head + group / 2][group & 1] + quarter * 2 * kSteps;
    if constexpr (!kJoint) {
      terms_ = *shared_terms_;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint2 two = reinterpret_cast<const uint2*>(words_)[step];
        columns_[step][0] = two.x;
        columns_[step][1] = two.y;
      }
    }
  }
  __device__ void load(unsigned (&columns)[2], int tile, int step) const {
    if constexpr (kJoint) {
      constexpr int kTileWords =
          kTileHeads * sizeof(QueryShared<kSteps>::digits[0]) / sizeof(unsigned);
      load_shared(columns, words_ + tile * kTileWords + 2 * step);
    } else {
      columns[0] = columns_[step][0];
      columns[1] = columns_[step][1];
    }
  }
  __device__ HeadTerms terms(int tile) const {
    if constexpr (!kJoint) return terms_;
    const auto* from = reinterpret_cast<const unsigned*>(shared_terms_ + tile * kTileHeads);
    unsigned two[2], others[2];
    load_shared(two, from);
    load_shared(others, from + 2);
    return {__uint_as_float(two[0]), __uint_as_float(two[1]), __uint_as_float(others[0]),
            __uint_as_float(others[1])};
  }

 private:
  const unsigned* words_;
  const HeadTerms* shared_terms_;
  HeadTerms terms_;
  unsigned columns_[kSteps][2];
};

// Of a power of two.
__device__ inline int shift_of(int tokens) {
  return __popc(tokens - 1);
}

// A lane's token: where its K begins, both its scales, and whether it is attended to; where several
// rows have one list, for each of them a bit of that.
struct Token {
  const char* key;
  unsigned short of_key, of_value;
  bool exists;
  unsigned seen;
};

// A list of rows, of one at least, by tiles.
template <bool kJoint>
class ListRows {
 public:
  // `num_tokens`: of the first row that has the list; each of the others has one more than the row
  // before.
  __device__ ListRows(const LayerView& view, const Step& step, int64_t list, int count,
                      int num_tokens)
      : view_(view),
        blocks_(step.blocks + (kJoint ? 0 : list * step.columns)),
        rows_(step.rows + (kJoint ? 0 : list * step.columns)),
        first_(kJoint ? static_cast<unsigned>(list * step.columns) : 0),
        count_(count),
        num_tokens_(num_tokens),
        shift_(shift_of(view.block_tokens)) {}

  __device__ int num_tokens() const { return num_tokens_; }
  __device__ int tiles() const { return ((count_ << shift_) + kTileTokens - 1) / kTileTokens; }

  // What was loaded stays as it is until it is needed, a tile later: arithmetic would wait for it.

  // Which row has one of the lane's tokens of a tile, and what the list says of it: which block of
  // the request it is, and who selected that. Past the end of the list: those of the last.
  struct Place {
    int row, entry;
  };
  __device__ Place place(int tile) const {
    const int there = min((tile * kTileTokens + of_lane()) >> shift_, count_ - 1);
    return {rows_[first_ + there], blocks_[first_ + there]};
  }

  __device__ Token find(int tile, Place place) const {
    const int token = tile * kTileTokens + of_lane(), in = token & (view_.block_tokens - 1);
    const char* row = row_of(place);
    const char* scales = row + (view_.head_size << (shift_ + 1)) + 2 * in;
    bool exists = token >> shift_ < count_;
    unsigned seen = 0;
    if constexpr (kJoint) {
      const int block = place.entry & (kMaxBlocks - 1), position = (block << shift_) + in;
      // Rows of at most so many tokens do not see it.
      const int before = min(max(position - num_tokens_ + 1, 0), kMostTogether);
      seen = exists ? static_cast<unsigned>(place.entry) >> kBlockBits >> before << before : 0;
    } else {
      exists = exists && (place.entry << shift_) + in < num_tokens_;
    }
    return {row + in * view_.head_size, *reinterpret_cast<const unsigned short*>(scales),
            *reinterpret_cast<const unsigned short*>(scales + (2 << shift_)), exists, seen};
  }

  // K of a tile and V, a lane a token's K or V, to the second-level cache; not over the link.
  __device__ void fetch_ahead(int tile, Place place) const {
    const int in = (tile * kTileTokens + of_lane()) & (view_.block_tokens - 1);
    const bool is_value = (threadIdx.x & kTileTokens) != 0;
    if (place.row < 0) return;
    prefetch(row_of(place) + in * view_.head_size + (is_value ? value_distance() : 0));
  }

  __device__ int value_distance() const { return view_.head_size << shift_; }

 private:
  __device__ const char* row_of(Place place) const {
    return place.row >= 0
               ? view_.slots + static_cast<int64_t>(place.row) * view_.row_bytes
               : view_.host_rows + static_cast<int64_t>(-2 - place.row) * view_.row_bytes;
  }
  __device__ static int of_lane() { return threadIdx.x & (kTileTokens - 1); }

  const LayerView& view_;
  const int *blocks_, *rows_;
  const unsigned first_;  // one number for both, for want of registers
  const int count_, num_tokens_, shift_;
};

// Of an address, that of another lane.
__device__ inline const char* of_lane(const char* address, int lane) {
  return reinterpret_cast<const char*>(
      __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(address), lane));
}

// Words of some tokens in registers, in loads of kLoad.
template <int kTokens, int kWords, int kLoad>
struct Words {
  unsigned loaded[kTokens][kWords / kLoad][kLoad] = {};

  __device__ void load(bool wanted, int token, const char* from) {
#pragma unroll
    for (int i = 0; i < kWords / kLoad; ++i)
      load_if(wanted, loaded[token][i], from + i * 4 * kLoad);
  }
  __device__ unsigned word(int token, int number) const {
    return loaded[token][number / kLoad][number % kLoad];
  }
};

// K of a tile: of two tokens a quarter each.
template <int kSteps>
struct Keys : Words<2, 2 * kSteps, kSteps % 2 == 0 ? 4 : 2> {
  __device__ void load_tile(bool wanted, const Token& token) {
    const int lane = threadIdx.x & 31, group = lane / 4, quarter = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      this->load(wanted, i, of_lane(token.key, 8 * i + group) + quarter * 8 * kSteps);
    }
  }
};

// Which token of a tile is number i of the four of a lane's V: two pairs.
__device__ inline int token_of_value(int i) {
  return 2 * static_cast<int>(threadIdx.x & 3) + (i & 1) + 4 * (i & 2);
}

// V of a tile: of four tokens an eighth each.
template <int kSteps>
struct Values : Words<4, kSteps,
                      kSteps % 4 == 0   ? 4
                      : kSteps % 2 == 0 ? 2
                                        : 1> {
  __device__ void load_tile(bool wanted, const Token& token, int distance) {
    const int group = (threadIdx.x & 31) / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const char* from = of_lane(token.key, token_of_value(i)) + distance;
      this->load(wanted, i, from + group * 4 * kSteps);
    }
  }
};

// Which token of a tile is number i of the two of a lane's scores.
__device__ inline int token_of_score(int i) {
  return static_cast<int>(threadIdx.x & 31) / 4 + 8 * i;
}

// What scores need of a tile beside K, for the lane's two tokens.
struct Scales {
  float key[2], value[2];
  unsigned seen[2];  // as in `Token`; where each row has its list, 1 where there is a token

  template <bool kJoint>
  __device__ void take(const Token& token) {
    unsigned there = 0;
    if constexpr (!kJoint) there = __ballot_sync(kAllLanes, token.exists);
    const unsigned scales = token.of_key | static_cast<unsigned>(token.of_value) << 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 both = halves_to_floats(__shfl_sync(kAllLanes, scales, token_of_score(i)));
      if constexpr (kJoint) {
        seen[i] = __shfl_sync(kAllLanes, token.seen, token_of_score(i));
      } else {
        seen[i] = there >> token_of_score(i) & 1;
      }
      // Past the length a row may hold anything, NaN too.
      key[i] = seen[i] != 0 ? both.x : 0.0f;
      value[i] = seen[i] != 0 ? both.y : 0.0f;
    }
  }
};

// Of each tile of query heads, the bit of the row that the lane's is of.
template <bool kJoint, int kTiles>
struct RowBits {
  unsigned bits[kTiles];

  __device__ RowBits(const LayerView& view, int rows, int first_head) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int head = first_head + tile * kTileHeads + static_cast<int>(threadIdx.x & 3);
      bits[tile] = kJoint ? 1u << row_of_head(view, rows, head) : 1;
    }
  }
};

// Base-2 scores of the lane's two tokens with its query heads; -infinity where there is no token.
template <bool kCapped, int kSteps, bool kJoint, int kTiles>
__device__ inline void multiply(float (&scores)[kTiles][2],
                                const Query<kSteps, kJoint, kTiles>& query,
                                const Keys<kSteps>& keys, const Scales& scales,
                                const RowBits<kJoint, kTiles>& rows_of_heads, const SoftCap& cap) {
  int products[kTiles][4] = {};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const unsigned rows[4] = {keys.word(0, 2 * step), keys.word(1, 2 * step),
                              keys.word(0, 2 * step + 1), keys.word(1, 2 * step + 1)};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      unsigned columns[2];
      query.load(columns, tile, step);
      multiply_add(products[tile], rows, columns);
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const HeadTerms terms = query.terms(tile);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float product =
          static_cast<float>(products[tile][2 * i] * kLowSteps + products[tile][2 * i + 1]);
      float score = fmaf(product * terms.unit, scales.key[i], terms.bias);
      if constexpr (kCapped) score = cap_score(cap, score);
      scores[tile][i] = scales.seen[i] & rows_of_heads.bits[tile] ? score : -INFINITY;
    }
  }
}

// Words of two tokens, four channels each, as four rows of a product: pairs of float16.
__device__ inline void widen(unsigned (&pairs)[4], unsigned one, unsigned other) {
  // 0x6400 | (x + 128) is 1152 + x.
  constexpr unsigned kSigns = 0x80808080u, kExponents = 0x64646464u, kOffset = 0x64806480u;
  const unsigned first = permute_bytes(one, other, 0x5140) ^ kSigns;
  const unsigned second = permute_bytes(one, other, 0x7362) ^ kSigns;
  pairs[0] = subtract_halves(permute_bytes(first, kExponents, 0x4140), kOffset);
  pairs[1] = subtract_halves(permute_bytes(first, kExponents, 0x4342), kOffset);
  pairs[2] = subtract_halves(permute_bytes(second, kExponents, 0x4140), kOffset);
  pairs[3] = subtract_halves(permute_bytes(second, kExponents, 0x4342), kOffset);
}

}  // namespace kcache
