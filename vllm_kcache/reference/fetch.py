# SPDX-License-Identifier: Apache-2.0
"""Bring the rows of the selected V blocks to where attention runs. The definition of this step."""

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
    physical = physical_v_blocks(
        selected.blocks, block_table, num_kv_heads, page_tokens // v_block_tokens
    )
    wanted = selected.blocks >= 0
    v_rows = gather_v_blocks(v_pool, physical[wanted], v_block_tokens)
    return Fetched(_staging_rows(wanted), v_rows)


def fetch_rows(
    selected: Selected,
    block_table: torch.Tensor,
    host_rows: torch.Tensor,
    num_kv_heads: int,
    blocks_per_page: int,
) -> Fetched:
    """The same for rows of K and V.

    Args:
        selected, block_table: as `fetch_blocks`.
        host_rows: [M * Hkv * S / T, row bytes] uint8, host.
        num_kv_heads: Hkv.
        blocks_per_page: S / T.
    Returns:
        Fetched: v_rows [R, row bytes] uint8.
    """
    physical = physical_v_blocks(selected.blocks, block_table, num_kv_heads, blocks_per_page)
    wanted = selected.blocks >= 0
    return Fetched(_staging_rows(wanted), host_rows.index_select(0, physical[wanted]))


def _staging_rows(wanted: torch.Tensor) -> torch.Tensor:
    """Staging rows in the order of (request, KV head, block), with no gaps: [B, Hkv, N] int32."""
    rows = wanted.flatten().cumsum(0).view_as(wanted) - 1
    return rows.masked_fill(~wanted, PADDING_ROW).to(torch.int32)
