# SPDX-License-Identifier: Apache-2.0
"""Made-up rows of the benchmarks' results, for the tests of tables and figures."""

from __future__ import annotations

from typing import Any

from benchmarks.accuracy_extraction import TASK as EXTRACTION
from benchmarks.accuracy_ruler import TASKS
from benchmarks.accuracy_tasks import CONTINUATION


def _common(
    kind: str, setting: dict[str, Any] | None, v_block_tokens: int, dense_layers: int, dtype: str
) -> dict[str, Any]:
    start = {"v_block_tokens": v_block_tokens, "dense_layers": dense_layers}
    return {
        "kind": kind,
        "model": "model",
        "device": "GPU",
        "engine": {"dtype": dtype},
        "commit": "abc",
        "length": 2048,
        "kcache": None if setting is None else {**start, **setting},
    }


def forced_row(
    setting: dict[str, Any] | None, v_block_tokens: int = 8, dense_layers: int = 0,
    dtype: str = "float32", **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A row of the sweep, stock's where the setting is None."""
    row = _common("forced", setting, v_block_tokens, dense_layers, dtype)
    row |= {
        "items": 4, "forced": 10, "perplexity": 10.0 if setting is None else 10.1,
        "stock_perplexity": 10.0, "perplexity_change": 0.01, "perplexity_change_error": 0.002,
        "kl": 0.01, "kl_error": 0.001, "kl_p99": 0.1, "kl_max": 0.2, "top1_agreement": 0.98,
    }  # fmt: skip
    if setting is not None:
        row |= {"selected_tokens": 400.0, "dropped_mass": [0.01, 0.02]}
    return {**row, **more}


def task_row(setting: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """A row of the tasks."""
    figures = {
        "score": 50.0 if setting is None else 49.0, "stock_score": 50.0, "difference": -1.0,
        "difference_error": 0.5, "answer_logprob_change": -0.01,
        "answer_logprob_change_error": 0.002, "answer_kl": 0.003, "identical": 0.75,
    }  # fmt: skip
    tasks = {task: dict(figures) for task in (*TASKS, EXTRACTION)}
    row = _common("tasks", setting, 8, 0, "float32")
    row |= {
        "items": 20,
        "tasks": {**tasks, CONTINUATION: {"identical": 0.75, "first_difference": 31.2}},
        "average": dict(figures),
    }
    if setting is not None:
        row |= {"selected_tokens": 400.0, "dropped_mass": [0.01, 0.02]}
    return {**row, **more}


def decode_row(
    series: str, context: int, requests: int, asked: int, tokens_per_second: float, **more: Any
) -> dict[str, Any]:
    """A row of whole engines: "stock", "stock-fp8" or "kcache" with recorded selections."""
    engine, _, dtype = series.partition("-")
    split = engine == "kcache"
    run = {"requests": requests, "tokens_per_second": tokens_per_second}
    return {
        "gpu": "GPU", "commit": "abc", "command": "python -m benchmarks.decode llama",
        "model": "llama", "label": "", "engine": engine,
        "kv_cache_dtype": dtype or "auto", "mode": "replay" if split else None,
        "kcache_config": {"coverage": 0.95} if split else None, "context": context,
        "requests_that_fit": 100 if asked else requests, "requests_asked": asked, "runs": [run],
        **more,
    }  # fmt: skip


def hit_row(requests: int, multiple: float, hit_rate: float) -> dict[str, Any]:
    """A row of hit rates."""
    return {
        "gpu": "GPU", "coverage": 0.95, "context": 4096, "requests": requests,
        "multiple_of_selected_set": multiple, "slots_over_selected": multiple, "hit_rate": hit_rate,
    }  # fmt: skip
