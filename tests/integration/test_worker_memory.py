# SPDX-License-Identifier: Apache-2.0
"""How a worker sizes the host pool, by the blocks that vLLM will have and beside the other ranks of
its machine. Without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_kcache.config import KCacheConfig, KCacheConfigError
from vllm_kcache.integration import runtime, worker
from vllm_kcache.integration.settings import note_engines_on_host

V_BYTES = K_BYTES = 1 << 20


class Engine:
    """As much of vLLM's worker as memory needs."""

    def determine_available_memory(self) -> int:
        return 1000 * K_BYTES


class Worker(worker.SplitCacheWorker, Engine):
    """One of two ranks of one machine."""

    def __init__(self, engines: int = 1) -> None:
        self.kcache_config = KCacheConfig()
        parallel = SimpleNamespace(local_world_size=2, data_parallel_size_local=engines)
        self.vllm_config = SimpleNamespace(parallel_config=parallel, additional_config={})
        note_engines_on_host(self.vllm_config)
        # As vLLM does in each engine of a model without experts.
        parallel.data_parallel_size_local = 1

    def get_kv_cache_spec(self) -> dict[str, SimpleNamespace]:
        return {"layer": SimpleNamespace(page_size_bytes=K_BYTES)}


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Bytes that the machine has left, which a test changes."""
    machine = SimpleNamespace(bytes=1200 * V_BYTES)
    monkeypatch.setattr(
        worker,
        "host_budget_bytes",
        lambda gib, ranks, engines: machine.bytes // (ranks * engines),
    )
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


def test_engines_of_one_server_share(available: SimpleNamespace) -> None:
    assert Worker(engines=3).determine_available_memory() == 200 * K_BYTES


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


def test_pages_have_the_block_size_that_the_executor_sets_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM may leave the block size to the attention backend, after the model is loaded."""
    rank = Worker()
    cache = rank.vllm_config.cache_config = SimpleNamespace(block_size=16)
    monkeypatch.setattr(
        worker.current_platform,
        "update_block_size_for_backend",
        lambda config: setattr(config.cache_config, "block_size", 128),
    )
    rank.get_kv_cache_spec = lambda: {  # type: ignore[method-assign]
        "layer": SimpleNamespace(block_size=cache.block_size)
    }
    monkeypatch.setattr(
        worker.runtime, "page_shape_of", lambda config, specs, split: specs["layer"].block_size
    )
    monkeypatch.setattr(worker.counters, "instance_of", lambda config: "none")
    monkeypatch.setattr(worker.counters, "Counters", lambda path: None)
    monkeypatch.setattr(worker.runtime, "start", lambda started: None)
    made: list[int] = []
    monkeypatch.setattr(
        Worker, "_make_runtime", lambda self, config, shape, figures: made.append(shape)
    )
    rank.rank, rank._split_layers = 0, ["layer"]
    rank.vllm_config.parallel_config.data_parallel_index = 0
    rank._start_runtime()
    assert made == [128]
