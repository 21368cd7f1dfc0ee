# SPDX-License-Identifier: Apache-2.0
"""Bring the selected V blocks to where attention runs. The definition of this step."""

from __future__ import annotations

import torch

from vllm_kcache.reference.paging import gather_v_blocks, physical_v_blocks
from vllm_kcache.types import PADDING_ROW, Fetched, Selected


def fetch_blocks(
    selected: Selected,
    block_table: torch.Tensor,
    v_pool: torch.Tensor,
    v_block_tokens: int,
) -> Fetched:
    """Copy each selected V block to a staging row of its own.

    On a GPU the same step looks a block up in the hot cache, and copies only what is missing.

    Args:
        selected: from `select_blocks`.
        block_table: [B, MB] int32. Columns past a row's length are never read.
        v_pool: [M, Hkv, S, D] model dtype, host, contiguous.
        v_block_tokens: T, tokens of a V block: a power of two that divides S.
    Returns:
        Fetched: rows [B, Hkv, N] int32, v_rows [R, T, D] model dtype. Tokens of a block past the
        request's length come along with whatever the pool holds: mask them.
    """
    _, num_kv_heads, page_tokens, _ = v_pool.shape
    blocks = selected.blocks
    wanted = blocks >= 0
    physical = physical_v_blocks(blocks, block_table, num_kv_heads, page_tokens // v_block_tokens)
    v_rows = gather_v_blocks(v_pool, physical[wanted], v_block_tokens)
    # Staging rows in the order of (request, KV head, block), with no gaps.
    rows = wanted.flatten().cumsum(0).view_as(blocks) - 1
    rows = rows.masked_fill(~wanted, PADDING_ROW).to(torch.int32)
    return Fetched(rows, v_rows)
