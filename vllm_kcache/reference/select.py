# SPDX-License-Identifier: Apache-2.0
"""Choose the V blocks to attend. The definition of this step."""

from __future__ import annotations

import torch

from vllm_kcache.types import Selected, Selection


def select_blocks(
    block_lse: torch.Tensor,
    seq_lens: torch.Tensor,
    num_kv_heads: int,
    v_block_tokens: int,
    selection: Selection,
    out: Selected | None = None,
    estimated: bool = False,
) -> Selected:
    """Choose V blocks for each request and KV head, by their softmax mass.

    Each query head's masses are normalised over the whole request. A KV head ranks its blocks by
    the mean (combine "sum") or the largest (combine "max") of its query heads' masses. Sink and
    recent blocks come first, then the others by falling mass. With a coverage, the fewest blocks in
    that order are kept whose covered mass, mean (combine "sum") or least (combine "max") over the
    query heads, reaches it; `top_n` caps them. With a mass threshold, every block that holds that
    much is kept, at most `top_n`; beyond `threshold_length` tokens, less is enough. Without either,
    `min(top_n, blocks of the request)`.

    Args:
        block_lse: [B, Hq, P] float32. From `score_blocks`.
        seq_lens: [B] int32. Tokens, the current one included; 0 marks a padded row. At most
            P * T.
        num_kv_heads: Hkv. Query heads `h * G .. (h + 1) * G - 1` share KV head h.
        v_block_tokens: T, tokens of a V block.
        selection: the rule. Its `top_n` is at least the blocks that sink and recent can force in.
        out: buffers to write and return. `blocks` has at least `min(top_n, P)` columns.
        estimated: `block_lse` holds estimates, so what is left out is to be told, too.
    Returns:
        Selected: blocks [B, Hkv, N] int32 ascending and padded with -1, counts [B, Hkv] int32,
        mass [B, Hkv] float32, and lse [B, Hq] float32 where `out` has it or the rule has a mass
        threshold; beside it, where `estimated`, dropped [B, Hq] float32. Without `out`, N is the
        longest list. A padded row has an empty list and mass 1.

    Ties: the lower block wins. Source: N scores of most mass, KCache (arXiv 2404.18057); selection
    by coverage and by mass are ours.
    """
    block_ids = torch.arange(block_lse.shape[-1], device=block_lse.device)
    num_blocks = torch.div(seq_lens + v_block_tokens - 1, v_block_tokens, rounding_mode="floor")
    exists = block_ids < num_blocks[:, None]
    lse = None
    if selection.clip is not None or (out is not None and out.lse is not None):
        lse = request_lse(block_lse, seq_lens, v_block_tokens)
    if selection.selects_everything:
        chosen = torch.where(exists, block_ids, -1)[:, None].expand(-1, num_kv_heads, -1)
        counts = num_blocks[:, None].expand(-1, num_kv_heads)
        dropped = None if lse is None or not estimated else torch.zeros_like(lse)
        mass = torch.ones_like(counts, dtype=torch.float32)
        return _into(Selected(chosen, counts, mass, lse, dropped), out)

    masses = block_masses(block_lse, exists).unflatten(1, (num_kv_heads, -1))
    combined = masses.mean(2) if selection.combine == "sum" else masses.amax(2)
    # A forced block ranks before every other, a block that does not exist after every other.
    forced = exists & forced_blocks(block_ids, seq_lens, v_block_tokens, selection)
    rank_key = combined.masked_fill(forced[:, None], torch.inf)
    rank_key = rank_key.masked_fill(~exists[:, None], -torch.inf)
    # A stable sort leaves equal keys in ascending order of block: the lower block wins a tie.
    order = rank_key.sort(dim=-1, descending=True, stable=True).indices

    each = masses.gather(-1, order[:, :, None].expand_as(masses)).cumsum(-1, dtype=torch.float64)
    covered = each.mean(2) if selection.combine == "sum" else each.amin(2)
    counts = num_blocks[:, None].expand(-1, num_kv_heads)
    if selection.coverage is not None:
        reaching = (~(covered >= selection.coverage)).sum(-1) + 1
        counts = torch.minimum(counts, torch.maximum(reaching, forced.sum(-1)[:, None]))
    if selection.mass_threshold is not None:
        thresholds = selection.mass_threshold * selection.threshold_share(seq_lens)
        heavy = exists[:, None] & (combined >= thresholds[:, None, None])
        counts = (heavy | forced[:, None]).sum(-1)
    if selection.top_n is not None:
        counts = counts.clamp_max(selection.top_n)

    width = int(counts.max()) if counts.numel() else 0
    ranks = torch.arange(width, device=block_lse.device)
    beyond = ranks >= counts[..., None]
    past_last = block_lse.shape[-1]
    chosen = order[..., :width].masked_fill(beyond, past_last).sort(-1).values
    chosen = chosen.masked_fill(chosen == past_last, -1)
    last = (counts[..., None] - 1).clamp_min(0).long()
    mass = covered.gather(-1, last)[..., 0] if width else covered.new_zeros(counts.shape)
    mass = torch.where(counts > 0, mass.clamp_max(1.0), 1.0)
    dropped = None
    if estimated and lse is not None:
        # Of each query head. A padded row has no block to gather.
        kept = each.gather(-1, last[:, :, None].expand(-1, -1, each.shape[2], -1))[..., 0]
        dropped = (1.0 - kept).clamp_min(0.0).flatten(1) if width else torch.zeros_like(lse)
    return _into(Selected(chosen, counts, mass, lse, dropped), out)


def request_lse(
    block_lse: torch.Tensor, seq_lens: torch.Tensor, v_block_tokens: int
) -> torch.Tensor:
    """Log-sum-exp of each query head's scores over the whole request: [B, Hq] float32.

    Args:
        block_lse, seq_lens, v_block_tokens: as for `select_blocks`. A padded row gets -inf.
    """
    first_tokens = torch.arange(block_lse.shape[-1], device=block_lse.device) * v_block_tokens
    exists = first_tokens < seq_lens[:, None]
    return block_lse.masked_fill(~exists[:, None], -torch.inf).logsumexp(-1)


def block_masses(block_lse: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """Softmax mass of each V block of each query head: [B, Hq, P], each row summing to 1.

    Args:
        block_lse: [B, Hq, P].
        exists: [B, P] bool. A padded row has no block and gets masses of 0.
    """
    lse = block_lse.masked_fill(~exists[:, None], -torch.inf)
    return torch.where(exists[:, None], lse.softmax(-1), 0.0)


def forced_blocks(
    block_ids: torch.Tensor, seq_lens: torch.Tensor, v_block_tokens: int, selection: Selection
) -> torch.Tensor:
    """[B, P] bool: the sink blocks, and those that overlap the last `recent_tokens` tokens."""
    first_recent_token = (seq_lens - selection.recent_tokens).clamp_min(0)
    first_recent = torch.div(first_recent_token, v_block_tokens, rounding_mode="floor")
    return (block_ids < selection.sink_blocks) | (block_ids >= first_recent[:, None])


def _into(found: Selected, out: Selected | None) -> Selected:
    """Copy into `out`, padded with -1 to its width, or make tensors of just the width needed."""
    if out is None:
        width = int(found.counts.max()) if found.counts.numel() else 0
        return Selected(
            found.blocks[..., :width].to(torch.int32).contiguous(),
            found.counts.to(torch.int32).contiguous(),
            found.mass.to(torch.float32),
            found.lse,
            None if found.dropped is None else found.dropped.to(torch.float32),
        )
    out.blocks.fill_(-1)
    width = min(found.blocks.shape[-1], out.blocks.shape[-1])
    out.blocks[..., :width] = found.blocks[..., :width]
    out.counts.copy_(found.counts)
    out.mass.copy_(found.mass)
    for target, source in ((out.lse, found.lse), (out.dropped, found.dropped)):
        if target is not None and source is not None:
            target.copy_(source)
    return out
