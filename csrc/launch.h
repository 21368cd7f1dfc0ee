// SPDX-License-Identifier: Apache-2.0
// Launchers of the kernels, in plain types.
#pragma once

#include "layer_view.h"

namespace kcache {

// Select every list that is not done, and fetch it where the step has `rows`.
cudaError_t launch_select(const LayerView& view, const Step& step, bool dependent,
                          cudaStream_t stream);
// Fetch lists that are there already: `blocks` and `counts` as select wrote them.
cudaError_t launch_fetch(const LayerView& view, const Step& step, cudaStream_t stream);
// Runs beside the kernel that scores, and takes each list as soon as its scores are there.
cudaError_t launch_follow(const LayerView& view, const Step& step, const Follow& follow,
                          int num_blocks, cudaStream_t stream);

// Score every V block from K codes: `block_lse` and `chunk_lse`.
cudaError_t launch_score_codes(const LayerView& view, const Step& step, const ScoreCodes& score,
                               bool dependent, cudaStream_t stream);
// Attend over lists of int8 rows, and end the epoch.
cudaError_t launch_attend_rows(const LayerView& view, const Step& step, const AttendRows& attend,
                               bool dependent, cudaStream_t stream);
// At most so many thread blocks; 0: as many as there is work for.
cudaError_t launch_write_rows(const LayerView& view, const WriteRows& write, int most_blocks,
                              bool dependent, cudaStream_t stream);
// The same of tokens of decodes: at most 65535, and all may take slots.
cudaError_t launch_write_tokens(const LayerView& view, const WriteRows& write, bool dependent,
                                cudaStream_t stream);
cudaError_t launch_gather_rows(const LayerView& view, const GatherRows& gather, int most_blocks,
                               cudaStream_t stream);

}  // namespace kcache
