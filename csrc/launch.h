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

}  // namespace kcache
