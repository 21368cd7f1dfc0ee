# SPDX-License-Identifier: Apache-2.0
"""Step 5 of a decode: attend over the selected V blocks."""

from __future__ import annotations

from typing import get_args

import torch

from vllm_kcache.ops import checks
from vllm_kcache.ops.dispatch import implementation
from vllm_kcache.types import Fetched, Selected, Tail


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
    """Softmax over the selected tokens and the product with their V.

    The softmax denominator covers, by `tail`:

    - "renormalize": the selected tokens. The error of a head is then at most 2 x its dropped mass x
      the largest |v|.
    - "clip": all tokens of the request, from `selected.lse`; the dropped mass goes to the selected
      tokens in proportion to min(p, clip): what was left out is like the weakest that were kept
      (docs/selection.md). The same bound holds.
    - "drop": all tokens of the request, from `block_lse`; the dropped mass adds nothing.
    - "mean": all tokens of the request; the dropped mass of each K page is given the page's mean V.

    With everything selected, all of them equal full attention.

    Args:
        query: [B, Hq, D] model dtype, GPU. One query per request.
        k_pages: [M, Hkv, S, D] model dtype, GPU. May be strided over M.
        v_pool: [M, Hkv, S, D] model dtype, host (mapped, for a GPU), contiguous. Read for rows that
            lie there only.
        fetched: from `fetch_blocks`, GPU.
        selected: from `select_blocks`, GPU.
        block_table: [B, MB] int32, GPU. Columns past a row's length are never read.
        seq_lens: [B] int32, GPU. Tokens, the current one included; 0 marks a padded row.
        scale: factor on the scores.
        v_block_tokens: T, tokens of a V block: a power of two that divides S.
        tail: "renormalize", "clip", "drop" or "mean".
        block_lse: [B, Hq, P] float32, GPU. From `score_blocks`.
        v_page_means: [M, Hkv, D] float32, GPU, from `update_page_means`. Only for tail "mean".
        out: [B, Hq, D] model dtype, GPU, written and returned when given.
        clip: in (0, 1]. Only for tail "clip".
    Returns:
        [B, Hq, D] model dtype, GPU. 0 for a padded row.
    Raises:
        TypeError, ValueError: a dtype, shape, device or tail that does not fit, by name.

    On a GPU: current stream; graph-safe when `out` is given. Accumulates in float32 (float64 for
    float64). Source: KCache (arXiv 2404.18057) for attention over selected V.
    Definition: reference/attend.py.
    """
    checks.check_pages("k_pages", k_pages, None)
    checks.check_v_pool(v_pool, k_pages)
    checks.check_query(query, k_pages)
    device = query.device
    num_requests, num_heads, head_size = query.shape
    num_kv_heads, page_tokens = k_pages.shape[1:3]
    checks.check_block_table(block_table, num_requests, device)
    checks.check_seq_lens(seq_lens, num_requests, device)
    checks.check_v_block_tokens(v_block_tokens, page_tokens)
    checks.check_selected("selected", selected, num_requests, num_kv_heads, device)
    checks.check_fetched(
        "fetched", fetched, selected.blocks, v_block_tokens, head_size, k_pages.dtype
    )
    checks.check_block_lse("block_lse", block_lse, num_requests, num_heads, None, query)
    if tail not in get_args(Tail):
        raise ValueError(f'tail={tail!r}: must be "renormalize", "clip", "drop" or "mean"')
    if tail == "clip":
        if clip is None or not 0 < clip <= 1:
            raise ValueError(f'clip={clip}: must be above 0 and at most 1 for the tail "clip"')
        if selected.lse is None:
            raise ValueError('selected.lse=None: must be given for the tail "clip"')
        shape = {"B": num_requests, "Hq": num_heads}
        checks.check_tensor(
            "selected.lse", selected.lse, shape, checks.accumulation_dtypes(query.dtype), device
        )
    if tail == "mean":
        if v_page_means is None:
            raise ValueError('v_page_means=None: must be given for the tail "mean"')
        shape = {"M": k_pages.shape[0], "Hkv": num_kv_heads, "D": head_size}
        accepted = checks.accumulation_dtypes(k_pages.dtype)
        checks.check_tensor("v_page_means", v_page_means, shape, accepted, device)
    if out is not None:
        shape = {"B": num_requests, "Hq": num_heads, "D": head_size}
        checks.check_tensor("out", out, shape, (query.dtype,), device)
    return implementation("attend", device).attend_blocks(
        query,
        k_pages,
        v_pool,
        fetched,
        selected,
        block_table,
        seq_lens,
        scale,
        v_block_tokens,
        tail,
        block_lse,
        v_page_means,
        out,
        clip=clip,
    )
