# SPDX-License-Identifier: Apache-2.0
"""Bring the selected V blocks to where attention runs. Definition of `ops.fetch_blocks`."""

from __future__ import annotations

import torch

from vllm_kcache.reference.paging import gather_v_blocks, physical_v_blocks
from vllm_kcache.types import PADDING_ROW, Fetched, Selected


def fetch_blocks(
    selected: Selected,
    block_table: torch.Tensor,
    v_pool: torch.Tensor,
    v_block_tokens: int,
    hot_cache: object | None = None,
    layer: int = 0,
    out: Fetched | None = None,
) -> Fetched:
    """Copy each selected V block to a staging row of its own. See `ops.fetch_blocks`.

    Without a hot cache there is nothing to look up: `layer` names its pages and is not used.
    """
    if hot_cache is not None:
        raise ValueError("hot_cache: the CPU has no hot V cache; accepted: None")
    _, num_kv_heads, page_tokens, _ = v_pool.shape
    blocks = selected.blocks
    wanted = blocks >= 0
    physical = physical_v_blocks(blocks, block_table, num_kv_heads, page_tokens // v_block_tokens)
    v_rows = gather_v_blocks(v_pool, physical[wanted], v_block_tokens)
    # Staging rows in the order of (request, KV head, block), with no gaps.
    rows = wanted.flatten().cumsum(0).view_as(blocks) - 1
    rows = rows.masked_fill(~wanted, PADDING_ROW).to(torch.int32)
    if out is None:
        return Fetched(rows, v_rows)
    if v_rows.shape[0] > out.v_rows.shape[0]:
        raise ValueError(
            f"out.v_rows: has {out.v_rows.shape[0]} rows; must have at least {v_rows.shape[0]}, "
            "one for each selected V block"
        )
    out.rows.copy_(rows)
    out.v_rows[: v_rows.shape[0]] = v_rows
    return out
