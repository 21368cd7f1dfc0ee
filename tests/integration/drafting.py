# SPDX-License-Identifier: Apache-2.0
"""Drafts of known texts, wrong from a place on that changes from step to step."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np

# Names a file: [texts, each a list of token ids, prompt first].
TEXTS = "KCACHE_TEST_TEXTS"


def right_drafts(length: int, most: int) -> int:
    """How many drafts are right after so many tokens: every number, and each as often."""
    return random.Random(length).randrange(most + 1)


class KnownTexts:
    """Drafts what comes next in the text that a request begins with, up to the first wrong one."""

    def __init__(self, vllm_config: Any) -> None:
        self._most = vllm_config.speculative_config.num_speculative_tokens
        self._texts = [np.array(text) for text in json.loads(Path(os.environ[TEXTS]).read_text())]
        self._vocabulary = vllm_config.model_config.get_vocab_size()

    def load_model(self, model: Any) -> None:
        """There is none."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts of each request; none where nothing was sampled, for a prompt is not at its
        end."""
        return [
            self._draft(token_ids_cpu[row, : num_tokens_no_spec[row]]) if sampled else []
            for row, sampled in enumerate(sampled_token_ids)
        ]

    def _draft(self, tokens: np.ndarray) -> list[int]:
        length = tokens.shape[0]
        # With the last drafts accepted a request may be longer than it was asked to be.
        (text,) = (x for x in self._texts if np.array_equal(x[:length], tokens[: x.shape[0]]))
        drafts = text[length : length + self._most].copy()
        drafts[right_drafts(length, self._most) :] += 1
        return (drafts % self._vocabulary).tolist()
