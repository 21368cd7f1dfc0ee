# SPDX-License-Identifier: Apache-2.0
"""The planner's sizes are those that the GPU runtime allocates, without allocating them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from vllm_kcache.config import KCacheConfig
from vllm_kcache.planner import memory
from vllm_kcache.planner.memory import Engine
from vllm_kcache.planner.shape import ModelShape

pytestmark = pytest.mark.usefixtures("quick_vllm")

GPU_BYTES = 79.1 * 2**30
# Query heads, KV heads, head size.
HEADS = [(32, 32, 128), (32, 8, 128), (9, 3, 64), (48, 4, 80)]


def shape_of(query_heads: int, kv_heads: int, head_size: int) -> ModelShape:
    return ModelShape(
        "test", 32, 4096, 11008, query_heads, kv_heads, head_size, 32000, 2, 131072, 0, 0
    )


def runtime_of(shape: ModelShape, engine: Engine, config: KCacheConfig) -> Any:
    """A GPU runtime with everything that its sizes follow from, and nothing on a GPU."""
    from vllm_kcache.integration import gpu_runtime
    from vllm_kcache.integration.runtime import PageShape

    runtime = object.__new__(gpu_runtime.GPURuntime)
    names = tuple(f"layers.{index}" for index in range(shape.num_layers))
    runtime.config = config
    runtime.shape = PageShape(
        names, shape.num_kv_heads, engine.block_size, shape.head_size, torch.bfloat16
    )
    runtime.v_block_tokens = config.resolved_v_block_tokens(shape.head_size, 2, engine.block_size)
    runtime.selection = config.selection(runtime.v_block_tokens)
    runtime.num_query_heads = shape.num_query_heads
    runtime.limits = gpu_runtime.GPULimits(
        engine.max_num_seqs, engine.max_num_batched_tokens, engine.max_model_len
    )
    row = shape.num_kv_heads * shape.head_size * 2
    pages = max(1, gpu_runtime.PIECE_BYTES // row // engine.block_size, engine.max_num_seqs)
    runtime.scratch_tokens = pages * engine.block_size
    return runtime


def test_groups_are_as_large_as_their_buffers_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 query heads, 8 KV heads, 32K: 158 requests would fit, so the cap of 64 decides."""
    from vllm_kcache.integration import gpu_runtime
    from vllm_kcache.kernels import extension
    from vllm_kcache.kernels.decode import DecodeWorkspace

    monkeypatch.setattr(extension, "available", lambda: True)
    for length, fewer in ((32768, False), (131072, True)):
        made = runtime_of(shape_of(64, 8, 128), Engine(length, 256), KCacheConfig())
        arguments = made._workspace_arguments()
        group = arguments["max_requests"]
        assert (group < gpu_runtime.GROUP_REQUESTS) == fewer
        assert DecodeWorkspace.bytes(**arguments) <= gpu_runtime.WORKSPACE_BYTES
        if fewer:
            more = {**arguments, "max_requests": group + 1}
            assert DecodeWorkspace.bytes(**more) > gpu_runtime.WORKSPACE_BYTES


@pytest.mark.parametrize(
    ("heads", "max_len", "seqs"), list(itertools.product(HEADS, (4096, 131072), (8, 256)))
)
def test_blocks_are_those_of_the_runtime(
    heads: tuple[int, int, int], max_len: int, seqs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_kcache.kernels import extension

    monkeypatch.setattr(extension, "available", lambda: True)
    for settings in ({}, {"top_n": 16, "hot_cache_gib": 3}, {"top_n": "all"}):
        shape, engine = shape_of(*heads), Engine(max_len, seqs)
        config = KCacheConfig.from_user(settings)
        runtime = runtime_of(shape, engine, config)
        buffers = memory.gpu_fixed_bytes(shape, engine, config)
        assert buffers == runtime.fixed_bytes()
        left = memory.cache_bytes_gpu(shape, engine, GPU_BYTES) - buffers
        hot = runtime.plan_hot_cache(left)
        k_bytes, tables = memory.gpu_bytes_per_page(shape, engine, config)
        assert tables == runtime.bytes_per_page()
        assert k_bytes == memory.host_bytes_per_page(shape, engine, config)
        assert k_bytes == runtime.shape.v_bytes_per_page
        fit = memory.fit_split(shape, engine, GPU_BYTES, 1e15, config)
        assert fit.hot_cache_bytes == hot
        assert fit.num_blocks == (left - hot) // (k_bytes + tables)
        assert fit.host_bytes == fit.num_blocks * k_bytes
