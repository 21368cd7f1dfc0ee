# SPDX-License-Identifier: Apache-2.0
"""Exact causal attention over paged K and V, for prefill on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_kcache.cache.formats import RowFormat
from vllm_kcache.reference.codes import restore_keys
from vllm_kcache.reference.paging import accumulation_dtype
from vllm_kcache.reference.sinks import share_of_tokens
from vllm_kcache.reference.soft_cap import cap_scores
from vllm_kcache.types import KStats

# Tokens of context gathered at once: bounds the scratch, however long the context is.
CONTEXT_PIECE_TOKENS = 4096
# Scores held at once where they are capped.
_SCORE_VALUES = 1 << 24

# K and V of whole pages, from their ids, [n] int: [Hkv, n * S, D] each, copies.
ReadPages = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# K and V of the tokens of a batch's chunks: [Tq, Hkv, D] each.
ChunkKV = tuple[torch.Tensor, torch.Tensor]


def attend_full(
    query: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
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
        sinks: [Hq], host. Learned scores beside those of the tokens (reference/sinks.py).
        soft_cap: bound of the scaled scores (reference/soft_cap.py); None for none.
    Returns:
        [Tq, Hq, D] model dtype. Without `out`, rows past the last chunk are 0.
    Raises:
        ValueError: a chunk longer than its request.
    """
    num_kv_heads, page_tokens = k_pages.shape[1:3]

    def tokens_of(pages: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return pages.index_select(0, ids).transpose(0, 1).reshape(num_kv_heads, -1, pages.shape[3])

    def read_pages(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens_of(k_pages, ids), tokens_of(v_pages, ids)

    return _attend_batch(
        query, read_pages, page_tokens, None, block_table, query_start_loc, seq_lens, scale, out,
        sinks, soft_cap,
    )  # fmt: skip


def attend_full_rows(
    query: torch.Tensor,
    host_rows: torch.Tensor,
    row: RowFormat,
    stats: KStats,
    page_tokens: int,
    chunk: ChunkKV | None,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """The same where K and V of the context lie in rows.

    Args:
        query, block_table, query_start_loc, seq_lens, scale, out, sinks, soft_cap: as for
            `attend_full`.
        host_rows: [M * Hkv * S / T, row bytes] uint8, host: one layer of the host pool.
        row: What a row holds.
        stats: Constants of the layer's codes.
        page_tokens: S.
        chunk: K and V of the chunks' own tokens; None takes them from the rows, too.
    """
    num_kv_heads = stats.mean.shape[0]
    by_page = host_rows.view(-1, num_kv_heads * page_tokens // row.block_tokens, row.bytes)

    def read_pages(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = by_page.index_select(0, ids).flatten(0, 1)
        keys, values = row.keys(rows), row.values(rows)
        if row.host_dtype == "int8":
            key_scales, value_scales = (scale.float()[..., None] for scale in row.scales(rows))
            keys, values = keys * key_scales, values * value_scales

        def tokens_of(x: torch.Tensor) -> torch.Tensor:
            by_head = x.unflatten(0, (ids.shape[0], num_kv_heads, -1)).transpose(0, 1)
            return by_head.flatten(1, 3)

        keys, values = tokens_of(keys), tokens_of(values)
        if row.host_dtype == "int8":
            keys = restore_keys(keys.transpose(0, 1), stats).transpose(0, 1)
        return keys.to(query.dtype), values.to(query.dtype)

    return _attend_batch(
        query, read_pages, page_tokens, chunk, block_table, query_start_loc, seq_lens, scale, out,
        sinks, soft_cap,
    )  # fmt: skip


def _attend_batch(
    query: torch.Tensor,
    read_pages: ReadPages,
    page_tokens: int,
    chunk: ChunkKV | None,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor | None,
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
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
        own = None
        if chunk is not None:
            own = chunk[0][first:last].transpose(0, 1), chunk[1][first:last].transpose(0, 1)
        out[first:last] = _attend_request(
            query[first:last], read_pages, page_tokens, own, block_table[request], seq_len, scale,
            sinks, soft_cap,
        )  # fmt: skip
    return out


def _attend_request(
    query: torch.Tensor,
    read_pages: ReadPages,
    page_tokens: int,
    own: ChunkKV | None,
    page_ids: torch.Tensor,
    seq_len: int,
    scale: float,
    sinks: torch.Tensor | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """[n, Hq, D] for the n tokens of one chunk, [n, Hq, D]; `own` is its K and V, [Hkv, n, D]."""
    context = seq_len - query.shape[0]

    def gather(first_token: int, past_token: int) -> tuple[torch.Tensor, torch.Tensor]:
        return _gather_tokens(read_pages, page_tokens, page_ids, first_token, past_token)

    keys, values = gather(context, seq_len) if own is None else own
    # The G heads that share a KV head become the batch: K and V are expanded, never repeated.
    heads_first = query.unflatten(1, (keys.shape[0], -1)).permute(2, 1, 0, 3)
    result, lse = _attend_piece(heads_first, keys, values, True, scale, soft_cap)
    # Pieces end on page boundaries, so no page is gathered twice for the context.
    piece_tokens = max(CONTEXT_PIECE_TOKENS // page_tokens, 1) * page_tokens
    if context:
        result = result.to(lse.dtype)
    for first_token in range(0, context, piece_tokens):
        past_token = min(first_token + piece_tokens, context)
        piece, piece_lse = _attend_piece(
            heads_first, *gather(first_token, past_token), False, scale, soft_cap
        )
        merged_lse = torch.logaddexp(lse, piece_lse)
        result = result * (lse - merged_lse).exp()[..., None]
        result += piece * (piece_lse - merged_lse).exp()[..., None]
        lse = merged_lse
    if sinks is not None:
        by_head = sinks.unflatten(0, (keys.shape[0], -1)).T[..., None]
        result = result * share_of_tokens(lse, by_head)[..., None]
    return result.permute(2, 1, 0, 3).flatten(1, 2)


def _gather_tokens(
    read_pages: ReadPages,
    page_tokens: int,
    page_ids: torch.Tensor,
    first_token: int,
    past_token: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of tokens [first, past) of one request: [Hkv, past - first, D] each."""
    first_page = first_token // page_tokens
    skipped = first_page * page_tokens
    keys, values = read_pages(page_ids[first_page : -(-past_token // page_tokens)])
    kept = slice(first_token - skipped, past_token - skipped)
    return keys[:, kept], values[:, kept]


def _attend_piece(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    causal: bool,
    scale: float,
    soft_cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of [G, Hkv, n, D] to one piece, [Hkv, t, D], and its log-sum-exp, [G, Hkv, n].

    The public scaled_dot_product_attention gives no log-sum-exp; this is the kernel behind it.
    """
    if soft_cap is not None:
        return _attend_capped_piece(query, keys, values, causal, scale, soft_cap)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query,
        keys.expand(query.shape[0], -1, -1, -1),
        values.expand(query.shape[0], -1, -1, -1),
        0.0,
        causal,
        scale=scale,
    )


def _attend_capped_piece(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    causal: bool,
    scale: float,
    soft_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with a cap on scores, which that kernel does not know: some queries at a time."""
    dtype, num_keys = accumulation_dtype(query.dtype), keys.shape[1]
    keys, values = keys.to(dtype), values.to(dtype)
    parts = []
    step = max(1, _SCORE_VALUES // (num_keys * query.shape[0] * query.shape[1]))
    for first, part in enumerate(query.split(step, 2)):
        scores = cap_scores((part.to(dtype) * scale) @ keys.mT, soft_cap)
        if causal:
            positions = first * step + torch.arange(part.shape[2])
            scores.masked_fill_(torch.arange(num_keys) > positions[:, None], -torch.inf)
        lse = scores.logsumexp(-1)
        parts.append(((scores - lse[..., None]).exp() @ values, lse))
    results, lses = zip(*parts, strict=True)
    return torch.cat(results, 2), torch.cat(lses, 2)
