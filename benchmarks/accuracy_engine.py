# SPDX-License-Identifier: Apache-2.0
"""One engine of the accuracy benchmark, in a process of its own.

    python -m benchmarks.accuracy_engine SPEC.json

The specification (made by benchmarks/accuracy.py): `engine`, arguments of `vllm.LLM`; `kcache`,
the settings that the split cache starts with, or null for stock; `passages`, a file of them;
`num_items`; `work`, a folder for stock's logits; `results`, the file that rows are added to; and
`jobs`, a list of {"length", "settings": [{"kcache", "row"}]}. Each row is written when it is known.

The contexts of a length are prefilled once and stay in the prefix cache: prefill is exact, so they
are the same for every setting. What a setting decodes is never found by the next one, because a
prompt ends before the forced tokens; contexts of other lengths begin elsewhere in the text. The
prefix cache is emptied between lengths all the same.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy_rows import Rows
from benchmarks.accuracy_score import FIELDS, selection_figures, summarise
from benchmarks.accuracy_texts import Passage

# Groups of requests that fit the cache leave this many pages for the engine itself.
_SPARE_PAGES = 4


def load_passages(path: Path) -> list[Passage]:
    """Passages that `save_passages` wrote."""
    return [
        Passage(p["kind"], tuple(p["tokens"]), tuple(p["first_tokens"]), p["num_forced"])
        for p in json.loads(path.read_text())
    ]


def save_passages(path: Path, passages: list[Passage]) -> None:
    """Write them for the engine's process."""
    path.write_text(json.dumps([vars(passage) for passage in passages]))


def stock_logits_path(work: Path, length: int) -> Path:
    """Stock's logits of a length of context: [steps, items, vocabulary] float32."""
    return work / f"stock-{length}.f32"


class ForcedRun:
    """Runs forced passages through one engine.

    Args:
        spec: see the module.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        if spec["kcache"] is not None:
            import vllm_kcache  # noqa: F401  (LLM then knows kv_backend)

        from vllm import LLM

        from benchmarks.accuracy_record import processor_for

        self.spec = spec
        self.work = Path(spec["work"])
        self.passages = load_passages(Path(spec["passages"]))
        self.rows = Rows(Path(spec["results"]))
        self.is_stock = spec["kcache"] is None
        split = {} if self.is_stock else {"kv_backend": "kcache", "kcache_config": spec["kcache"]}
        self.llm = LLM(
            **spec["engine"],
            **split,
            logits_processors=[processor_for(os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1")],
        )
        self._positions_made = 0

    def run(self) -> None:
        """All jobs."""
        for job in self.spec["jobs"]:
            self.measure_length(job["length"], job["settings"])

    def measure_length(self, length: int, settings: list[dict[str, Any]]) -> None:
        """Prefill the contexts, then decode them with each setting."""
        self.llm.reset_prefix_cache()
        parts: list[list[dict[str, Any]]] = [[] for _ in settings]
        files = [self._new_positions() for _ in settings]
        groups = self._groups(length)
        for number, group in enumerate(groups):
            begin = time.perf_counter()
            self._generate([self.passages[i].prompt(length) for i in group], {"max_tokens": 1})
            print(
                f"{length} tokens: {len(group)} contexts prefilled in "
                f"{time.perf_counter() - begin:.1f} s (group {number + 1} of {len(groups)})",
                flush=True,
            )
            for index, setting in enumerate(settings):
                parts[index].append(self._decode(length, group, setting["kcache"], files[index]))
                if number == len(groups) - 1:
                    self._finish(length, setting, files[index], parts[index])

    def _groups(self, length: int) -> list[list[int]]:
        """Items that the cache holds at once."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        pages = -(-(length + self.passages[0].num_forced) // cache.block_size) + 1
        fits = (cache.num_gpu_blocks - _SPARE_PAGES) // pages
        if fits < 1:
            raise RuntimeError(
                f"a context of {length} tokens needs {pages} pages and the cache has "
                f"{cache.num_gpu_blocks}: give it more memory"
            )
        fits = min(fits, self.spec["engine"]["max_num_seqs"])
        items = list(range(len(self.passages)))
        return [items[first : first + fits] for first in range(0, len(items), fits)]

    def _new_positions(self) -> Path:
        """A file of figures, all NaN until they are known."""
        self._positions_made += 1
        kind = "stock" if self.is_stock else "kcache"
        path = self.work / f"positions-{kind}-{os.getpid()}-{self._positions_made}.f64"
        shape = (self.passages[0].num_forced, len(self.passages), len(FIELDS))
        np.full(shape, np.nan).tofile(path)
        return path

    def _generate(self, prompts: list[list[int]], *options: dict[str, Any]) -> list[Any]:
        """Greedy; one dict of sampling options for all prompts, or one for each."""
        from vllm import SamplingParams

        chosen = options if len(options) == len(prompts) else options * len(prompts)
        sampling = [
            SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, **o) for o in chosen
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return self.llm.generate(inputs, sampling, use_tqdm=False)

    def _decode(
        self, length: int, group: list[int], setting: dict[str, Any] | None, positions: Path
    ) -> dict[str, Any]:
        """Force one group's tokens; returns figures that are no position's."""
        before = self._use(setting)
        begin = time.perf_counter()
        outputs = self._generate(
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
            part["before"], part["after"] = before, self._metrics()
        return part

    def _use(self, setting: dict[str, Any] | None) -> dict[str, Any] | None:
        """Change the selection; returns the counters before the run."""
        if self.is_stock:
            return None
        from vllm_kcache.integration.reconfigure import reconfigure

        reconfigure(self.llm, setting or {}, keep_prefix_cache=True)
        return self._metrics()

    def _metrics(self) -> dict[str, Any]:
        import vllm_kcache

        return vllm_kcache.metrics(self.llm)

    def _options(self, length: int, item: int, positions: Path) -> dict[str, Any]:
        """Sampling options that force an item."""
        passage = self.passages[item]
        options: dict[str, Any] = {
            "max_tokens": passage.num_forced,
            "extra_args": {
                "accuracy": {
                    "item": item,
                    "num_items": len(self.passages),
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
        row["cached_tokens"] = min(cached)
        page = self.llm.llm_engine.vllm_config.cache_config.block_size
        if row["cached_tokens"] < length - 2 * page:
            print(f"note: only {row['cached_tokens']} of {length} tokens came from the cache")
        if self.is_stock:
            reported = {item: v for part in parts for item, v in part["logprobs"].items()}
            ours = positions[:, :, FIELDS.index("logprob")]
            theirs = np.array([reported[item] for item in range(len(self.passages))]).T
            row["logprob_difference"] = float(np.abs(ours - theirs).max())
        else:
            row |= self._selection_figures(parts)
        if row["key"] not in self.rows:  # stock may run again only for its logits
            self.rows.add(row)
        file.unlink()
        print(describe(row), flush=True)

    def _selection_figures(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """Of all groups; only this setting ran between each part's two readings."""
        tokens = self.spec["v_block_tokens"]
        figures = [selection_figures(p["before"], p["after"], tokens) for p in parts]
        lists = sum(f["selected_lists"] for f in figures)

        def mean(values: list[float]) -> float:
            weighted = (v * f["selected_lists"] for v, f in zip(values, figures, strict=True))
            return sum(weighted) / max(lists, 1)

        rates = [f["hot_cache_hit_rate"] for f in figures]
        return {
            "selected_tokens": mean([f["selected_tokens"] for f in figures]),
            "dropped_mass": [mean([f["dropped_mass"][end] for f in figures]) for end in (0, 1)],
            "hot_cache_hit_rate": None if None in rates else mean(rates),
        }


def describe(row: dict[str, Any]) -> str:
    """One line for people."""
    if row["kcache"] is None:
        name = "stock"
    else:
        name = json.dumps(row["kcache"], separators=(",", ":")).replace('"', "")
    selected = f"{row['selected_tokens']:7.0f} tokens" if "selected_tokens" in row else " " * 14
    return (
        f"{row['length']:6d} {row['perplexity']:8.4f} ({row['perplexity_change']:+8.3%} "
        f"±{row['perplexity_change_error']:.3%}) KL {row['kl']:.6f} ±{row['kl_error']:.6f} "
        f"top-1 {row['top1_agreement']:.4f} {selected} {row['seconds']:6.1f} s  {name}"
    )


def main() -> None:
    """Entry point: the path of the specification."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    begin = time.perf_counter()
    run = ForcedRun(spec)
    print(f"engine started in {time.perf_counter() - begin:.0f} s", flush=True)
    run.run()


if __name__ == "__main__":
    main()
