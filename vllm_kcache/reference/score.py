# SPDX-License-Identifier: Apache-2.0
"""Score every V block, by exact QK or by the estimates of K codes. The definition of this step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_kcache.cache.formats import code_bytes
from vllm_kcache.reference.codes import read_codes, round_query, transform_query
from vllm_kcache.reference.paging import accumulation_dtype, physical_pages, request_groups
from vllm_kcache.reference.soft_cap import cap_scores
from vllm_kcache.types import KStats

# Page ids, int64, to K of those pages: [pages, Hkv, S, D] in the dtype of accumulation.
KeysOfPages = Callable[[torch.Tensor], torch.Tensor]


def score_blocks(
    query: torch.Tensor,
    k_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    v_block_tokens: int,
    max_blocks: int,
    out: torch.Tensor | None = None,
    soft_cap: float | None = None,
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
        soft_cap: bound of the scaled scores (reference/soft_cap.py); None for none.
    Returns:
        [B, Hq, P] float32 (float64 for a float64 model). -inf past `seq_lens`.

    Accumulates in float32 (float64 for float64). Source: exact scores over all K, KCache (arXiv
    2404.18057); by V block is ours.
    """
    dtype = accumulation_dtype(query.dtype)

    def keys_of(pages: torch.Tensor) -> torch.Tensor:
        return k_pages.index_select(0, pages).to(dtype)

    grouped = query.to(dtype).unflatten(1, (k_pages.shape[1], -1))
    return _score(
        grouped, None, keys_of, k_pages.shape[2], block_table, seq_lens, scale, v_block_tokens,
        max_blocks, out, soft_cap,
    )  # fmt: skip


def score_codes(
    query: torch.Tensor,
    code_pages: torch.Tensor,
    stats: KStats,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    v_block_tokens: int,
    max_blocks: int,
    out: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """The same from K codes: log-sum-exp of estimates, on the scale of true scores.

    The estimate of a score is scale * (s * (q' . code) + z * sum(q') + q . mean), with the scale s
    and the zero z of the token, and q' in 8 bits (reference/codes.py).

    Args:
        query, block_table, seq_lens, scale, v_block_tokens, max_blocks, out, soft_cap: as
            `score_blocks`. An estimate is capped as a score is.
        code_pages: [M, Hkv, S * (Dp / 2 + 4)] uint8. May be strided over M.
        stats: Constants of the layer's codes.
    Returns:
        [B, Hq, P] as `score_blocks`.
    """
    return score_transformed(
        *transform_query(query, stats), code_pages, block_table, seq_lens, scale, v_block_tokens,
        max_blocks, out, soft_cap,
    )  # fmt: skip


def score_transformed(
    transformed: torch.Tensor,
    bias: torch.Tensor,
    code_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    v_block_tokens: int,
    max_blocks: int,
    out: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """The same of q', [B, Hq, D], and q . mean, [B, Hq] (`codes.transform_query`)."""
    head_size = transformed.shape[-1]
    rounded = round_query(transformed)

    def keys_of(pages: torch.Tensor) -> torch.Tensor:
        return read_codes(code_pages.index_select(0, pages), head_size).to(transformed.dtype)

    heads = (code_pages.shape[1], -1)
    page_tokens = code_pages.shape[-1] // code_bytes(head_size)
    return _score(
        rounded.unflatten(1, heads), bias.unflatten(1, heads), keys_of, page_tokens,
        block_table, seq_lens, scale, v_block_tokens, max_blocks, out, soft_cap,
    )  # fmt: skip


def _score(
    query: torch.Tensor,
    bias: torch.Tensor | None,
    keys_of: KeysOfPages,
    page_tokens: int,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    v_block_tokens: int,
    max_blocks: int,
    out: torch.Tensor | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """Both, for a query [B, Hkv, G, D] in the dtype of accumulation and what a head's scores have
    in common, [B, Hkv, G]."""
    num_requests, num_kv_heads, group_size, head_size = query.shape
    if out is None:
        out = query.new_empty((num_requests, num_kv_heads * group_size, max_blocks))
    out.fill_(-torch.inf)
    page_counts = [-(-tokens // page_tokens) for tokens in seq_lens.tolist()]
    cost = num_kv_heads * page_tokens * head_size
    for first, last, num_pages in request_groups(page_counts, cost):
        group = slice(first, last)
        scores = _score_group(
            query[group] * scale, None if bias is None else bias[group] * scale, keys_of,
            page_tokens, block_table[group], seq_lens[group], num_pages, v_block_tokens, soft_cap,
        )  # fmt: skip
        num_blocks = min(scores.shape[-1], max_blocks)
        out[group, :, :num_blocks] = scores[..., :num_blocks]
    return out


def _score_group(
    query: torch.Tensor,
    bias: torch.Tensor | None,
    keys_of: KeysOfPages,
    page_tokens: int,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    num_pages: int,
    v_block_tokens: int,
    soft_cap: float | None,
) -> torch.Tensor:
    """[g, Hq, num_pages * S / T] for the g requests of one group; the query, [g, Hkv, G, D], and
    the bias, [g, Hkv, G], hold the scale."""
    num_requests, num_kv_heads, group_size, _ = query.shape
    logical_pages = torch.arange(num_pages, device=query.device).expand(num_requests, -1)
    starts = logical_pages * page_tokens
    pages = physical_pages(block_table, logical_pages, starts < seq_lens[:, None])
    keys = keys_of(pages.flatten()).unflatten(0, (num_requests, num_pages))
    # [g, pages, Hkv, G, S]: the query of a KV head's group is the short side of each product.
    scores = query[:, None] @ keys.mT
    if bias is not None:
        scores += bias[:, None, ..., None]
    scores = cap_scores(scores, soft_cap)
    tokens = starts[..., None] + torch.arange(page_tokens, device=query.device)
    past_end = tokens >= seq_lens[:, None, None]
    # Filled, not added to: K past the length may hold NaN.
    scores.masked_fill_(past_end[:, :, None, None, :], -torch.inf)
    block_lse = scores.unflatten(-1, (-1, v_block_tokens)).logsumexp(-1)
    return block_lse.permute(0, 2, 3, 1, 4).reshape(num_requests, num_kv_heads * group_size, -1)
