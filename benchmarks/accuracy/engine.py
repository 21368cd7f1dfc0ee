# SPDX-License-Identifier: Apache-2.0
"""One engine of the sweep, stock or with the split cache, in a process of its own.

    python -m benchmarks.accuracy.engine SPEC.json

The specification, made by `sweep.py`: `engine`, arguments of `vllm.LLM`; `kcache`, the settings
that the split cache starts with, or null for stock; `is_reference`, whether this is the stock
engine whose logits the others are compared with; `v_block_tokens`; `work`, a folder for what
stock leaves; `results`, the file that rows are added to; `passages`, the file of the texts; and
`jobs`, a list of {"length", "settings": [{"kcache", "row"}]}. A row is written when it is known.

The contexts of a length are prefilled once and stay in the prefix cache: prefill is exact, so they
are the same for every setting. What a setting decodes is never found by the next one, because no
prompt contains it. The prefix cache is emptied between lengths.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.score import FIELDS, selection_figures, summarise
from benchmarks.accuracy.table import stock_name
from benchmarks.accuracy.texts import load_passages
from benchmarks.engine.decode_engine import SPARE_TOKENS, requests_that_fit
from benchmarks.rows import Row, Rows


def stock_logits_path(work: Path, length: int) -> Path:
    """Stock's logits of a length of context: [rows, vocabulary] float32."""
    return work / f"stock-{length}.f32"


@dataclass
class Measured:
    """What is known of one setting at one length while its groups run.

    Attributes:
        row: what the row begins with.
        setting: what `reconfigure` sets; None for stock.
        file: [steps, passages, fields] float64, NaN until a figure is known.
        counted: figures of the split cache before and after each group.
        logprobs: of the reference, by passage: what vLLM itself reports.
        cached: prompt tokens that each request found in the prefix cache.
    """

    row: Row
    setting: dict[str, Any] | None
    file: Path
    seconds: float = 0.0
    counted: list[tuple[Row, Row]] = field(default_factory=list)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    cached: list[int] = field(default_factory=list)


class EngineRun:
    """Forces passages of text on the decode path and compares with stock's logits.

    Args:
        spec: see the module.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        if spec["kcache"] is not None:
            import vllm_kcache  # noqa: F401  (LLM then knows kv_backend)

        from vllm import LLM

        from benchmarks.accuracy.record import processor_for

        self.work = Path(spec["work"])
        self.rows = Rows(Path(spec["results"]))
        self.passages = load_passages(Path(spec["passages"]))
        self.v_block_tokens = spec["v_block_tokens"]
        self.is_stock = spec["kcache"] is None
        self.is_reference = spec["is_reference"]
        split = {} if self.is_stock else {"kv_backend": "kcache", "kcache_config": spec["kcache"]}
        self.llm = LLM(
            **spec["engine"],
            **split,
            logits_processors=[processor_for(os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1")],
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a file of figures: steps, passages, fields."""
        return self.passages[0].num_forced, len(self.passages), len(FIELDS)

    def measure_length(self, length: int, settings: list[dict[str, Any]]) -> None:
        """Prefill the contexts, then decode them with each setting."""
        self.llm.reset_prefix_cache()
        found = []
        for number, setting in enumerate(settings):
            kind = "stock" if self.is_stock else "kcache"
            # A name that no other setting has used: the processor keeps files open.
            file = self.work / f"positions-{kind}-{os.getpid()}-{length}-{number}.f64"
            np.full(self.shape, np.nan).tofile(file)
            found.append(Measured(setting["row"], setting["kcache"], file))
        for group in self.groups(length):
            begin = time.perf_counter()
            self.generate([self.passages[i].prompt(length) for i in group], {"max_tokens": 1})
            seconds = time.perf_counter() - begin
            print(
                f"{length} tokens: {len(group)} contexts prefilled in {seconds:.1f} s", flush=True
            )
            for measured in found:
                self.decode(length, group, measured)
        for measured in found:
            self.finish(length, measured)

    def groups(self, length: int) -> list[list[int]]:
        """Passages that the cache holds at once, in order.

        Raises:
            RuntimeError: one is too large.
        """
        tokens = length + self.passages[0].num_forced
        each = requests_that_fit(self.llm, tokens + SPARE_TOKENS)
        if not each:
            raise RuntimeError(f"no context of {tokens} tokens fits the cache: give it more memory")
        numbers = list(range(len(self.passages)))
        return [numbers[first : first + each] for first in range(0, len(numbers), each)]

    def generate(self, prompts: list[list[int]], *options: dict[str, Any]) -> list[Any]:
        """Greedy; one dict of sampling options for all prompts, or one for each."""
        from vllm import SamplingParams

        chosen = options if len(options) == len(prompts) else options * len(prompts)
        usual = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
        sampling = [SamplingParams(**{**usual, **o}) for o in chosen]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return self.llm.generate(inputs, sampling, use_tqdm=False)

    def decode(self, length: int, group: list[int], measured: Measured) -> None:
        """Force one group's tokens with one setting."""
        before: Row = {}
        if not self.is_stock:
            import vllm_kcache
            from vllm_kcache.integration.reconfigure import reconfigure

            reconfigure(self.llm, measured.setting or {}, keep_prefix_cache=True)
            before = vllm_kcache.metrics(self.llm)
        begin = time.perf_counter()
        outputs = self.generate(
            [self.passages[i].prompt(length) for i in group],
            *(self.options(length, i, measured.file) for i in group),
        )
        measured.seconds += time.perf_counter() - begin
        if not self.is_stock:
            measured.counted.append((before, vllm_kcache.metrics(self.llm)))
        for item, output in zip(group, outputs, strict=True):
            measured.cached.append(output.num_cached_tokens)
            (said,) = output.outputs
            if list(said.token_ids) != self.passages[item].forced:
                raise RuntimeError("a token was not forced: the figures would mean nothing")
            if self.is_reference:
                steps = zip(said.logprobs, said.token_ids, strict=True)
                measured.logprobs[item] = [step[token].logprob for step, token in steps]

    def options(self, length: int, item: int, file: Path) -> dict[str, Any]:
        """Sampling options that force a passage."""
        passage, num_items = self.passages[item], len(self.passages)
        options: dict[str, Any] = {
            "max_tokens": passage.num_forced,
            "extra_args": {
                "accuracy": {
                    "first_row": item,
                    "row_stride": num_items,
                    "num_rows": passage.num_forced * num_items,
                    "prompt_tokens": length,
                    "tokens": passage.forced,
                    "stock_logits": str(stock_logits_path(self.work, length)),
                    "positions": str(file),
                    "save": self.is_reference,
                }
            },
        }
        # What vLLM itself reports, to hold ours against: once, it costs time.
        return {**options, "logprobs": 0} if self.is_reference else options

    def finish(self, length: int, measured: Measured) -> None:
        """Summarise a setting and write its row."""
        positions = np.fromfile(measured.file).reshape(self.shape)
        if np.isnan(positions).any():
            raise RuntimeError(f"{int(np.isnan(positions).sum())} figures were not recorded")
        row = {**measured.row, **summarise(positions, [p.kind for p in self.passages])}
        row["seconds"] = measured.seconds
        row["cached_tokens"] = min(measured.cached)
        page_tokens = self.llm.llm_engine.vllm_config.cache_config.block_size
        if row["cached_tokens"] < length - 2 * page_tokens:
            print(f"note: only {row['cached_tokens']} of {length} tokens came from the cache")
        if self.is_reference:
            theirs = np.array([measured.logprobs[item] for item in range(len(self.passages))]).T
            ours = positions[:, :, FIELDS.index("logprob")]
            row["logprob_difference"] = float(np.abs(ours - theirs).max())
        elif not self.is_stock:
            row |= selection_figures(measured.counted, self.v_block_tokens)
        if row["key"] not in self.rows:  # stock may run again only for its logits
            self.rows.add(row)
        measured.file.unlink()
        print(describe(row), flush=True)


def describe(row: Row) -> str:
    """One line for people."""
    setting = json.dumps(row["kcache"], separators=(",", ":")).replace('"', "")
    selected = f"{row['selected_tokens']:7.0f} tokens" if "selected_tokens" in row else " " * 14
    return (
        f"{row['length']:6d} {row['perplexity']:8.4f} ({row['perplexity_change']:+8.3%} "
        f"±{row['perplexity_change_error']:.3%}) KL {row['kl']:.6f} ±{row['kl_error']:.6f} "
        f"top-1 {row['top1_agreement']:.4f} {selected} {row['seconds']:6.1f} s  "
        f"{stock_name(row) if row['kcache'] is None else setting}"
    )


def main() -> None:
    """Entry point: the path of the specification."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    begin = time.perf_counter()
    run = EngineRun(spec)
    print(f"engine started in {time.perf_counter() - begin:.0f} s", flush=True)
    for job in spec["jobs"]:
        run.measure_length(job["length"], job["settings"])


if __name__ == "__main__":
    main()
