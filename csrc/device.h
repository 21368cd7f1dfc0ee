// SPDX-License-Identifier: Apache-2.0
// The GPU that a tensor lies on, in PyTorch's stable ABI.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

namespace kcache {

using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

inline bool on_gpu(const Tensor& tensor) {
  return tensor.is_cuda();
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace kcache
