# SPDX-License-Identifier: Apache-2.0
"""Attend over the selected V blocks. Definition of `ops.attend_blocks`."""

from __future__ import annotations

import torch

from vllm_kcache.reference.paging import (
    accumulation_dtype,
    gather_v_blocks,
    physical_pages,
    physical_v_blocks,
    request_groups,
)
from vllm_kcache.types import FIRST_HOST_ROW, Fetched, Selected, Tail


def attend_blocks(
    query: torch.Tensor,
    k_pages: torch.Tensor,
    v_pool: torch.Tensor,
    fetched: Fetched,
    selected: Selected,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    v_block_tokens: int,
    tail: Tail,
    block_lse: torch.Tensor,
    v_page_means: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    clip: float | None = None,
) -> torch.Tensor:
    """Softmax over the selected tokens and the product with V. See `ops.attend_blocks`."""
    _, num_kv_heads, page_tokens, head_size = k_pages.shape
    dtype = accumulation_dtype(query.dtype)
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    out.zero_()
    grouped_query = query.unflatten(1, (num_kv_heads, -1))
    widths = selected.counts.amax(1).tolist()
    cost = num_kv_heads * v_block_tokens * head_size
    for first, last, width in request_groups(widths, cost):
        group = slice(first, last)
        blocks = selected.blocks[group, :, :width]
        tokens = _tokens(blocks, seq_lens[group], v_block_tokens)
        rows = physical_v_blocks(
            blocks, block_table[group], num_kv_heads, page_tokens // v_block_tokens
        )
        keys = gather_v_blocks(k_pages, rows, v_block_tokens).flatten(2, 3).to(dtype)
        scores = (grouped_query[group].to(dtype) * scale) @ keys.mT
        scores.masked_fill_((tokens < 0)[:, :, None], -torch.inf)
        values = _values(v_pool, fetched.v_rows, fetched.rows[group, :, :width]).to(dtype)
        # V past the length may hold NaN, and a weight of 0 does not cancel it.
        values[tokens < 0] = 0.0
        if tail == "clip":
            assert selected.lse is not None
            assert clip is not None
            lse = selected.lse[group].to(dtype).view(*scores.shape[:3], 1)
            # The score of padding is -inf, and the lse of a padded row anything.
            weights = torch.where(torch.isneginf(scores), 0.0, (scores - lse).exp())
            out[group] = (clipped_weights(weights, clip) @ values).flatten(1, 2)
            continue
        attended = scores if tail == "renormalize" else block_lse[group].to(dtype)
        denominator = attended.logsumexp(-1).view(*scores.shape[:3], 1)
        # Where nothing is selected (a padded row) every score is -inf: weights of 0, not NaN.
        denominator = denominator.masked_fill(torch.isneginf(denominator), 0.0)
        result = (scores - denominator).exp() @ values
        if tail == "mean":
            assert v_page_means is not None
            masses = (block_lse[group].to(dtype).view(*scores.shape[:3], -1) - denominator).exp()
            page_masses = _dropped_page_masses(masses, blocks, page_tokens // v_block_tokens)
            result += page_masses @ _page_means(
                v_page_means,
                block_table[group],
                seq_lens[group],
                page_masses.shape[-1],
                page_tokens,
            ).to(dtype)
        out[group] = result.flatten(1, 2)
    return out


def clipped_weights(weights: torch.Tensor, clip: float) -> torch.Tensor:
    """Weights of the selected tokens, the dropped mass shared out by min(p, clip); rows sum to 1.

    Args:
        weights: [..., N], full-softmax probabilities p of the selected tokens, 0 for padding.
    """
    kept = weights.sum(-1, keepdim=True)
    dropped = (1 - kept).clamp_min(0)
    flat = weights.clamp_max(clip)
    weights = weights + dropped * flat / flat.sum(-1, keepdim=True).clamp_min(1e-30)
    return weights / (kept + dropped)


def _tokens(blocks: torch.Tensor, seq_lens: torch.Tensor, v_block_tokens: int) -> torch.Tensor:
    """Token positions of selected V blocks, [g, Hkv, N * T]; -1 for padding and past the length."""
    in_block = torch.arange(v_block_tokens, device=blocks.device)
    tokens = (blocks[..., None] * v_block_tokens + in_block).flatten(2)
    padding = (blocks < 0).repeat_interleave(v_block_tokens, -1)
    return tokens.masked_fill(padding | (tokens >= seq_lens[:, None, None]), -1)


def _values(v_pool: torch.Tensor, v_rows: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """V of each selected V block, [g, Hkv, N * T, D], a copy. Anything at padding."""
    shape = (*rows.shape, *v_rows.shape[1:])
    if v_rows.shape[0]:
        values = v_rows.index_select(0, rows.clamp_min(0).flatten()).view(shape)
    else:
        values = v_rows.new_zeros(shape)
    in_host_pool = rows <= FIRST_HOST_ROW
    if in_host_pool.any():
        host_rows = FIRST_HOST_ROW - rows[in_host_pool].long()
        values[in_host_pool] = gather_v_blocks(v_pool, host_rows, v_rows.shape[1])
    return values.flatten(2, 3)


def _dropped_page_masses(
    masses: torch.Tensor, blocks: torch.Tensor, blocks_per_page: int
) -> torch.Tensor:
    """Mass of the V blocks of each page that were not selected: [g, Hkv, G, pages].

    Args:
        masses: [g, Hkv, G, P], full softmax mass of each V block; 0 past the length.
        blocks: [g, Hkv, N], the selected ones, padded with -1.
    """
    num_blocks = masses.shape[-1]
    # One column more than there are blocks takes the marks of the padding.
    selected = masses.new_zeros((*blocks.shape[:2], num_blocks + 1), dtype=torch.bool)
    selected.scatter_(-1, blocks.masked_fill(blocks < 0, num_blocks).long(), True)
    dropped = masses.masked_fill(selected[:, :, None, :num_blocks], 0.0)
    dropped = torch.nn.functional.pad(dropped, (0, -num_blocks % blocks_per_page))
    return dropped.unflatten(-1, (-1, blocks_per_page)).sum(-1)


def _page_means(
    v_page_means: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    num_pages: int,
    page_tokens: int,
) -> torch.Tensor:
    """Mean V of each page of each request, [g, Hkv, pages, D]; 0 where there is no page."""
    logical_pages = torch.arange(num_pages, device=block_table.device)
    exists = logical_pages * page_tokens < seq_lens[:, None]
    pages = physical_pages(block_table, logical_pages.expand_as(exists), exists)
    return v_page_means[pages].masked_fill(~exists[..., None, None], 0.0).transpose(1, 2)
