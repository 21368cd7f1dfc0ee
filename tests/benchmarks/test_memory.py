# SPDX-License-Identifier: Apache-2.0
"""An engine's memory against its plan (benchmarks/engine/memory.py), with a measured engine's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

import vllm_kcache
from benchmarks.engine import memory
from vllm_kcache.config import KCacheConfig
from vllm_kcache.planner.memory import GIB, Engine, fit_split
from vllm_kcache.planner.shape import read_shape

SHAPE = Path(__file__).resolve().parents[2] / "benchmarks/shapes/llama-3-8b"


@pytest.mark.parametrize(
    ("utilization", "max_num_seqs", "num_blocks", "peak", "host_pool"),
    [
        # H200, k_bits 4: few requests, whose rows all have a slot; memory is left.
        (0.9, 8, 32785, 62762319872, 34914713600),
        # Stock, which takes all that it may.
        (0.9, 8, 56134, 135854358528, 0),
    ],
)
def test_measured_engines_are_as_planned(
    monkeypatch: pytest.MonkeyPatch, utilization: float, max_num_seqs: int, num_blocks: int,
    peak: int, host_pool: int,
) -> None:  # fmt: skip
    total = 150109880320
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=65568),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=8192),
        cache_config=SimpleNamespace(
            num_gpu_blocks=num_blocks, block_size=16, gpu_memory_utilization=utilization
        ),
    )
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))
    monkeypatch.setattr(memory, "gpu_bytes", lambda: {"total": total, "peak": peak})
    monkeypatch.setattr(vllm_kcache, "metrics", lambda llm: {"host_pool_bytes": host_pool})
    split = KCacheConfig(k_bits=4, host_memory_gib=40) if host_pool else None
    before = memory.host_bytes()
    measured = memory.measure_memory(llm, str(SHAPE), split, before, 40 << 30)
    found = memory.against_plan(measured)
    assert all(within for _, within in found.values()), found
    assert {"GPU memory", "blocks"} <= set(found)
    measured["gpu"]["peak"] *= 1.05
    assert "OUT OF BOUNDS" in memory.lines_against_plan("kcache", measured)[0]


@pytest.mark.parametrize(
    ("requests", "longest", "utilization", "measured"),
    [(8, 65568, 0.9, 62762319872), (2, 32800, 0.5, 23956619264)],
)
def test_few_requests_leave_memory_free(
    requests: int, longest: int, utilization: float, measured: int
) -> None:
    """Peaks of two engines of prefill.py (H200, Llama-3-8B shape, k_bits 4): all rows that there
    can be have a slot, and the rest of the GPU's memory is left alone."""
    shape, config = (
        read_shape(str(SHAPE), "bfloat16"),
        KCacheConfig(k_bits=4),
    )
    engine = Engine(longest, requests, 8192, 16, utilization)
    fit = fit_split(shape, engine, 150109880320, 100 * GIB, config)
    assert fit.num_blocks == requests * (longest // 16) + 1
    assert fit.hot_cache_bytes == fit.num_blocks * 32 * 8 * 2 * (2080 + 8)
    assert fit.gpu_bytes == pytest.approx(measured, rel=0.03)
    engine = dataclasses.replace(engine, max_num_seqs=256)
    many = fit_split(shape, engine, 150109880320, 100 * GIB, config)
    assert many.gpu_bytes == pytest.approx(150109880320 * utilization, abs=2 * 2088)
