# SPDX-License-Identifier: Apache-2.0
"""What all measurements of the accuracy benchmark do with their engine.

The contexts of a length are prefilled once and stay in the prefix cache: prefill is exact, so they
are the same for every setting. What a setting decodes is never found by the next one, because no
prompt contains it. The prefix cache is emptied between lengths.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.accuracy_rows import Rows
from benchmarks.accuracy_score import selection_figures

# Groups of requests that fit the cache leave this many pages for the engine itself.
_SPARE_PAGES = 4


def stock_logits_path(work: Path, length: int) -> Path:
    """Stock's logits of a length of context: [rows, vocabulary] float32."""
    return work / f"stock-{length}.f32"


class EngineRun:
    """An engine, stock or with the split cache, and its results file.

    Args:
        spec: see benchmarks/accuracy_process.py.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        if spec["kcache"] is not None:
            import vllm_kcache  # noqa: F401  (LLM then knows kv_backend)

        from vllm import LLM

        from benchmarks.accuracy_record import processor_for

        self.spec = spec
        self.work = Path(spec["work"])
        self.rows = Rows(Path(spec["results"]))
        self.is_stock = spec["kcache"] is None
        split = {} if self.is_stock else {"kv_backend": "kcache", "kcache_config": spec["kcache"]}
        self.llm = LLM(
            **spec["engine"],
            **split,
            logits_processors=[processor_for(os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1")],
        )
        self._files_made = 0

    @property
    def page_tokens(self) -> int:
        """Tokens of a K page."""
        return self.llm.llm_engine.vllm_config.cache_config.block_size

    def new_positions_path(self) -> Path:
        """A file name for figures that no other setting has used."""
        self._files_made += 1
        kind = "stock" if self.is_stock else "kcache"
        return self.work / f"positions-{kind}-{os.getpid()}-{self._files_made}.f64"

    def groups(self, pages: list[int]) -> list[list[int]]:
        """Items that the cache holds at once, in order.

        Args:
            pages: pages that each item needs.

        Raises:
            RuntimeError: one item is too large.
        """
        room = self.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks - _SPARE_PAGES
        if max(pages) > room:
            raise RuntimeError(
                f"a context needs {max(pages)} pages and the cache has {room + _SPARE_PAGES}: give "
                "it more memory"
            )
        groups: list[list[int]] = []
        left = 0
        for item, needed in enumerate(pages):
            if needed > left or not groups:
                groups.append([])
                left = room
            groups[-1].append(item)
            left -= needed
        return groups

    def prefill(self, prompts: list[list[int]], what: str) -> None:
        """Put prompts into the prefix cache."""
        begin = time.perf_counter()
        self.generate(prompts, {"max_tokens": 1})
        seconds = time.perf_counter() - begin
        print(f"{what}: {len(prompts)} contexts prefilled in {seconds:.1f} s", flush=True)

    def generate(self, prompts: list[list[int]], *options: dict[str, Any]) -> list[Any]:
        """Greedy; one dict of sampling options for all prompts, or one for each."""
        from vllm import SamplingParams

        chosen = options if len(options) == len(prompts) else options * len(prompts)
        usual = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
        sampling = [SamplingParams(**{**usual, **o}) for o in chosen]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return self.llm.generate(inputs, sampling, use_tqdm=False)

    def use(self, setting: dict[str, Any] | None) -> dict[str, Any] | None:
        """Change the selection; returns the counters before the run, None for stock."""
        if self.is_stock:
            return None
        from vllm_kcache.integration.reconfigure import reconfigure

        reconfigure(self.llm, setting or {}, keep_prefix_cache=True)
        return self.metrics()

    def metrics(self) -> dict[str, Any]:
        """The counters of the split cache."""
        import vllm_kcache

        return vllm_kcache.metrics(self.llm)

    def check_cached(self, cached: list[int], prompts: list[int]) -> int:
        """Say so when prompts had to be prefilled again; returns the fewest cached tokens."""
        worst = min(
            zip(cached, prompts, strict=True), key=lambda pair: pair[0] - pair[1], default=(0, 0)
        )
        if worst[0] < worst[1] - 2 * self.page_tokens:
            print(f"note: only {worst[0]} of {worst[1]} tokens came from the cache", flush=True)
        return min(cached, default=0)

    def selection(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """What was selected; only one setting ran between each part's "before" and "after"."""
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


def name_of(setting: dict[str, Any] | None) -> str:
    """A setting in short, for people."""
    if setting is None:
        return "stock"
    return json.dumps(setting, separators=(",", ":")).replace('"', "")
