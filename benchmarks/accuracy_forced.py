# SPDX-License-Identifier: Apache-2.0
"""Forces passages of text on the decode path of one engine and compares with stock's logits."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy_engine import EngineRun, name_of, stock_logits_path
from benchmarks.accuracy_score import FIELDS, summarise
from benchmarks.accuracy_texts import Passage


def load_passages(path: Path) -> list[Passage]:
    """Passages that `save_passages` wrote."""
    return [
        Passage(p["kind"], tuple(p["tokens"]), tuple(p["first_tokens"]), p["num_forced"])
        for p in json.loads(path.read_text())
    ]


def save_passages(path: Path, passages: list[Passage]) -> None:
    """Write them for the engine's process."""
    path.write_text(json.dumps([vars(passage) for passage in passages]))


class ForcedRun(EngineRun):
    """Runs forced passages through one engine.

    Args:
        spec: see benchmarks/accuracy_process.py; it has `passages`.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.passages = load_passages(Path(spec["passages"]))

    def measure_length(self, length: int, settings: list[dict[str, Any]]) -> None:
        """Prefill the contexts, then decode them with each setting."""
        self.llm.reset_prefix_cache()
        parts: list[list[dict[str, Any]]] = [[] for _ in settings]
        files = [self._new_positions() for _ in settings]
        pages = -(-(length + self.passages[0].num_forced) // self.page_tokens) + 1
        groups = self.groups([pages] * len(self.passages))
        for number, group in enumerate(groups):
            name = f"{length} tokens, group {number + 1} of {len(groups)}"
            self.prefill([self.passages[i].prompt(length) for i in group], name)
            for index, setting in enumerate(settings):
                parts[index].append(self._decode(length, group, setting["kcache"], files[index]))
                if number == len(groups) - 1:
                    self._finish(length, setting, files[index], parts[index])

    def _new_positions(self) -> Path:
        """A file of figures, all NaN until they are known."""
        path = self.new_positions_path()
        shape = (self.passages[0].num_forced, len(self.passages), len(FIELDS))
        np.full(shape, np.nan).tofile(path)
        return path

    def _decode(
        self, length: int, group: list[int], setting: dict[str, Any] | None, positions: Path
    ) -> dict[str, Any]:
        """Force one group's tokens; returns figures that are no position's."""
        before = self.use(setting)
        begin = time.perf_counter()
        outputs = self.generate(
            [self.passages[i].prompt(length) for i in group],
            *(self._options(length, i, positions) for i in group),
        )
        seconds = time.perf_counter() - begin
        said = [list(output.outputs[0].token_ids) for output in outputs]
        if said != [self.passages[i].forced for i in group]:
            raise RuntimeError("a token was not forced: the figures would mean nothing")
        part: dict[str, Any] = {
            "seconds": seconds,
            "cached_tokens": [output.num_cached_tokens for output in outputs],
        }
        if self.is_stock:
            part["logprobs"] = {
                i: [step[t].logprob for step, t in zip(o.logprobs, o.token_ids, strict=True)]
                for i, o in zip(group, (output.outputs[0] for output in outputs), strict=True)
            }
        else:
            part["before"], part["after"] = before, self.metrics()
        return part

    def _options(self, length: int, item: int, positions: Path) -> dict[str, Any]:
        """Sampling options that force an item."""
        passage, num_items = self.passages[item], len(self.passages)
        options: dict[str, Any] = {
            "max_tokens": passage.num_forced,
            "extra_args": {
                "accuracy": {
                    # [steps, items]
                    "first_row": item,
                    "row_stride": num_items,
                    "num_rows": passage.num_forced * num_items,
                    "prompt_tokens": length,
                    "tokens": passage.forced,
                    "stock_logits": str(stock_logits_path(self.work, length)),
                    "positions": str(positions),
                    "save": self.is_stock,
                }
            },
        }
        # What vLLM itself reports, to hold ours against: stock only, it costs time.
        return {**options, "logprobs": 0} if self.is_stock else options

    def _finish(
        self, length: int, setting: dict[str, Any], file: Path, parts: list[dict[str, Any]]
    ) -> None:
        """Summarise a setting and write its row."""
        shape = (self.passages[0].num_forced, len(self.passages), len(FIELDS))
        positions = np.fromfile(file).reshape(shape)
        if np.isnan(positions).any():
            raise RuntimeError(f"{int(np.isnan(positions).sum())} figures were not recorded")
        row = {**setting["row"], **summarise(positions, [p.kind for p in self.passages])}
        row["seconds"] = sum(part["seconds"] for part in parts)
        cached = [tokens for part in parts for tokens in part["cached_tokens"]]
        row["cached_tokens"] = self.check_cached(cached, [length] * len(cached))
        if self.is_stock:
            reported = {item: v for part in parts for item, v in part["logprobs"].items()}
            ours = positions[:, :, FIELDS.index("logprob")]
            theirs = np.array([reported[item] for item in range(len(self.passages))]).T
            row["logprob_difference"] = float(np.abs(ours - theirs).max())
        else:
            row |= self.selection(parts)
        if row["key"] not in self.rows:  # stock may run again only for its logits
            self.rows.add(row)
        file.unlink()
        print(describe(row), flush=True)


def describe(row: dict[str, Any]) -> str:
    """One line for people."""
    selected = f"{row['selected_tokens']:7.0f} tokens" if "selected_tokens" in row else " " * 14
    return (
        f"{row['length']:6d} {row['perplexity']:8.4f} ({row['perplexity_change']:+8.3%} "
        f"±{row['perplexity_change_error']:.3%}) KL {row['kl']:.6f} ±{row['kl_error']:.6f} "
        f"top-1 {row['top1_agreement']:.4f} {selected} {row['seconds']:6.1f} s  "
        f"{name_of(row['kcache'])}"
    )
