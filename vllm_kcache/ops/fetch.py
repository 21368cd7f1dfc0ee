# SPDX-License-Identifier: Apache-2.0
"""Step 4 of a decode: bring the selected V blocks to where attention runs."""

from __future__ import annotations

from typing import Any

import torch

from vllm_kcache.ops import checks
from vllm_kcache.ops.dispatch import implementation
from vllm_kcache.types import Fetched, Selected


def fetch_blocks(
    selected: Selected,
    block_table: torch.Tensor,
    v_pool: torch.Tensor,
    v_block_tokens: int,
    hot_cache: Any | None = None,
    layer: int = 0,
    out: Fetched | None = None,
) -> Fetched:
    """Find each selected V block in the hot cache, and bring the others from the host pool.

    Args:
        selected: from `select_blocks`, GPU.
        block_table: [B, MB] int32, GPU. Columns past a row's length are never read.
        v_pool: [M, Hkv, S, D] model dtype, host (mapped, for a GPU), contiguous.
        v_block_tokens: T, tokens of a V block: a power of two that divides S.
        hot_cache: the hot V cache of this GPU, or None: then every block is copied from the host.
        layer: which layer `v_pool` belongs to, as the hot cache names it.
        out: buffers to write and return: rows [B, Hkv, N] int32, v_rows [R, T, D].
    Returns:
        Fetched: rows [B, Hkv, N] int32, v_rows [R, T, D] model dtype, both on the GPU. Tokens of a
        block past the request's length come along with whatever the pool holds: mask them.
    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, by name; on the CPU also
            fewer rows in `out.v_rows` than selected blocks, or a hot cache.

    On a GPU: current stream; graph-safe when `out` is given. With a hot cache, `v_rows` are its
    slots: read them before the next call for the same cache may take them again (one epoch).
    Definition: reference/fetch.py.
    """
    checks.check_host_pool(v_pool)
    _, num_kv_heads, page_tokens, head_size = v_pool.shape
    device = block_table.device
    num_requests = block_table.shape[0]
    checks.check_block_table(block_table, num_requests, device)
    checks.check_selected("selected", selected, num_requests, num_kv_heads, device)
    checks.check_v_block_tokens(v_block_tokens, page_tokens)
    if out is not None:
        checks.check_fetched("out", out, selected.blocks, v_block_tokens, head_size, v_pool.dtype)
    return implementation("fetch", device).fetch_blocks(
        selected, block_table, v_pool, v_block_tokens, hot_cache, layer, out
    )
