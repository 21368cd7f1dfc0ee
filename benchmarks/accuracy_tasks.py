# SPDX-License-Identifier: Apache-2.0
"""The `tasks` of the accuracy benchmark: long-context tasks, extraction and plain continuation."""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmarks.accuracy_extraction import make_extraction
from benchmarks.accuracy_grid import EngineSettings, listed
from benchmarks.accuracy_items import Prompter, TaskItem, hash_of_items, save_items
from benchmarks.accuracy_plan import Plan
from benchmarks.accuracy_ruler import TASKS, Ruler
from benchmarks.accuracy_texts import make_passages

CONTINUATION = "text"
CONTINUATION_TOKENS = 128
# What is compared when nothing is asked for: the default, and the paper's fixed number of tokens.
DEFAULT_SETTINGS = ({"mass_threshold": 0.002}, {"top_n_tokens": 512})
_MOST_REQUESTS = 512


class Tasks(Plan):
    """Answers items of all tasks with stock and each setting."""

    kind = "tasks"

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        from transformers import AutoTokenizer

        super().__init__(options, command)
        begin = time.perf_counter()
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.items = make_items(tokenizer, self.lengths, options.items, options.records)
        count = sum(len(items) for items in self.items.values())
        print(f"{count} items made in {time.perf_counter() - begin:.1f} s", flush=True)
        requests = max(len(items) + sum(bool(i.answer) for i in items) for items in self._groups())
        dtype = options.dtype or ("bfloat16" if self.gpu else "float32")
        self.prepare(self.lengths[-1], min(requests, _MOST_REQUESTS), dtype)

    def _groups(self) -> list[list[TaskItem]]:
        return [self.items[length] for length in self.lengths]

    def engines(self) -> list[EngineSettings]:
        size = self.v_block_tokens()
        if self.options.settings is not None:
            return listed(self.options.settings, size)
        settings = [dict(setting) for setting in DEFAULT_SETTINGS]
        for setting in settings:
            if "top_n_tokens" in setting:
                setting["top_n"] = setting.pop("top_n_tokens") // size
        return listed(settings, size)

    def common_of(self, length: int) -> dict[str, Any]:
        return {
            **self.common,
            "texts": hash_of_items(self.items[length]),
            "items": self.options.items,
            "records": self.options.records,
        }

    def logits_rows(self, length: int) -> int:
        return sum(len(item.answer) for item in self.items[length])

    def held_tokens(self) -> int:
        page = self.engine["block_size"]
        return max(
            sum(len(i.prompt) + i.max_tokens + len(i.answer) + 5 * page for i in items)
            for items in self._groups()
        )

    def save_texts(self) -> dict[str, str]:
        path = self.work / "items.json"
        save_items(path, self.items)
        return {"items": str(path)}


def make_items(
    tokenizer: Any, lengths: list[int], count: int, records: int
) -> dict[int, list[TaskItem]]:
    """Items of each length, task after task.

    Args:
        tokenizer: the model's.
        lengths: tokens of prompt and answer together, at most.
        count: items of each task.
        records: records that an extraction asks for.

    Raises:
        ValueError: a length is too short or too long for a task.
    """
    prompter = Prompter(tokenizer)
    ruler = Ruler(prompter)
    longest = max(lengths) - CONTINUATION_TOKENS
    passages = make_passages(tokenizer, count, longest, CONTINUATION_TOKENS)
    items = {}
    for length in lengths:
        made = [ruler.item(task, number, length) for task in TASKS for number in range(count)]
        made += [
            make_extraction(prompter, ruler.filling, number, length, records)
            for number in range(count)
        ]
        made += [
            TaskItem(
                task=CONTINUATION,
                prompt=tuple(passage.prompt(length - CONTINUATION_TOKENS)),
                answer=(),
                max_tokens=CONTINUATION_TOKENS,
                stops=False,
            )
            for passage in passages
        ]
        items[length] = made
    return items
