# SPDX-License-Identifier: Apache-2.0
"""The file of a worker's figures: what the worker and its GPU write is what the server reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_kcache.cache import HostMemoryError
from vllm_kcache.cache.hot_cache import COUNTER_NAMES, COUNTER_WORDS, FIRST_DROPPED_BUCKET
from vllm_kcache.integration import counters
from vllm_kcache.integration.counters import SCALARS, Counters

ROW_BYTES = 2048


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(counters, "directory", lambda: tmp_path)
    return tmp_path


def named(values: np.ndarray) -> dict[str, float]:
    return dict(zip(SCALARS, values.tolist(), strict=False))


def test_what_a_cpu_counts(folder: Path) -> None:
    written = Counters(counters.path_of("a", 0, 0))
    counts = torch.tensor([[3, 0], [5, 1]], dtype=torch.int32)
    mass = torch.tensor([[1.0, 0.0], [0.5, 0.999]])
    written.add_selection(counts, mass, ROW_BYTES)
    (read,) = counters.read_all("a", 0)
    figures = named(read)
    assert figures["selected_lists"] == 3
    assert figures["selected_blocks"] == 9
    assert figures["fetched_bytes"] == 9 * ROW_BYTES
    assert figures["decode_layer_steps"] == 1
    dropped = dict(zip(counters.DROPPED_BOUNDS, counters.dropped_mass(read), strict=True))
    least, half = counters.DROPPED_BOUNDS[0], min(b for b in dropped if b >= 0.5)
    thousandth = min(bound for bound in dropped if bound >= 0.001)
    assert {bound for bound, lists in dropped.items() if lists} == {least, half, thousandth}
    np.testing.assert_array_equal(read, written.read())


def test_what_a_gpu_writes(folder: Path) -> None:
    written = Counters(counters.path_of("a", 0, 0))
    written["eager_decode_steps"] = 2
    words = written.gpu_words(ROW_BYTES)
    assert not words.any()
    words.copy_(torch.arange(100, 100 + COUNTER_WORDS))
    (read,) = counters.read_all("a", 0)
    figures = named(read)
    by_name = {name: 100 + at for at, name in enumerate(COUNTER_NAMES)}
    assert figures["selected_lists"] == by_name["lists"]
    assert figures["selected_blocks"] == by_name["selected"]
    assert figures["hot_cache_hits"] == by_name["hits"]
    assert figures["hot_cache_misses"] == by_name["misses"]
    assert figures["direct_host_reads"] == by_name["direct"]
    assert figures["fetched_bytes"] == (by_name["misses"] + by_name["direct"]) * ROW_BYTES
    assert figures["eager_decode_steps"] == 2
    first = 100 + FIRST_DROPPED_BUCKET
    assert counters.dropped_mass(read).tolist() == list(range(first, 100 + COUNTER_WORDS))


def test_a_sum_has_the_least_pool(folder: Path) -> None:
    for rank, blocks in enumerate((70, 60)):
        figures = Counters(counters.path_of("a", 0, rank))
        figures["host_pool_blocks"] = blocks
        figures["fetched_bytes"] = 5
    other = Counters(counters.path_of("a", 1, 0))
    other["fetched_bytes"] = 1000
    total = named(counters.summed(counters.read_all("a", 0)))
    assert total["host_pool_blocks"] == 60
    assert total["fetched_bytes"] == 10


def test_closed_files_are_gone_and_the_figures_are_not(folder: Path) -> None:
    figures = Counters(counters.path_of("a", 0, 0))
    words = figures.gpu_words(ROW_BYTES)
    figures.close()
    assert not list(folder.iterdir())
    assert counters.read_all("a", 0) == []
    words[0] = 7
    assert named(figures.read())["selected_lists"] == 7


def test_a_page_that_is_not_locked_is_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = Counters(counters.path_of("a", 0, 0))

    def refuse(owner: object, memory: torch.Tensor) -> None:
        raise HostMemoryError("the CUDA driver could not page-lock 4096 bytes")

    said: list[str] = []
    monkeypatch.setattr(counters, "page_lock", refuse)
    monkeypatch.setattr(
        counters.logger, "warning", lambda text, *values: said.append(text % values)
    )
    figures.lock(figures, figures.gpu_words(ROW_BYTES))
    assert len(said) == 1
    assert "could not page-lock 4096 bytes" in said[0]
    assert str(figures.path) in said[0]
