# SPDX-License-Identifier: Apache-2.0
"""Step 2 of a decode: score every K exactly."""

from __future__ import annotations

import torch

from vllm_kcache.ops import checks
from vllm_kcache.ops.dispatch import implementation


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
        query: [B, Hq, D] model dtype, GPU. One query per request, at position `seq_lens - 1`.
        k_pages: [M, Hkv, S, D] model dtype, GPU. May be strided over M.
        block_table: [B, MB] int32, GPU. Columns past a row's length are never read.
        seq_lens: [B] int32, GPU. Tokens, the current one included; 0 marks a padded row.
        scale: factor on the scores.
        v_block_tokens: T, tokens of a V block: a power of two that divides S.
        max_blocks: P, columns of the result. Covers the longest row.
        out: [B, Hq, P] float32, GPU, written and returned when given.
    Returns:
        [B, Hq, P] float32, GPU (float64 for a float64 model). -inf past `seq_lens`.
    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, by name.

    On a GPU: current stream; graph-safe when `out` is given. Accumulates in float32 (float64 for
    float64). Source: exact scores over all K, KCache (arXiv 2404.18057); by V block is ours.
    Definition: reference/score.py.
    """
    checks.check_pages("k_pages", k_pages, None)
    checks.check_query(query, k_pages)
    num_requests, num_heads, _ = query.shape
    checks.check_block_table(block_table, num_requests, query.device)
    checks.check_seq_lens(seq_lens, num_requests, query.device)
    checks.check_v_block_tokens(v_block_tokens, k_pages.shape[2])
    if max_blocks < 0:
        raise ValueError(f"max_blocks={max_blocks}: must be at least 0")
    if out is not None:
        checks.check_block_lse("out", out, num_requests, num_heads, max_blocks, query)
    return implementation("score", query.device).score_blocks(
        query, k_pages, block_table, seq_lens, scale, v_block_tokens, max_blocks, out
    )
