# SPDX-License-Identifier: Apache-2.0
"""The `sweep` of the accuracy benchmark: perplexity and KL of many settings on forced text."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.accuracy_forced import save_passages
from benchmarks.accuracy_grid import EngineSettings, listed, make_grid
from benchmarks.accuracy_plan import Plan
from benchmarks.accuracy_texts import hash_of, make_passages


class Sweep(Plan):
    """Forces the passages of bundled texts."""

    kind = "forced"

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        from transformers import AutoTokenizer

        super().__init__(options, command)
        longest = self.lengths[-1]
        self.passages = make_passages(
            AutoTokenizer.from_pretrained(options.model), options.items, longest, options.forced
        )
        self.texts = {
            "texts": hash_of(self.passages),
            "items": len(self.passages),
            "forced": options.forced,
        }
        self.prepare(longest + options.forced, len(self.passages), options.dtype or "float32")

    def engines(self) -> list[EngineSettings]:
        options, size = self.options, self.v_block_tokens()
        if options.settings is not None:
            return listed(options.settings, size)
        return make_grid(options.grid, size, options.v_blocks, options.dense_layers, not self.gpu)

    def common_of(self, length: int) -> dict[str, Any]:
        # The texts of all lengths are the same.
        return {**self.common, **self.texts}

    def logits_rows(self, length: int) -> int:
        return len(self.passages) * self.options.forced

    def held_tokens(self) -> int:
        each = self.lengths[-1] + self.options.forced + 2 * self.engine["block_size"]
        return len(self.passages) * each

    def save_texts(self) -> dict[str, str]:
        path = self.work / "passages.json"
        save_passages(path, self.passages)
        return {"passages": str(path)}
