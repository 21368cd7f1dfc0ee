# SPDX-License-Identifier: Apache-2.0
"""Attend over the selected V blocks. The definition of this step."""

from __future__ import annotations

import torch

from vllm_kcache.cache.formats import RowFormat
from vllm_kcache.reference.codes import transform_query
from vllm_kcache.reference.paging import (
    accumulation_dtype,
    gather_v_blocks,
    physical_v_blocks,
    request_groups,
)
from vllm_kcache.reference.soft_cap import cap_scores
from vllm_kcache.types import FIRST_HOST_ROW, Fetched, KStats, Selected, Tail


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
    clip: float | torch.Tensor | None = None,
    soft_cap: float | None = None,
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
        clip: in (0, 1], or [B] of such. Only for tail "clip", which needs `selected.lse`, too.
        soft_cap: bound of the scaled scores (reference/soft_cap.py); None for none.
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
        scores = cap_scores(scores, soft_cap)
        scores.masked_fill_((tokens < 0)[:, :, None], -torch.inf)
        values = _values(v_pool, fetched.v_rows, fetched.rows[group, :, :width]).to(dtype)
        # V past the length may hold NaN, and a weight of 0 does not cancel it.
        values[tokens < 0] = 0.0
        out[group] = _combine(scores, values, selected, group, tail, clip)
    return out


def attend_rows(
    query: torch.Tensor,
    host_rows: torch.Tensor,
    row: RowFormat,
    stats: KStats,
    fetched: Fetched,
    selected: Selected,
    seq_lens: torch.Tensor,
    scale: float,
    tail: Tail,
    out: torch.Tensor | None = None,
    clip: float | torch.Tensor | None = None,
    refined: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """The same from rows that hold K beside V, where the selection was by estimates.

    Scores are of the row's K: true K, or with int8 scale * (q' . k'_int8 * s + q . mean). The
    softmax denominator covers, by `tail`:

    - "renormalize": the selected tokens.
    - "clip": what the selected tokens have by their K, and what the others are estimated to have.
      With w = exp(score - lse) in units of the estimated total, `selected.lse`:

          out = (sum w v + dropped * sum min(w, clip) v / sum min(w, clip)) / (sum w + dropped)

    With everything selected both are full attention, whatever the codes say.

    Args:
        query, seq_lens, scale, tail, out, clip, soft_cap: as for `attend_blocks`.
        host_rows: [M * Hkv * S / T, row bytes] uint8, host. Read for rows that lie there only.
        row: What a row holds.
        stats: Constants of the layer's codes.
        fetched: from `fetch_rows`.
        selected: from `select_blocks`, `estimated`. Its `lse` and `dropped` are of estimates.
        refined: [B, Hq, N] float32, written when given. Log-sum-exp of the scaled scores of each
            selected block by the K of its row; anything at padding.
    Returns:
        [B, Hq, D] model dtype. 0 for a padded row.
    """
    num_kv_heads, tokens = stats.mean.shape[0], row.block_tokens
    dtype = accumulation_dtype(query.dtype)
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    out.zero_()
    grouped = query.to(dtype).unflatten(1, (num_kv_heads, -1))
    transformed, bias = (x.unflatten(1, (num_kv_heads, -1)) for x in transform_query(query, stats))
    widths = selected.counts.amax(1).tolist()
    cost = 2 * num_kv_heads * tokens * row.head_size
    for first, last, width in request_groups(widths, cost):
        group = slice(first, last)
        positions = _tokens(selected.blocks[group, :, :width], seq_lens[group], tokens)
        rows = _rows(host_rows, fetched.v_rows, fetched.rows[group, :, :width])
        keys, values = _read_rows(rows, row, dtype)
        if row.host_dtype == "int8":
            scores = (transformed[group] @ keys.mT + bias[group][..., None]) * scale
        else:
            scores = (grouped[group] * scale) @ keys.mT
        scores = cap_scores(scores, soft_cap)
        scores.masked_fill_((positions < 0)[:, :, None], -torch.inf)
        values[positions < 0] = 0.0
        if refined is not None:
            block_lse = scores.unflatten(-1, (width, tokens)).logsumexp(-1)
            refined[group, :, :width] = block_lse.flatten(1, 2)
        out[group] = _combine(scores, values, selected, group, tail, clip)
    return out


def _combine(
    scores: torch.Tensor,
    values: torch.Tensor,
    selected: Selected,
    group: slice,
    tail: Tail,
    clip: float | torch.Tensor | None,
) -> torch.Tensor:
    """[g, Hq, D] of scaled scores [g, Hkv, G, n], -inf for padding, and V [g, Hkv, n, D]."""
    if tail == "clip":
        assert selected.lse is not None
        assert clip is not None
        heads = (*scores.shape[:3], 1)
        lse = selected.lse[group].to(scores.dtype).view(heads)
        exponents = scores - lse
        dropped, unit = None, scores.new_ones(())
        if selected.dropped is not None:
            # Estimates may be far from the truth: in units of the largest selected token, neither
            # its weight nor the dropped mass leaves the range of a float.
            most = exponents.amax(-1, keepdim=True).nan_to_num(0.0).clamp_min(-60.0)
            unit = (-most).exp()
            exponents = exponents - most
            dropped = selected.dropped[group].to(scores.dtype).view(heads) * unit
        # The score of padding is -inf, and the lse of a padded row anything, as its dropped mass.
        padding = torch.isneginf(scores)
        weights = torch.where(padding, 0.0, exponents.exp())
        if dropped is not None:
            dropped = dropped.masked_fill(padding.all(-1, keepdim=True), 0.0)
        if isinstance(clip, torch.Tensor):
            clip = clip[group].to(scores.dtype).view(-1, 1, 1, 1)
        limit = clip * unit
        return (clipped_weights(weights, limit, dropped) @ values).flatten(1, 2)
    denominator = scores.logsumexp(-1, keepdim=True)
    # Where nothing is selected (a padded row) every score is -inf: weights of 0, not NaN.
    denominator = denominator.masked_fill(torch.isneginf(denominator), 0.0)
    return ((scores - denominator).exp() @ values).flatten(1, 2)


def estimate_errors(
    block_lse: torch.Tensor, refined: torch.Tensor, selected: Selected
) -> torch.Tensor:
    """How far the estimates of the selected blocks are from the truth.

    Args:
        block_lse: [B, Hq, P], from `score_codes`.
        refined: [B, Hq, N], from `attend_rows`.
        selected: from `select_blocks`.
    Returns:
        [n] float32: |estimate - refined| of each selected block and query head, in any order.
    """
    group_size = block_lse.shape[1] // selected.blocks.shape[1]
    blocks = selected.blocks.repeat_interleave(group_size, 1)
    wanted = blocks >= 0
    estimates = block_lse.gather(-1, blocks.clamp_min(0).long())
    return (estimates[wanted] - refined[wanted]).abs().float()


def clipped_weights(
    weights: torch.Tensor, clip: torch.Tensor, dropped: torch.Tensor | None = None
) -> torch.Tensor:
    """Weights of the selected tokens, the dropped mass shared out by min(p, clip); rows sum to 1.

    Args:
        weights: [..., N], full-softmax probabilities p of the selected tokens, 0 for padding. In
            units of an estimated total they may sum to more than 1.
        clip: [..., 1].
        dropped: [..., 1], the mass left out, in the same unit; None: what the weights lack of 1.
    """
    kept = weights.sum(-1, keepdim=True)
    if dropped is None:
        dropped = (1 - kept).clamp_min(0)
    flat = weights.clamp(max=clip)
    weights = weights + dropped * flat / flat.sum(-1, keepdim=True).clamp_min(1e-30)
    # Nothing is selected of a padded row.
    return weights / (kept + dropped).clamp_min(1e-30)


def _tokens(blocks: torch.Tensor, seq_lens: torch.Tensor, v_block_tokens: int) -> torch.Tensor:
    """Token positions of selected V blocks, [g, Hkv, N * T]; -1 for padding and past the length."""
    in_block = torch.arange(v_block_tokens, device=blocks.device)
    tokens = (blocks[..., None] * v_block_tokens + in_block).flatten(2)
    padding = (blocks < 0).repeat_interleave(v_block_tokens, -1)
    return tokens.masked_fill(padding | (tokens >= seq_lens[:, None, None]), -1)


def _values(v_pool: torch.Tensor, v_rows: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """V of each selected V block, [g, Hkv, N * T, D], a copy. Anything at padding."""
    values = _staged(v_rows, rows)
    in_host_pool = rows <= FIRST_HOST_ROW
    if in_host_pool.any():
        host_rows = FIRST_HOST_ROW - rows[in_host_pool].long()
        values[in_host_pool] = gather_v_blocks(v_pool, host_rows, v_rows.shape[1])
    return values.flatten(2, 3)


def _rows(host_rows: torch.Tensor, staged: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Bytes of each selected row, [g, Hkv, N, row bytes] uint8, a copy. Anything at padding."""
    found = _staged(staged, rows)
    in_host_pool = rows <= FIRST_HOST_ROW
    if in_host_pool.any():
        found[in_host_pool] = host_rows[FIRST_HOST_ROW - rows[in_host_pool].long()]
    return found


def _staged(staged: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows that were fetched: [*rows.shape, ...], a copy; anything where `rows` is none of them."""
    shape = (*rows.shape, *staged.shape[1:])
    if not staged.shape[0]:
        return staged.new_zeros(shape)
    return staged.index_select(0, rows.clamp_min(0).flatten()).view(shape)


def _read_rows(
    rows: torch.Tensor, row: RowFormat, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """K (k' of int8 rows) and V of rows [g, Hkv, N, row bytes]: [g, Hkv, N * T, D] each."""
    flat = rows.flatten(0, 2)
    keys, values = row.keys(flat).to(dtype), row.values(flat).to(dtype)
    if row.host_dtype == "int8":
        key_scales, value_scales = row.scales(flat)
        keys = keys * key_scales.to(dtype)[..., None]
        values = values * value_scales.to(dtype)[..., None]
    shape = (*rows.shape[:3], *keys.shape[1:])
    return keys.view(shape).flatten(2, 3), values.view(shape).flatten(2, 3)
