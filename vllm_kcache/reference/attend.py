# SPDX-License-Identifier: Apache-2.0
"""Attend over the selected V blocks. The definition of this step."""

from __future__ import annotations

import torch

from vllm_kcache.reference.paging import (
    accumulation_dtype,
    gather_v_blocks,
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
    out: torch.Tensor | None = None,
    clip: float | None = None,
) -> torch.Tensor:
    """Softmax over the selected tokens and the product with their V.

    The softmax denominator covers, by `tail`:

    - "renormalize": the selected tokens. The error of a head is then at most 2 x its dropped mass x
      the largest |v|.
    - "clip": all tokens of the request, from `selected.lse`; the dropped mass goes to the selected
      tokens in proportion to min(p, clip): what was left out is like the weakest that were kept
      (docs/selection.md). The same bound holds.

    With everything selected, both equal full attention.

    Args:
        query: [B, Hq, D] model dtype. One query per request.
        k_pages: [M, Hkv, S, D] model dtype. May be strided over M.
        v_pool: [M, Hkv, S, D] model dtype, host (mapped, for a GPU), contiguous. Read for rows that
            lie there only.
        fetched: from `fetch_blocks`.
        selected: from `select_blocks`.
        block_table: [B, MB] int32. Columns past a row's length are never read.
        seq_lens: [B] int32. Tokens, the current one included; 0 marks a padded row.
        scale: factor on the scores.
        v_block_tokens: T, tokens of a V block: a power of two that divides S.
        tail: "renormalize" or "clip".
        out: [B, Hq, D] model dtype, written and returned when given.
        clip: in (0, 1]. Only for tail "clip", which needs `selected.lse`, too.
    Returns:
        [B, Hq, D] model dtype. 0 for a padded row.

    Accumulates in float32 (float64 for float64). Source: KCache (arXiv 2404.18057) for attention
    over selected V; the clipped tail is ours.
    """
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
        denominator = scores.logsumexp(-1, keepdim=True)
        # Where nothing is selected (a padded row) every score is -inf: weights of 0, not NaN.
        denominator = denominator.masked_fill(torch.isneginf(denominator), 0.0)
        out[group] = ((scores - denominator).exp() @ values).flatten(1, 2)
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
