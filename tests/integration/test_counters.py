# SPDX-License-Identifier: Apache-2.0
"""The file of a worker's figures: what the worker and its GPU write is what the server reads, and
nothing that others put beside it or in its place.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_kcache.cache import HostMemoryError
from vllm_kcache.cache.hot_cache import (
    COUNTER_NAMES,
    COUNTER_WORDS,
    FIRST_DROPPED_BUCKET,
    FIRST_ESTIMATE_BUCKET,
)
from vllm_kcache.integration import counters, gpu_worker
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
    (read,) = counters.read_all("a", 0, 2)
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


def test_how_far_estimates_are_off(folder: Path) -> None:
    written = Counters(counters.path_of("a", 0, 0))
    written.add_estimate_errors(torch.tensor([0.0, 0.01, 0.011, 0.7, 1.0, 3.0, torch.inf]))
    written.add_estimate_errors(torch.tensor([torch.nan, 0.15]))
    written.add_estimate_errors(torch.zeros(0))
    (read,) = counters.read_all("a", 0, 1)
    found = dict(zip(counters.ESTIMATE_BOUNDS, counters.estimate_errors(read), strict=True))
    assert {bound: count for bound, count in found.items() if count} == {
        0.01: 2, 0.02: 1, 0.2: 1, 1.0: 2, 5.0: 1, float("inf"): 2,
    }  # fmt: skip
    assert not counters.dropped_mass(read).any()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings."""
    said: list[str] = []
    monkeypatch.setattr(
        counters.logger, "warning", lambda text, *values: said.append(text % values)
    )
    return said


@pytest.mark.parametrize(("far", "warns"), [(499, False), (501, True)])
def test_estimates_that_are_far_off_are_a_warning_once(
    said: list[str], far: int, warns: bool
) -> None:
    figures = Counters()
    errors = torch.full((10_000,), 0.1)
    errors[:far] = 1.5
    figures.add_estimate_errors(errors[:-1])
    assert not said  # too few yet
    for _ in range(2):
        figures.add_estimate_errors(errors[-1:])
    assert len(said) == warns
    if warns:
        assert "for 5% of the selected blocks" in said[0]
        assert "Set kcache_config.k_bits to 16" in said[0]


def test_what_a_gpu_writes(folder: Path) -> None:
    written = Counters(counters.path_of("a", 0, 0))
    written["eager_decode_steps"] = 2
    words = written.gpu_words(ROW_BYTES)
    assert not words.any()
    words.copy_(torch.arange(100, 100 + COUNTER_WORDS))
    (read,) = counters.read_all("a", 0, 2)
    figures = named(read)
    by_name = {name: 100 + at for at, name in enumerate(COUNTER_NAMES)}
    assert figures["selected_lists"] == by_name["lists"]
    assert figures["selected_blocks"] == by_name["selected"]
    assert figures["hot_cache_hits"] == by_name["hits"]
    assert figures["hot_cache_misses"] == by_name["misses"]
    assert figures["direct_host_reads"] == by_name["direct"]
    assert figures["fetched_bytes"] == (by_name["misses"] + by_name["direct"]) * ROW_BYTES
    assert figures["eager_decode_steps"] == 2
    first, after = 100 + FIRST_DROPPED_BUCKET, 100 + FIRST_ESTIMATE_BUCKET
    assert counters.dropped_mass(read).tolist() == list(range(first, after))
    assert counters.estimate_errors(read).tolist() == list(range(after, 100 + COUNTER_WORDS))


def test_estimates_that_are_far_off_on_a_gpu_are_a_warning_once(said: list[str]) -> None:
    """By what the GPU has written there until now; the worker looks at it every some steps."""
    figures, gpu = Counters(), torch.zeros(COUNTER_WORDS, dtype=torch.int64)
    cache = SimpleNamespace(hot_cache=SimpleNamespace(counters=gpu), eager_decode_steps=0)
    worker: Any = SimpleNamespace(
        split_cache=cache, counters=figures, _counter_words=figures.gpu_words(ROW_BYTES),
        _published=0,
    )  # fmt: skip
    gpu[FIRST_ESTIMATE_BUCKET + 3], gpu[-1] = 9_000, 900
    for _ in range(2 * gpu_worker.LOOK_EVERY):
        gpu_worker.KCacheGPUWorker._publish_counters(worker)
    assert not said  # too few yet
    gpu[-1] = 1_000
    for _ in range(2 * gpu_worker.LOOK_EVERY):
        gpu_worker.KCacheGPUWorker._publish_counters(worker)
    assert len(said) == 1
    assert "for 10% of the selected blocks" in said[0]


def test_a_sum_has_the_least_pool(folder: Path) -> None:
    for rank, blocks in enumerate((70, 60)):
        figures = Counters(counters.path_of("a", 0, rank))
        figures["host_pool_blocks"] = blocks
        figures["fetched_bytes"] = 5
    other = Counters(counters.path_of("a", 1, 0))
    other["fetched_bytes"] = 1000
    total = named(counters.summed(counters.read_all("a", 0, 2)))
    assert total["host_pool_blocks"] == 60
    assert total["fetched_bytes"] == 10


def test_closed_files_are_gone_and_the_figures_are_not(folder: Path) -> None:
    figures = Counters(counters.path_of("a", 0, 0))
    words = figures.gpu_words(ROW_BYTES)
    figures.close()
    assert not list(folder.iterdir())
    assert counters.read_all("a", 0, 2) == []
    words[0] = 7
    assert named(figures.read())["selected_lists"] == 7


def test_a_page_that_is_not_locked_is_a_warning(
    folder: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = Counters(counters.path_of("a", 0, 0))

    def refuse(owner: object, memory: torch.Tensor) -> None:
        raise HostMemoryError("the CUDA driver could not page-lock 4096 bytes")

    monkeypatch.setattr(counters, "page_lock", refuse)
    figures.lock(figures, figures.gpu_words(ROW_BYTES))
    assert len(said) == 1
    assert "could not page-lock 4096 bytes" in said[0]
    assert str(figures.path) in said[0]


# The file.


def test_a_file_is_private_and_its_memory_is_reserved(folder: Path) -> None:
    path = counters.path_of("a", 0, 0)
    before = os.umask(0)
    try:
        Counters(path)
    finally:
        os.umask(before)
    made = path.lstat()
    assert stat.S_ISREG(made.st_mode)
    assert stat.S_IMODE(made.st_mode) == 0o600
    assert made.st_size == counters.FILE_BYTES
    assert made.st_blocks * 512 >= counters.FILE_BYTES


@pytest.mark.parametrize("kind", ["link", "hard link", "dangling link", "file", "folder", "pipe"])
def test_what_lies_at_the_name_is_neither_followed_nor_touched(folder: Path, kind: str) -> None:
    path, other = counters.path_of("a", 0, 0), folder / "other"
    other.write_text("precious")
    plant: dict[str, Callable[[], object]] = {
        "link": lambda: path.symlink_to(other),
        "hard link": lambda: path.hardlink_to(other),
        "dangling link": lambda: path.symlink_to(folder / "nothing"),
        "file": lambda: shutil.move(other, path),
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
    }
    plant[kind]()
    there = sorted(folder.iterdir())
    with pytest.raises(HostMemoryError, match="which holds the counters, cannot be made"):
        Counters(path)
    assert sorted(folder.iterdir()) == there
    assert [found.read_text() for found in there if found.is_file()][:1] == ["precious"]


def test_a_full_folder_is_an_error_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unreserved, the first figure would end the process with SIGBUS."""

    def full(descriptor: int, offset: int, length: int) -> None:
        assert (offset, length) == (0, counters.FILE_BYTES)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(HostMemoryError) as caught:
        Counters(counters.path_of("a", 0, 0))
    assert "(No space left on device)" in str(caught.value)
    assert "docker --shm-size" in str(caught.value)
    assert not list(folder.iterdir())


def test_the_end_of_a_worker_leaves_the_file_of_another(folder: Path) -> None:
    """Somebody has put one of his own where ours was."""
    path = counters.path_of("a", 0, 0)
    first = Counters(path)
    path.rename(folder / "elsewhere")
    second = Counters(path)
    first.close()
    assert path.exists()
    second.close()
    assert not path.exists()


# Several servers.


def test_no_two_servers_have_one_name() -> None:
    names = {counters.new_instance() for _ in range(1000)}
    assert len(names) == 1000
    assert {len(name) for name in names} == {32}


def test_a_server_reads_and_removes_its_own_files(folder: Path) -> None:
    """A has counted 20 tokens; B starts and ends; A still shows 20."""
    a, b = counters.new_instance(), counters.new_instance()
    of_a = Counters(counters.path_of(a, 0, 0))
    of_a["eager_decode_steps"] = 20
    of_b = Counters(counters.path_of(b, 0, 0))
    of_b["eager_decode_steps"] = 3
    assert [named(read)["eager_decode_steps"] for read in counters.read_all(a, 0, 1)] == [20]
    of_b.close()
    counters.remove_all(b)
    assert [named(read)["eager_decode_steps"] for read in counters.read_all(a, 0, 1)] == [20]
    counters.remove_all(a)
    assert counters.read_all(a, 0, 1) == []


def test_an_engine_that_ray_starts_is_found() -> None:
    """vLLM appends the rank of the engine to its configuration's id."""
    name = counters.new_instance()
    assert counters.path_of(f"{name}_dp1", 1, 0) == counters.path_of(name, 1, 0)


def test_only_ranks_of_the_engine_are_read(folder: Path) -> None:
    for rank in range(3):
        Counters(counters.path_of("a", 0, rank))["eager_decode_steps"] = 1
    Counters(counters.path_of("a", 10, 0))["eager_decode_steps"] = 1
    Counters(counters.path_of("a", 1, 0))["eager_decode_steps"] = 1
    assert len(counters.read_all("a", 0, 2)) == 2


# What lies where a rank's file should be.


def _bytes(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def _linked(path: Path) -> None:
    """A file of ours under another name: what is behind a link is never read."""
    elsewhere = path.with_name("elsewhere")
    Counters(elsewhere)["eager_decode_steps"] = 50
    path.symlink_to(elsewhere)


NOT_OURS: dict[str, Callable[[Path], None]] = {
    "folder": lambda path: path.mkdir(),
    "pipe": lambda path: os.mkfifo(path),
    "link": _linked,
    "link to itself": lambda path: path.symlink_to(path),
    "empty": _bytes(b""),
    "too short": _bytes(b"\0" * (counters.FILE_BYTES - 1)),
    "too long": _bytes(b"\0" * (counters.FILE_BYTES + 1)),
    "no numbers": _bytes(b"\xff" * counters.FILE_BYTES),
    "infinite": _bytes(np.full(counters.FILE_BYTES // 8, np.inf).tobytes()),
    "negative": _bytes(np.full(counters.FILE_BYTES // 8, -1.0).tobytes()),
    "huge": _bytes(np.full(counters.FILE_BYTES // 8, 1e300).tobytes()),
}


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(
        counters.logger, "warning_once", lambda text, *values: said.append(text % values)
    )
    return said


@pytest.mark.parametrize("kind", NOT_OURS)
def test_what_is_not_ours_costs_one_rank(kind: str, folder: Path, warnings: list[str]) -> None:
    path = counters.path_of("a", 0, 0)
    NOT_OURS[kind](path)
    Counters(counters.path_of("a", 0, 1))["eager_decode_steps"] = 7
    began = time.monotonic()
    arrays = counters.read_all("a", 0, 2)
    assert time.monotonic() - began < 5
    assert [named(read)["eager_decode_steps"] for read in arrays] == [7]
    (said,) = warnings
    assert f"the counters in {path} cannot be read" in said


def test_a_file_of_another_user_is_not_read(
    folder: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Counters(counters.path_of("a", 0, 0))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert counters.read_all("a", 0, 1) == []
    assert f"it belongs to user {os.getuid()}" in warnings[0]


def test_a_rank_that_is_not_there_is_no_warning(folder: Path, warnings: list[str]) -> None:
    assert counters.read_all("a", 0, 4) == []
    assert warnings == []


# /metrics.


@pytest.mark.parametrize("kind", NOT_OURS)
def test_a_scrape_survives_what_is_not_ours(kind: str, folder: Path, warnings: list[str]) -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    from vllm_kcache.integration import metrics

    NOT_OURS[kind](counters.path_of("a", 0, 0))
    Counters(counters.path_of("a", 0, 1))["eager_decode_steps"] = 7
    Counters(counters.path_of("a", 1, 0))["eager_decode_steps"] = 5
    collector = metrics.KCacheCollector()
    collector.engines = {
        0: metrics._Engine("a", 0, ranks=2),
        1: metrics._Engine("a", 1, ranks=2),
    }
    registry = CollectorRegistry()
    registry.register(collector)
    text = generate_latest(registry).decode()
    assert 'vllm_kcache_eager_decode_steps_total{engine="0"} 7.0' in text
    assert 'vllm_kcache_eager_decode_steps_total{engine="1"} 5.0' in text


def test_blocks_in_use_are_known_where_all_layers_share_a_pool(folder: Path) -> None:
    """vLLM's usage is of the fuller of two pools where the model has window layers."""
    from vllm_kcache.integration import metrics

    for index in range(2):
        Counters(counters.path_of("a", index, 0))["host_pool_blocks"] = 101
    collector = metrics.KCacheCollector()
    collector.engines = {
        index: metrics._Engine("a", index, ranks=1, one_pool=index == 0) for index in range(2)
    }
    for engine in collector.engines.values():
        engine.usage = 0.25
    pool = next(iter(collector.collect()))
    assert [(s.labels["engine"], s.labels["state"], s.value) for s in pool.samples] == [
        ("0", "total", 101), ("0", "used", 25), ("1", "total", 101)
    ]  # fmt: skip
