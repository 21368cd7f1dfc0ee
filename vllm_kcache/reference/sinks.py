# SPDX-License-Identifier: Apache-2.0
"""Learned sinks: a term of the softmax beside the tokens, with no V. The definition."""

from __future__ import annotations

import torch

from vllm_kcache.types import Selected


def share_of_tokens(lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """What tokens have of a softmax that a sink is part of: a factor of attention without it.

    Args:
        lse: [..., Hq] float32. Log-sum-exp of the scaled scores of all tokens; -inf for none.
        sinks: [Hq]. The learned score of each head. Other shapes are broadcast.
    Returns:
        As `lse`: exp(lse) / (exp(lse) + exp(sink)).
    """
    return (lse - sinks.to(lse.dtype)).sigmoid()


def refine_lse(block_lse: torch.Tensor, refined: torch.Tensor, selected: Selected) -> torch.Tensor:
    """The best that is known of each V block where scores are estimates: of the selected blocks
    what their K says, of the others the estimate. Its `request_lse` is what a sink is weighed
    against.

    Args:
        block_lse: [B, Hq, P], from `score_codes`.
        refined: [B, Hq, N], from `attend_rows`; anything at padding.
        selected: from `select_blocks`.
    Returns:
        [B, Hq, P], a copy.
    """
    group_size = block_lse.shape[1] // selected.blocks.shape[1]
    blocks = selected.blocks.repeat_interleave(group_size, 1).long()
    # Padding goes to a column of its own.
    past_last = block_lse.shape[-1]
    known = torch.nn.functional.pad(block_lse, (0, 1))
    known.scatter_(-1, torch.where(blocks < 0, past_last, blocks), refined.to(known.dtype))
    return known[..., :past_last]
