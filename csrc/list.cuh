// SPDX-License-Identifier: Apache-2.0
// One list from scores to rows: each segment is fetched as soon as it is selected.
#pragma once

#include "fetch.cuh"
#include "select.cuh"

namespace kcache {

template <typename R>
struct ListShared {
  SelectShared<R> select;
  FetchShared fetch;
};

// Returns, to the first thread, the V blocks that were not found in the hot cache.
template <typename R>
__device__ inline int select_and_fetch_list(const LayerView& view, const Step& step,
                                            ListShared<R>& shared, ListSelection<R>& selection,
                                            int list) {
  if (threadIdx.x == 0) begin_fetch(shared.fetch);
  selection.run([&](const NearBlock* kept, int count, int first_block, int first_column) {
    fetch_part(view, step, shared.fetch, list, kept, count, first_block, first_column);
  });
  return threadIdx.x == 0 ? end_fetch(view, shared.fetch) : 0;
}

}  // namespace kcache
