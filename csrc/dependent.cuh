// SPDX-License-Identifier: Apache-2.0
// Launches that begin before the launch before them has ended: vllm_kcache/kernels/dependent.py.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

namespace kcache {

// Wait until the launch before this one has ended, and its memory is there.
__device__ inline void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// The next launch may begin once all thread blocks have come here.
__device__ inline void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

template <typename... Parameters>
cudaError_t launch_kernel(bool dependent, void (*kernel)(Parameters...), dim3 grid, int threads,
                          cudaStream_t stream,
                          const std::type_identity_t<Parameters>&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace kcache
