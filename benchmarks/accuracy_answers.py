# SPDX-License-Identifier: Apache-2.0
"""Answers the items of the task benchmark with one engine, stock or with the split cache.

All items of a length run at once, each twice: once to answer, greedily, and once with the right
answer forced, where there is one. Both find the prompt in the prefix cache.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy_engine import EngineRun, name_of, stock_logits_path
from benchmarks.accuracy_extraction import TASK as EXTRACTION
from benchmarks.accuracy_items import TaskItem, load_items
from benchmarks.accuracy_score import FIELDS
from benchmarks.accuracy_task_score import Outcome, summarise_tasks


class AnswersRun(EngineRun):
    """Runs the items through one engine.

    Args:
        spec: see benchmarks/accuracy_process.py; it has `items`.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.items = load_items(Path(spec["items"]))

    def measure_length(self, length: int, settings: list[dict[str, Any]]) -> None:
        """Prefill the prompts, then answer them with each setting."""
        self.llm.reset_prefix_cache()
        items = self.items[length]
        groups = self.groups([self._pages(item) for item in items])
        runs = [_Run(self.new_positions_path(), items) for _ in settings]
        for number, group in enumerate(groups):
            name = f"{length} tokens, group {number + 1} of {len(groups)}"
            self.prefill([list(items[i].prompt) for i in group], name)
            for setting, run in zip(settings, runs, strict=True):
                self._answer(length, group, setting["kcache"], run)
        for setting, run in zip(settings, runs, strict=True):
            self._finish(length, setting, run)

    def _pages(self, item: TaskItem) -> int:
        """Pages of an item: the prompt is held once, what is said twice."""
        said = sum(-(-tokens // self.page_tokens) + 1 for tokens in _said_tokens(item))
        return -(-len(item.prompt) // self.page_tokens) + said

    def _answer(
        self, length: int, group: list[int], setting: dict[str, Any] | None, run: _Run
    ) -> None:
        """One group of items with one setting."""
        items = run.items
        forced = [i for i in group if items[i].answer]
        options = [
            {"max_tokens": items[i].max_tokens, "ignore_eos": not items[i].stops,
             "detokenize": True}
            for i in group
        ]  # fmt: skip
        options += [self._forced_options(length, i, run) for i in forced]
        before = self.use(setting)
        begin = time.perf_counter()
        outputs = self.generate([list(items[i].prompt) for i in group + forced], *options)
        run.seconds += time.perf_counter() - begin
        if not self.is_stock:
            run.parts.append({"before": before, "after": self.metrics()})
        for item, output in zip(group, outputs[: len(group)], strict=True):
            run.said[item] = list(output.outputs[0].token_ids)
            run.texts[item] = output.outputs[0].text
        for item, output in zip(forced, outputs[len(group) :], strict=True):
            if list(output.outputs[0].token_ids) != list(items[item].answer):
                raise RuntimeError("a token was not forced: the figures would mean nothing")
        run.cached += [output.num_cached_tokens for output in outputs]
        run.prompts += [len(items[i].prompt) for i in group + forced]

    def _forced_options(self, length: int, item: int, run: _Run) -> dict[str, Any]:
        """Sampling options that force the right answer of an item."""
        return {
            "max_tokens": len(run.items[item].answer),
            "extra_args": {
                "accuracy": {
                    "first_row": run.first_rows[item],
                    "row_stride": 1,
                    "num_rows": run.first_rows[-1],
                    "prompt_tokens": len(run.items[item].prompt),
                    "tokens": list(run.items[item].answer),
                    "stock_logits": str(stock_logits_path(self.work, length)),
                    "positions": str(run.file),
                    "save": self.is_stock,
                }
            },
        }

    def _finish(self, length: int, setting: dict[str, Any], run: _Run) -> None:
        """Compare with stock and write the row."""
        answers = self.work / f"stock-{length}.json"
        said = [run.said[i] for i in range(len(run.items))]
        texts = [run.texts[i] for i in range(len(run.items))]
        if self.is_stock:
            answers.write_text(json.dumps({"said": said, "texts": texts}))
        stock = json.loads(answers.read_text())
        outcomes = [
            Outcome(*values)
            for values in zip(
                run.items, said, texts, stock["said"], stock["texts"], run.positions(), strict=True
            )
        ]
        row = {**setting["row"], **summarise_tasks(outcomes), "seconds": run.seconds}
        row["cached_tokens"] = self.check_cached(run.cached, run.prompts)
        if not self.is_stock:
            row |= self.selection(run.parts)
        if row["key"] not in self.rows:  # stock may run again only for what it leaves
            self.rows.add(row)
        run.file.unlink()
        print(describe(row), flush=True)


class _Run:
    """What is known of one setting while its groups run.

    Args:
        file: file of the forced answers' figures; made here, all NaN.
        items: all items.
    """

    def __init__(self, file: Path, items: list[TaskItem]) -> None:
        self.file = file
        self.items = items
        self.first_rows = np.cumsum([0, *(len(item.answer) for item in items)]).tolist()
        self.said: dict[int, list[int]] = {}
        self.texts: dict[int, str] = {}
        self.parts: list[dict[str, Any]] = []
        self.cached: list[int] = []
        self.prompts: list[int] = []
        self.seconds = 0.0
        np.full((self.first_rows[-1], len(FIELDS)), np.nan).tofile(file)

    def positions(self) -> list[np.ndarray | None]:
        """Figures of each item's answer."""
        read = np.fromfile(self.file).reshape(self.first_rows[-1], len(FIELDS))
        if np.isnan(read).any():
            raise RuntimeError(f"{int(np.isnan(read).sum())} figures were not recorded")
        parts = np.split(read, self.first_rows[1:-1])
        return [part if item.answer else None for part, item in zip(parts, self.items, strict=True)]


def _said_tokens(item: TaskItem) -> list[int]:
    """Tokens of the requests of an item."""
    return [item.max_tokens, *([len(item.answer)] if item.answer else [])]


def describe(row: dict[str, Any]) -> str:
    """A few lines for people."""
    selected = f"{row['selected_tokens']:.0f} tokens a head, " if "selected_tokens" in row else ""
    lines = [f"{row['length']:6d} {name_of(row['kcache'])}: {selected}{row['seconds']:.1f} s"]
    parts = {**row["tasks"], "average": row["average"]}
    for name in [n for n in parts if n not in ("average", EXTRACTION)] + ["average", EXTRACTION]:
        figures = parts.get(name)
        if figures is None:
            continue
        line = f"       {name:12s} identical {figures['identical']:6.1%}"
        if "score" in figures:
            line += (
                f"  score {figures['score']:5.1f}, stock {figures['stock_score']:5.1f} "
                f"({figures['difference']:+5.1f} ±{figures['difference_error']:.1f})"
                f"  right answer {figures['answer_logprob_change']:+.5f} "
                f"±{figures['answer_logprob_change_error']:.5f} nats, KL {figures['answer_kl']:.5f}"
            )
        lines.append(line)
    return "\n".join(lines)
