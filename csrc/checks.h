// SPDX-License-Identifier: Apache-2.0
// Checks of tensor arguments, in PyTorch's stable ABI.
#pragma once

#include <initializer_list>
#include <numbers>
#include <optional>

#include "device.h"
#include "layer_view.h"

namespace kcache {

using torch::headeronly::ScalarType;

// Size that any dimension may have.
constexpr int64_t kAnySize = -1;

inline void check_shape(const char* name, const Tensor& tensor, ScalarType dtype,
                        std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": has the wrong dtype");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": must be contiguous");
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(shape.size()), name, ": has ", tensor.dim(),
                  " dimensions; must have ", shape.size());
  int64_t dim = 0;
  for (int64_t size : shape) {
    STD_TORCH_CHECK(size == kAnySize || tensor.size(dim) == size, name, ": has size ",
                    tensor.size(dim), " in dimension ", dim, "; must be ", size);
    ++dim;
  }
}

inline void check_gpu(const char* name, const Tensor& tensor, const Tensor& beside) {
  STD_TORCH_CHECK(on_gpu(tensor) && tensor.get_device_index() == beside.get_device_index(), name,
                  ": must lie on the GPU of the other tensors");
}

inline void check_tensor(const char* name, const Tensor& tensor, ScalarType dtype,
                         std::initializer_list<int64_t> shape, const Tensor& beside) {
  check_gpu(name, tensor, beside);
  check_shape(name, tensor, dtype, shape);
}

// Block tables are rows of a wider tensor: strided over requests, contiguous within one.
inline void check_block_table(const Tensor& block_table, int64_t num_requests,
                              const Tensor& beside) {
  check_gpu("block_table", block_table, beside);
  STD_TORCH_CHECK(block_table.scalar_type() == ScalarType::Int,
                  "block_table: has the wrong dtype; must be int32");
  STD_TORCH_CHECK(block_table.dim() == 2 && block_table.size(0) == num_requests &&
                      (block_table.size(1) <= 1 || block_table.stride(1) == 1),
                  "block_table: must be [B=", num_requests, ", MB], contiguous in each row");
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Of each row, the rows of its request before it and after it (`Step::spans`); null without.
inline const int2* spans_of(const std::optional<Tensor>& spans, int64_t num_requests,
                            const Tensor& beside) {
  if (!spans) return nullptr;
  check_tensor("spans", *spans, ScalarType::Int, {num_requests, 2}, beside);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(spans->data_ptr()) % 8 == 0,
                  "spans: must begin at a multiple of 8 bytes");
  return pointer<int2>(*spans);
}

inline Dtype dtype_of(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, name,
      ": has the wrong dtype; must be float32, float16 or bfloat16");
  return type == ScalarType::Float  ? Dtype::kFloat32
         : type == ScalarType::Half ? Dtype::kFloat16
                                    : Dtype::kBFloat16;
}

// Of base-2 scores.
inline SoftCap soft_cap_of(std::optional<double> cap) {
  if (!cap) return {};
  STD_TORCH_CHECK(*cap > 0, "soft_cap=", *cap, ": must be above 0");
  return {static_cast<float>(*cap * std::numbers::log2e), static_cast<float>(2 / *cap)};
}

}  // namespace kcache
