// SPDX-License-Identifier: Apache-2.0
// Tokens of one request that have one list: the part of csrc/select.cuh that is for them alone.
//
// Each row selects as if it were alone, from its own scores and by its own length. The list is what
// any of them has selected, so a block is looked up, fetched and read once for all, and with each
// block it says who selected it: attention masks it for the others.
#pragma once

#include "select.cuh"

namespace kcache {

// Look at one of the rows. A warp may do this alone.
template <typename R>
__device__ void ListSelection<R>::use(int row) {
  const int num_tokens = num_tokens_ + row;
  row_ = row;
  list_ = leader_ + row * view_.num_kv_heads;
  num_blocks_ =
      min((max(num_tokens, 0) + view_.block_tokens - 1) / view_.block_tokens, step_.max_blocks);
  use_length(num_tokens);
  cached_ = false;
  if constexpr (R::kSearches) threshold_ = shared_.thresholds[row];
}

// A warp a query head of a row.
template <typename R>
__device__ void ListSelection<R>::normalise_rows() {
#pragma unroll 1
  for (int place = warp_; place < rows_ * view_.group; place += num_warps()) {
    use(place / view_.group);
    const int head = place - row_ * view_.group;
    begin_head(head, log_sum(head, (num_blocks_ + step_.chunk_blocks - 1) / step_.chunk_blocks));
    if (lane_ == 0 && head == 0) {
      shared_.ends[row_] = make_int2(num_blocks_, first_recent_);
      shared_.selected[row_] = 0;
    }
  }
  __syncthreads();
}

template <typename R>
__device__ void ListSelection<R>::find_thresholds() {
#pragma unroll 1
  for (int row = 0; row < rows_; ++row) {
    use(row);
    find_threshold();
    if (threadIdx.x == 0) shared_.thresholds[row] = threshold_;
    __syncthreads();
  }
}

// Rows that keep the lane's block of a word.
template <typename R>
__device__ unsigned ListSelection<R>::rows_with(int word) const {
  unsigned rows = 0;
#pragma unroll
  for (int row = 0; row < R::kMostRows; ++row) {
    const unsigned kept = row < rows_ ? shared_.kept_words[row][word] : 0;
    rows |= ((kept >> lane_) & 1) << row;
  }
  return rows;
}

// Which chunks of a segment have a score that reaches its limit in one of the query heads; theirs
// are on their way to the second-level cache then. A barrier comes after it.
template <typename R>
__device__ void ListSelection<R>::find_chunks(int first_block) {
  const int shift = __popc(step_.chunk_blocks - 1), first_chunk = first_block >> shift;
  const int blocks = min(most_blocks() - first_block, kSegment);
  // A row has whole words, so that a warp is of one row.
  const int words = (((blocks - 1) >> shift) >> 5) + 1;
#pragma unroll 1
  for (int i = warp_; i < rows_ * words; i += num_warps()) {
    const int row = i / words, word = i - row * words, chunk = word * 32 + lane_;
    const bool exists = chunk << shift < blocks;
    const int64_t list = leader_ + row * view_.num_kv_heads;
    const float* most = step_.chunk_max + list * view_.group * step_.max_chunks + first_chunk +
                        (exists ? chunk : 0);
    const auto* limits = reinterpret_cast<const float*>(shared_.limits[row]);
    bool reaches = false;
#pragma unroll 4
    for (int head = 0; head < view_.group; ++head, most += step_.max_chunks) {
      // What is no number says nothing of the others in its chunk.
      reaches |= !(__ldcg(most) < limits[head]);
    }
    const unsigned wanted = __ballot_sync(kAllLanes, exists && reaches);
    if (lane_ == 0) shared_.chunks[row][word] = wanted;
    if (!exists || !reaches) continue;
    const int first = chunk << shift, last = min(first + step_.chunk_blocks, blocks);
#pragma unroll 1
    for (int head = 0; head < view_.group; ++head) {
      const float* scores = scores_of(row, head) + first_block;
#pragma unroll 1
      for (int block = first; block < last; block += 32) prefetch(scores + block);
    }
  }
  __syncthreads();
}

// As `run`. Of several rows each has a token.
template <typename R>
template <typename Take>
__device__ int ListSelection<R>::run_joint(const Take& take) {
  if (num_blocks_ > 0) {
    fetch_ahead();
    normalise_rows();
    if constexpr (R::kSearches) find_thresholds();
  } else {
    if (static_cast<int>(threadIdx.x) < rows_) {
      shared_.ends[threadIdx.x] = make_int2(0, 0);
      shared_.selected[threadIdx.x] = 0;
    }
    __syncthreads();
  }
  // The last warps, which have the least to fetch, end a row each.
  const int its_row = num_warps() - 1 - warp_;
  int count = 0;
#pragma unroll 1
  for (int first = 0; first < most_blocks(); first += kSegment) {
    if constexpr (R::kSearches) {
#pragma unroll 1
      for (int row = 0; row < rows_; ++row) {
        use(row);
        mark_ranked(first);
      }
    } else {
      if (passes_over()) find_chunks(first);
      mark(first);
    }
    __syncthreads();
    int place = 0;
    const int in_segment = count_kept(first, step_.columns - count, place);
    if (its_row < rows_) {
      const int words = share(first).words;
      int in_row = 0;
#pragma unroll 1
      for (int i = lane_; i < words; i += 32) in_row += __popc(shared_.kept_words[its_row][i]);
      in_row = warp_sum(in_row);
      if (lane_ == 0) shared_.selected[its_row] += in_row;
    }
#pragma unroll 1
    for (int part = 0; part < in_segment; part += num_threads()) {
      const int in_part = min(in_segment - part, num_threads());
      write(first, count, part, in_part, place);
      __syncthreads();
      cover(first, in_part);
      take(shared_.kept, in_part, first, count + part);
      __syncthreads();
    }
    count += in_segment;
    if (first + kSegment < most_blocks()) __syncthreads();
  }
  // What was covered is there since the last barrier: every list that is not empty has a block.
  if (its_row < rows_) {
    finish(its_row, shared_.ends[its_row].x, shared_.selected[its_row], its_row == 0 ? count : 0);
  }
  __syncthreads();
  return count;
}

}  // namespace kcache
