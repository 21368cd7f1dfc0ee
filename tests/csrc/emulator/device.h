// SPDX-License-Identifier: Apache-2.0
// Takes the place of csrc/device.h: the GPU is the host.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda_runtime.h"

namespace kcache {

using torch::stable::Tensor;

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

inline bool on_gpu(const Tensor& tensor) {
  return tensor.is_cpu();
}

inline cudaStream_t current_stream(const Tensor&) {
  return nullptr;
}

}  // namespace kcache

#define STD_CUDA_CHECK(call)                                                    \
  do {                                                                          \
    const cudaError_t error_ = (call);                                          \
    STD_TORCH_CHECK(error_ == cudaSuccess, "emulated launch failed: ", error_); \
  } while (false)
