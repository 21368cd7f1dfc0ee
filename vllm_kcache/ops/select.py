# SPDX-License-Identifier: Apache-2.0
"""Step 3 of a decode: choose the V blocks that carry the attention mass."""

from __future__ import annotations

import torch

from vllm_kcache.ops import checks
from vllm_kcache.ops.dispatch import implementation
from vllm_kcache.types import Selected, Selection


def select_blocks(
    block_lse: torch.Tensor,
    seq_lens: torch.Tensor,
    num_kv_heads: int,
    v_block_tokens: int,
    selection: Selection,
    out: Selected | None = None,
) -> Selected:
    """Choose V blocks for each request and KV head, by their exact softmax mass.

    Each query head's masses are normalised over the whole request. A KV head ranks its blocks by
    the mean (combine "sum") or the largest (combine "max") of its query heads' masses. Sink and
    recent blocks come first, then the others by falling mass. With a coverage, the fewest blocks in
    that order are kept whose covered mass, mean (combine "sum") or least (combine "max") over the
    query heads, reaches it; `top_n` caps them. With a mass threshold, every block that holds that
    much is kept, at most `top_n`. Without either, `min(top_n, blocks of the request)`.

    Args:
        block_lse: [B, Hq, P] float32, GPU. From `score_blocks`.
        seq_lens: [B] int32, GPU. Tokens, the current one included; 0 marks a padded row. At most
            P * T.
        num_kv_heads: Hkv. Query heads `h * G .. (h + 1) * G - 1` share KV head h.
        v_block_tokens: T, tokens of a V block.
        selection: the rule. Its `top_n` is at least the blocks that sink and recent can force in.
        out: buffers to write and return. `blocks` has at least `min(top_n, P)` columns.
    Returns:
        Selected: blocks [B, Hkv, N] int32 ascending and padded with -1, counts [B, Hkv] int32,
        mass [B, Hkv] float32, and lse [B, Hq] float32 where `out` has it or the rule has a mass
        threshold. Without `out`, N is the longest list. A padded row has an
        empty list and mass 1.
    Raises:
        TypeError, ValueError: a dtype, shape, device or rule that does not fit, by name.

    Ties: the lower block wins. On a GPU: current stream; graph-safe when `out` is given.
    Source: N scores of most mass, KCache (arXiv 2404.18057); selection by coverage
    and by mass are ours.
    Definition: reference/select.py.
    """
    num_requests = seq_lens.shape[0]
    checks.check_block_lse("block_lse", block_lse, num_requests, None, None, None)
    if num_kv_heads < 1:
        raise ValueError(f"num_kv_heads={num_kv_heads}: must be at least 1")
    checks.check_head_groups("block_lse", block_lse.shape[1], num_kv_heads)
    checks.check_seq_lens(seq_lens, num_requests, block_lse.device)
    checks.check_v_block_tokens(v_block_tokens)
    checks.check_selection(selection, v_block_tokens)
    if out is not None:
        most = block_lse.shape[2]
        columns = most if selection.top_n is None else min(selection.top_n, most)
        checks.check_selected("out", out, num_requests, num_kv_heads, block_lse.device, columns)
    return implementation("select", block_lse.device).select_blocks(
        block_lse, seq_lens, num_kv_heads, v_block_tokens, selection, out
    )
