// SPDX-License-Identifier: Apache-2.0
// Launchers of the kernels, in plain types. Ranges of KV heads let a wave be a part of a step.
#pragma once

#include "args.h"

namespace kcache {

struct HeadRange {
  int num_requests, first_head, num_heads;
};

cudaError_t launch_select(const SelectArgs& select, HeadRange range, cudaStream_t stream);
// Lists that are there already: `blocks` and `counts` as select wrote them.
cudaError_t launch_fetch(const FetchArgs& fetch, const int* blocks, const int* counts,
                         HeadRange range, cudaStream_t stream);
cudaError_t launch_select_fetch(const SelectArgs& select, const FetchArgs& fetch, HeadRange range,
                                bool dependent, cudaStream_t stream);
// Runs beside the kernel that scores, and takes each list as soon as its scores are there.
cudaError_t launch_follow(const SelectArgs& select, const FetchArgs& fetch,
                          const FollowArgs& follow, int num_blocks, cudaStream_t stream);
cudaError_t launch_copy_misses(const FetchArgs& fetch, int num_blocks, cudaStream_t stream);

}  // namespace kcache
