# SPDX-License-Identifier: Apache-2.0
"""GPU implementation of the steps: Triton for all, the compiled extension where it is faster.

The modules carry the names of the steps and define them with the signatures of `vllm_kcache.ops`;
`launch_*` functions beside them take ranges of heads and preallocated buffers, for `decode_step`.
"""
