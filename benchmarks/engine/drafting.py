# SPDX-License-Identifier: Apache-2.0
"""Drafts that are always there and as good as never right: steps of k + 1 tokens that make one."""

from __future__ import annotations

from typing import Any

DRAFT_TOKEN = 7


class Constant:
    """Drafts one token over and over (vLLM's method custom_class)."""

    def __init__(self, vllm_config: Any) -> None:
        self._drafts = [DRAFT_TOKEN] * vllm_config.speculative_config.num_speculative_tokens

    def load_model(self, model: Any) -> None:
        """There is none."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """The same for each request that has sampled."""
        return [self._drafts if sampled else [] for sampled in sampled_token_ids]
