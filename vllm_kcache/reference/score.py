# SPDX-License-Identifier: Apache-2.0
"""Score every V block by exact QK. The definition of this step."""

from __future__ import annotations

import torch

from vllm_kcache.reference.paging import accumulation_dtype, physical_pages, request_groups


def score_blocks(
    query: torch.Tensor,
    k_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    v_block_tokens: int,
    max_blocks: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-sum-exp of the scaled scores of each logical V block, in one pass over K.

    Args:
        query: [B, Hq, D] model dtype. One query per request, at position `seq_lens - 1`.
        k_pages: [M, Hkv, S, D] model dtype. May be strided over M.
        block_table: [B, MB] int32. Columns past a row's length are never read.
        seq_lens: [B] int32. Tokens, the current one included; 0 marks a padded row.
        scale: factor on the scores.
        v_block_tokens: T, tokens of a V block: a power of two that divides S.
        max_blocks: P, columns of the result. Covers the longest row.
        out: [B, Hq, P] float32, written and returned when given.
    Returns:
        [B, Hq, P] float32 (float64 for a float64 model). -inf past `seq_lens`.

    Accumulates in float32 (float64 for float64). Source: exact scores over all K, KCache (arXiv
    2404.18057); by V block is ours.
    """
    num_requests, num_heads, _ = query.shape
    _, num_kv_heads, page_tokens, head_size = k_pages.shape
    if out is None:
        dtype = accumulation_dtype(query.dtype)
        out = query.new_empty((num_requests, num_heads, max_blocks), dtype=dtype)
    out.fill_(-torch.inf)
    page_counts = [-(-tokens // page_tokens) for tokens in seq_lens.tolist()]
    grouped_query = query.unflatten(1, (num_kv_heads, -1))
    cost = num_kv_heads * page_tokens * head_size
    for first, last, num_pages in request_groups(page_counts, cost):
        group = slice(first, last)
        block_lse = _score_group(
            grouped_query[group],
            k_pages,
            block_table[group],
            seq_lens[group],
            num_pages,
            scale,
            v_block_tokens,
        )
        num_blocks = min(block_lse.shape[-1], max_blocks)
        out[group, :, :num_blocks] = block_lse[..., :num_blocks]
    return out


def _score_group(
    query: torch.Tensor,
    k_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    num_pages: int,
    scale: float,
    v_block_tokens: int,
) -> torch.Tensor:
    """[g, Hq, num_pages * S / T] for the g requests of one group; query is [g, Hkv, G, D]."""
    num_requests, num_kv_heads, group_size, _ = query.shape
    page_tokens = k_pages.shape[2]
    dtype = accumulation_dtype(query.dtype)
    logical_pages = torch.arange(num_pages, device=query.device).expand(num_requests, -1)
    starts = logical_pages * page_tokens
    pages = physical_pages(block_table, logical_pages, starts < seq_lens[:, None])
    keys = k_pages.index_select(0, pages.flatten()).to(dtype)
    keys = keys.view(num_requests, num_pages, *k_pages.shape[1:])
    # [g, pages, Hkv, G, S]: the query of a KV head's group is the short side of each product.
    scores = (query.to(dtype) * scale)[:, None] @ keys.mT
    tokens = starts[..., None] + torch.arange(page_tokens, device=query.device)
    past_end = tokens >= seq_lens[:, None, None]
    # Filled, not added to: K past the length may hold NaN.
    scores.masked_fill_(past_end[:, :, None, None, :], -torch.inf)
    block_lse = scores.unflatten(-1, (-1, v_block_tokens)).logsumexp(-1)
    return block_lse.permute(0, 2, 3, 1, 4).reshape(num_requests, num_kv_heads * group_size, -1)
