# SPDX-License-Identifier: Apache-2.0
"""A soft cap on scores (Gemma 2), of the scaled scores and before the softmax. The definition."""

from __future__ import annotations

import torch


def cap_scores(scores: torch.Tensor, soft_cap: float | None) -> torch.Tensor:
    """soft_cap * tanh(score / soft_cap); the scores themselves without a cap.

    Args:
        scores: Scaled scores, of any shape; -inf, of tokens that are not there, becomes -soft_cap.
        soft_cap: The largest score there can be; None for no cap.
    """
    return scores if soft_cap is None else soft_cap * (scores / soft_cap).tanh()
