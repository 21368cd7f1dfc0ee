// SPDX-License-Identifier: Apache-2.0
// Checks of tensor arguments, in PyTorch's stable ABI.
#pragma once

#include <initializer_list>

#include "device.h"

namespace kcache {

using torch::headeronly::ScalarType;

// Size that any dimension may have.
constexpr int64_t kAnySize = -1;

inline void check_tensor(const char* name, const Tensor& tensor, ScalarType dtype,
                         std::initializer_list<int64_t> shape, const Tensor& beside) {
  STD_TORCH_CHECK(on_gpu(tensor) && tensor.get_device_index() == beside.get_device_index(), name,
                  ": must lie on the GPU of the other tensors");
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

// Block tables are rows of a wider tensor: strided over requests, contiguous within one.
inline void check_block_table(const Tensor& block_table, int64_t num_requests,
                              const Tensor& beside) {
  STD_TORCH_CHECK(
      on_gpu(block_table) && block_table.get_device_index() == beside.get_device_index(),
      "block_table: must lie on the GPU of the other tensors");
  STD_TORCH_CHECK(block_table.scalar_type() == ScalarType::Int,
                  "block_table: has the wrong dtype; must be int32");
  STD_TORCH_CHECK(block_table.dim() == 2 && block_table.size(0) == num_requests &&
                      (block_table.size(1) <= 1 || block_table.stride(1) == 1),
                  "block_table: must be [B=", num_requests, ", MB], contiguous in each row");
}

// Mapped host memory, seen by the GPU at the host's address (HostPool checks that at start).
inline void check_host_pool(const Tensor& v_pool, const Tensor& v_rows, int64_t v_block_tokens) {
  STD_TORCH_CHECK(v_pool.is_cpu() && v_pool.is_contiguous() && v_pool.dim() == 4,
                  "v_pool: must be [M, Hkv, S, D], contiguous, in mapped host memory");
  STD_TORCH_CHECK(on_gpu(v_rows) && v_rows.is_contiguous() && v_rows.dim() == 3 &&
                      v_rows.size(1) == v_block_tokens && v_rows.size(2) == v_pool.size(3) &&
                      v_rows.scalar_type() == v_pool.scalar_type(),
                  "v_rows: must be [R, T=", v_block_tokens, ", D=", v_pool.size(3),
                  "], contiguous, on the GPU, with the dtype of v_pool");
  STD_TORCH_CHECK(v_block_tokens >= 1 && v_pool.size(2) % v_block_tokens == 0,
                  "v_block_tokens=", v_block_tokens, ": must divide the ", v_pool.size(2),
                  " tokens of a page");
  STD_TORCH_CHECK(
      v_block_tokens * v_pool.size(3) * static_cast<int64_t>(v_pool.element_size()) % 16 == 0,
      "v_block_tokens * head_size: a V block must be a multiple of 16 bytes");
}

}  // namespace kcache
