# SPDX-License-Identifier: Apache-2.0
"""How a worker shares host memory with the other ranks of its machine, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_kcache.config import KCacheConfig, KCacheConfigError
from vllm_kcache.integration import runtime, worker

V_BYTES = K_BYTES = 1 << 20


class Engine:
    """As much of vLLM's worker as memory needs."""

    def determine_available_memory(self) -> int:
        return 1000 * K_BYTES


class Worker(worker.SplitCacheWorker, Engine):
    """One of two ranks of one machine."""

    def __init__(self) -> None:
        self.kcache_config = KCacheConfig()
        parallel = SimpleNamespace(world_size_across_dp=2, nnodes=1)
        self.vllm_config = SimpleNamespace(parallel_config=parallel)

    def get_kv_cache_spec(self) -> dict[str, SimpleNamespace]:
        return {"layer": SimpleNamespace(page_size_bytes=K_BYTES)}


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Bytes that the machine has left, which a test changes."""
    machine = SimpleNamespace(bytes=1200 * V_BYTES)
    monkeypatch.setattr(worker, "host_budget_bytes", lambda gib, ranks: machine.bytes // ranks)
    active = SimpleNamespace(shape=SimpleNamespace(v_bytes_per_page=V_BYTES))
    monkeypatch.setattr(runtime, "current", lambda: active)
    return machine


def test_a_rank_that_pinned_first_takes_nothing_from_the_other(available: SimpleNamespace) -> None:
    first, second = Worker(), Worker()
    assert first.determine_available_memory() == 600 * K_BYTES
    assert second.determine_available_memory() == 600 * K_BYTES
    first._check_host_memory(600)
    available.bytes -= 600 * V_BYTES
    second._check_host_memory(600)


def test_more_blocks_than_the_budget_are_refused(available: SimpleNamespace) -> None:
    rank = Worker()
    rank.determine_available_memory()
    with pytest.raises(KCacheConfigError, match="num_gpu_blocks_override=601: V of that many"):
        rank._check_host_memory(601)


def test_without_a_plan_the_machine_is_asked(available: SimpleNamespace) -> None:
    """num_gpu_blocks_override may go without one."""
    Worker()._check_host_memory(600)
    available.bytes //= 2
    with pytest.raises(KCacheConfigError, match=r"this rank may use 0\.29 GiB"):
        Worker()._check_host_memory(600)
