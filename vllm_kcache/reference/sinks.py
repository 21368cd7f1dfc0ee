# SPDX-License-Identifier: Apache-2.0
"""Learned sinks: a term of the softmax beside the tokens, with no V. The definition."""

from __future__ import annotations

import torch


def share_of_tokens(lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """What tokens have of a softmax that a sink is part of: a factor of attention without it.

    Args:
        lse: [..., Hq] float32. Log-sum-exp of the scaled scores of all tokens; -inf for none.
        sinks: [Hq]. The learned score of each head. Other shapes are broadcast.
    Returns:
        As `lse`: exp(lse) / (exp(lse) + exp(sink)).
    """
    return (lse - sinks.to(lse.dtype)).sigmoid()
