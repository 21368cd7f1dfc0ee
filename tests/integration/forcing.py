# SPDX-License-Identifier: Apache-2.0
"""Teacher forcing through the decode path: each step must sample the given token."""

from __future__ import annotations

from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class _Force:
    """Leaves one token possible. vLLM reports raw log-probabilities, taken before this runs."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def __call__(self, output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        token = self.tokens[len(output_ids)]
        kept = logits[token].clone()
        logits.fill_(float("-inf"))
        logits[token] = kept
        return logits


class ForceTokens(AdapterLogitsProcessor):
    """Forces the tokens in `extra_args["forced_tokens"]`; other requests are left alone."""

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        """Nothing to check: a missing list means that nothing is forced."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        tokens = (params.extra_args or {}).get("forced_tokens")
        return _Force(tokens) if tokens else None
