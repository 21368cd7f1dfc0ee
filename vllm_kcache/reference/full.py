# SPDX-License-Identifier: Apache-2.0
"""Exact causal attention over paged K and paged V, for prefill on the CPU."""

from __future__ import annotations

import torch

# Tokens of context gathered at once: bounds the scratch, however long the context is.
CONTEXT_PIECE_TOKENS = 4096


def attend_full(
    query: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exact attention of a ragged batch of prompt chunks to everything before them.

    Token i of a request's chunk of n tokens stands at position `seq_len - n + i` and attends to all
    positions up to its own. K and V of the chunk must have been written already. Softmax runs over
    all of them, accumulated in float32 (float64 for float64). The chunk attends to itself with a
    causal mask, and to its context in pieces; the parts are merged by their log-sum-exp.

    Args:
        query: [Tq, Hq, D] model dtype, host. The chunks of all requests, one after the other.
        k_pages: [M, Hkv, S, D] model dtype, host. May be strided over M.
        v_pages: [M, Hkv, S, D] model dtype, host: one layer of the host V pool, or the V pages
            of a dense layer. May be strided over M.
        block_table: [B, MB] int32, host. Columns past a row's length are never read.
        query_start_loc: [B + 1] int32, host. Where each chunk starts in `query`; an empty chunk is
            skipped.
        seq_lens: [B] int32, host. Tokens of each request, the chunk included.
        scale: factor on the scores.
        out: [Tq, Hq, D] model dtype, host, written and returned when given. Rows past the last
            chunk are left alone.
    Returns:
        [Tq, Hq, D] model dtype. Without `out`, rows past the last chunk are 0.
    Raises:
        ValueError: a chunk longer than its request.
    """
    if out is None:
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    starts = query_start_loc.tolist()
    for request, seq_len in enumerate(seq_lens.tolist()):
        first, last = starts[request], starts[request + 1]
        if last == first:
            continue
        if last - first > seq_len:
            raise ValueError(
                f"query_start_loc: request {request} has {last - first} query tokens; "
                f"must be at most its seq_lens={seq_len}"
            )
        chunk = query[first:last]
        out[first:last] = _attend_request(
            chunk, k_pages, v_pages, block_table[request], seq_len, scale
        )
    return out


def _attend_request(
    query: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_ids: torch.Tensor,
    seq_len: int,
    scale: float,
) -> torch.Tensor:
    """[n, Hq, D] for the n tokens of one chunk, [n, Hq, D]."""
    num_kv_heads = k_pages.shape[1]
    context = seq_len - query.shape[0]
    # The G heads that share a KV head become the batch: K and V are expanded, never repeated.
    heads_first = query.unflatten(1, (num_kv_heads, -1)).permute(2, 1, 0, 3)

    def attend(
        first_token: int, past_token: int, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys = _gather_tokens(k_pages, page_ids, first_token, past_token)
        values = _gather_tokens(v_pages, page_ids, first_token, past_token)
        return _attend_piece(heads_first, keys, values, causal, scale)

    result, lse = attend(context, seq_len, causal=True)
    # Pieces end on page boundaries, so no page is gathered twice for the context.
    page_tokens = k_pages.shape[2]
    piece_tokens = max(CONTEXT_PIECE_TOKENS // page_tokens, 1) * page_tokens
    if context:
        result = result.to(lse.dtype)
    for first_token in range(0, context, piece_tokens):
        past_token = min(first_token + piece_tokens, context)
        piece, piece_lse = attend(first_token, past_token, causal=False)
        merged_lse = torch.logaddexp(lse, piece_lse)
        result = result * (lse - merged_lse).exp()[..., None]
        result += piece * (piece_lse - merged_lse).exp()[..., None]
        lse = merged_lse
    return result.permute(2, 1, 0, 3).flatten(1, 2)


def _gather_tokens(
    pages: torch.Tensor, page_ids: torch.Tensor, first_token: int, past_token: int
) -> torch.Tensor:
    """K or V of tokens [first, past) of one request: [Hkv, past - first, D], a copy."""
    _, num_kv_heads, page_tokens, head_size = pages.shape
    first_page = first_token // page_tokens
    ids = page_ids[first_page : -(-past_token // page_tokens)]
    tokens = pages.index_select(0, ids).transpose(0, 1).reshape(num_kv_heads, -1, head_size)
    skipped = first_page * page_tokens
    return tokens[:, first_token - skipped : past_token - skipped]


def _attend_piece(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of [G, Hkv, n, D] to one piece, [Hkv, t, D], and its log-sum-exp, [G, Hkv, n].

    The public scaled_dot_product_attention gives no log-sum-exp; this is the kernel behind it.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query,
        keys.expand(query.shape[0], -1, -1, -1),
        values.expand(query.shape[0], -1, -1, -1),
        0.0,
        causal,
        scale=scale,
    )
