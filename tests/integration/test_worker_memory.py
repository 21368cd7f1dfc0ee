# SPDX-License-Identifier: Apache-2.0
"""How a worker sizes the host pool, by the blocks that vLLM will have and beside the other ranks of
its machine. Without an engine."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.config import KCacheConfig, KCacheConfigError
from vllm_kcache.integration import cpu_worker, worker
from vllm_kcache.integration.settings import note_engines_on_host
from vllm_kcache.memory import GPUMemory, StepLimits, WindowPool

V_BYTES = K_BYTES = 1 << 20
PAGE_TOKENS = 16


class Engine:
    """As much of vLLM's worker as memory needs."""

    def load_model(self) -> None:
        pass

    def reload_weights(self, *args: Any) -> None:
        self.reloaded = args

    def shutdown(self) -> None:
        """Nothing that memory needs."""

    def determine_available_memory(self) -> int:
        return 1000 * K_BYTES


class Worker(worker.SplitCacheWorker, Engine):
    """One of two ranks of one machine."""

    def __init__(
        self, engines: int = 1, max_model_len: int = 1024, max_num_seqs: int = 256, **settings: Any
    ) -> None:
        self.kcache_config = KCacheConfig.from_user(settings)
        shape = SimpleNamespace(
            host_page_bytes=V_BYTES, page_tokens=PAGE_TOKENS, k_bits=16,
            row=SimpleNamespace(has_keys=False),
            dtype=torch.bfloat16,
        )  # fmt: skip
        self.split_cache = SimpleNamespace(shape=shape)  # type: ignore[assignment]
        parallel = SimpleNamespace(
            local_world_size=2, data_parallel_size_local=engines, tensor_parallel_size=1
        )
        self.vllm_config = SimpleNamespace(
            parallel_config=parallel,
            additional_config={},
            instance_id="none",
            cache_config=SimpleNamespace(num_gpu_blocks_override=None, kv_cache_memory_bytes=None),
            model_config=SimpleNamespace(
                max_model_len=max_model_len, original_max_model_len=max_model_len
            ),
            scheduler_config=SimpleNamespace(
                max_num_seqs=max_num_seqs, max_num_batched_tokens=8192
            ),
            device_config=SimpleNamespace(device_type="cuda"),
        )
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


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the worker logs."""
    lines: list[str] = []
    monkeypatch.setattr(worker.logger, "info", lambda text, *values: lines.append(text % values))
    return lines


@pytest.mark.parametrize(
    ("host_pages", "max_num_seqs", "limit"),
    [
        (
            600,
            256,
            "host memory. More host memory, or a larger kcache_config.host_memory_gib, lets",
        ),
        (1200, 256, "GPU memory. A larger --gpu-memory-utilization (or --kv-cache-memory-bytes,"),
        (1200, 9, "max_num_seqs. That many requests of max_model_len fit. Only a larger --max-num"),
    ],
)
def test_the_log_says_what_fits_and_what_limits_it(
    available: SimpleNamespace,
    logged: list[str],
    monkeypatch: pytest.MonkeyPatch,
    host_pages: int,
    max_num_seqs: int,
    limit: str,
) -> None:
    """Of max_model_len, 64 pages, and of 4096 tokens, 256; vLLM keeps one page."""
    available.bytes = 2 * host_pages * V_BYTES
    useful = 64 * max_num_seqs + 1
    # As a GPU plans pages (vllm_kcache/memory.py): no more than requests can use.
    plain = Worker._device_pages
    monkeypatch.setattr(
        Worker, "_device_pages", lambda self, *sizes: min(plain(self, *sizes), useful)
    )
    pages = Worker(max_num_seqs=max_num_seqs).determine_available_memory() // K_BYTES
    assert pages == min(1000, host_pages, useful)
    fits, limited = logged
    assert f"{pages} blocks. At once fit {(pages - 1) / 64:.1f} requests of max_model" in fits
    assert f"{(pages - 1) / 256:.1f} of 4096 tokens" in fits
    assert limited.startswith(f"KCache: requests are limited by {limit}")


def test_more_blocks_than_the_budget_are_refused(available: SimpleNamespace) -> None:
    rank = Worker()
    rank.determine_available_memory()
    with pytest.raises(KCacheConfigError, match="num_gpu_blocks_override=601: the rows of"):
        rank._check_host_memory(601)


def test_without_a_plan_the_machine_is_asked(available: SimpleNamespace) -> None:
    """num_gpu_blocks_override may go without one."""
    Worker()._check_host_memory(600)
    available.bytes //= 2
    with pytest.raises(KCacheConfigError, match=r"this rank may use 0\.29 GiB"):
        Worker()._check_host_memory(600)


# One request of max_model_len.


@pytest.fixture
def small_group(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine whose control group leaves some bytes, which a test changes."""
    group = SimpleNamespace(bytes=0)
    # The folder gives the function of the same name.
    module = importlib.import_module("vllm_kcache.cache.host_memory")
    monkeypatch.setattr(module, "host_memory", lambda root: module.HostMemory(2**40, group.bytes))
    return group


# 64 pages of 16 tokens, and the one that vLLM keeps: of two ranks.
ONE_REQUEST = 2 * 65 * V_BYTES


@pytest.mark.parametrize("gib", [0.0001, 0.02])
def test_a_number_too_small_for_one_request_names_itself(
    small_group: SimpleNamespace, gib: float
) -> None:
    small_group.bytes = 2**40
    with pytest.raises(KCacheConfigError) as caught:
        Worker(host_memory_gib=gib).determine_available_memory()
    text = str(caught.value)
    assert text == (
        f"kcache_config.host_memory_gib={gib}: one request of max_model_len=1024 needs 0.127 GiB "
        "of host memory; set it to that at least, or lower --max-model-len"
    )
    # What it says is enough, and no more than that.
    assert Worker(host_memory_gib=0.127).determine_available_memory() == 65 * K_BYTES
    with pytest.raises(KCacheConfigError):
        Worker(host_memory_gib=0.1269).determine_available_memory()


def test_too_small_a_control_group_is_named(small_group: SimpleNamespace) -> None:
    small_group.bytes = int(ONE_REQUEST / 0.85) - 4096
    with pytest.raises(KCacheConfigError) as caught:
        Worker().determine_available_memory()
    assert str(caught.value) == (
        "kcache_config.host_memory_gib='auto': one request of max_model_len=1024 needs 0.15 GiB of "
        "host memory to be available, but the memory limit of this control group leaves 0.15 GiB: "
        "raise that limit (docker --memory, MemoryMax=), or lower --max-model-len"
    )
    small_group.bytes = int(ONE_REQUEST / 0.85) + 4096
    assert Worker().determine_available_memory() == 65 * K_BYTES


def test_engines_count_towards_what_one_request_needs(small_group: SimpleNamespace) -> None:
    small_group.bytes = 2**40
    with pytest.raises(KCacheConfigError, match=r"needs 0\.2540 GiB|needs 0\.254 GiB"):
        Worker(engines=2, host_memory_gib=0.02).determine_available_memory()


def test_a_length_that_vllm_chooses_is_left_to_it(small_group: SimpleNamespace) -> None:
    """--max-model-len -1: the longest that fits, be it one page."""
    small_group.bytes = 2**40
    rank = Worker(host_memory_gib=0.02)
    rank.vllm_config.model_config.original_max_model_len = -1
    assert rank.determine_available_memory() == 10 * K_BYTES
    rank = Worker(host_memory_gib=0.0001)
    rank.vllm_config.model_config.original_max_model_len = -1
    with pytest.raises(KCacheConfigError, match="one request of max_model_len=1 needs 0"):
        rank.determine_available_memory()


def test_blocks_that_are_given_are_checked_when_they_are_made(small_group: SimpleNamespace) -> None:
    small_group.bytes = 2**40
    rank = Worker(host_memory_gib=0.02)
    rank.vllm_config.cache_config.num_gpu_blocks_override = 100
    rank.determine_available_memory()
    with pytest.raises(KCacheConfigError, match="num_gpu_blocks_override=100"):
        rank._check_host_memory(100)


class CPURank(Worker, cpu_worker.KCacheCPUWorker):
    """The CPU's share, on the memory of `Engine`."""

    def determine_available_memory(self) -> int:
        return worker.SplitCacheWorker.determine_available_memory(self)


@pytest.mark.parametrize("explicit", [None, 1000 * K_BYTES])
def test_on_a_cpu_k_and_v_share_what_is_left(
    small_group: SimpleNamespace, explicit: int | None
) -> None:
    """vLLM offers K far more than the control group leaves for both."""
    small_group.bytes = 400 * K_BYTES
    rank = CPURank()
    rank.vllm_config.device_config.device_type = "cpu"
    rank.vllm_config.cache_config.kv_cache_memory_bytes = explicit
    pages = rank.determine_available_memory() // K_BYTES
    assert pages == int(400 * K_BYTES * 0.85) // 2 // (K_BYTES + V_BYTES) == 85


def test_on_a_cpu_too_small_a_group_is_named(small_group: SimpleNamespace) -> None:
    small_group.bytes = ONE_REQUEST
    with pytest.raises(
        KCacheConfigError, match=r"needs 0\.30 GiB.*this control group leaves 0\.13"
    ):
        CPURank().determine_available_memory()


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (None, "kcache_config.hot_cache_gib, or raise --gpu-memory-utilization."),
        (2**30, "Lower kcache_config.hot_cache_gib, or raise --kv-cache-memory-bytes."),
    ],
)
@pytest.mark.parametrize("available", [2**30, 0, -(2**20)])
def test_a_gpu_without_room_for_a_page(available: int, given: int | None, remedy: str) -> None:
    """A hot cache that takes all there is, or nothing left at all: never a negative number."""
    gpu_worker = importlib.import_module("vllm_kcache.integration.gpu_worker")
    rank = Worker(hot_cache_gib=1.0)
    shape = CacheShape(1, 2, 2, 64, 16, 8, torch.float16)
    memory = GPUMemory(
        shape, rank.kcache_config.selection(shape.block_tokens), StepLimits(4, 64, 1024)
    )
    rank.split_cache = SimpleNamespace(shape=shape, memory=memory, hot_slots=None)
    rank.vllm_config.cache_config.kv_cache_memory_bytes = given
    with pytest.raises(KCacheConfigError) as caught:
        gpu_worker.KCacheGPUWorker._device_pages(rank, available, K_BYTES, V_BYTES)
    assert str(caught.value).startswith(f"kcache: {available / 2**30:.2f} GiB of GPU memory")
    assert str(caught.value).endswith(remedy)
    assert rank.split_cache.hot_slots is None
    pages = gpu_worker.KCacheGPUWorker._device_pages(rank, 2**31, K_BYTES, V_BYTES)
    assert 0 < pages < 2**30 // K_BYTES
    assert rank.split_cache.hot_slots == 2**30 // memory.slot_bytes


# Beside window layers.


def windows(monkeypatch: pytest.MonkeyPatch, most: int = 40) -> WindowPool:
    """Half a page's bytes a block; 8 blocks of a request of 32 pages, and 5 of a step."""
    window = WindowPool(
        K_BYTES // 2, K_BYTES, 8, 5, request_pages=32, longest_pages=64, max_requests=most
    )
    monkeypatch.setattr(worker.pools, "window_pool", lambda config, specs: window)
    return window


@pytest.mark.parametrize("most", [40, 3])
@pytest.mark.parametrize("host_pages", [600, 10**6])
def test_both_pools_are_in_what_the_device_has(
    available: SimpleNamespace,
    logged: list[str],
    monkeypatch: pytest.MonkeyPatch,
    host_pages: int,
    most: int,
) -> None:
    window = windows(monkeypatch, most)
    available.bytes = 2 * host_pages * V_BYTES
    given = Worker().determine_available_memory()
    blocks, pages = window.divide(given)
    assert given == window.bytes_for(pages) <= 1000 * K_BYTES
    if host_pages == 600:
        assert pages == 600
    else:
        # Nor would a page more fit, and what goes with it.
        assert window.bytes_for(pages) > 998 * K_BYTES
    assert (blocks == 5 + 8 * most) == (most == 3)
    fits, beside, _ = logged
    long, short = window.requests(pages, 64), window.requests(pages, 256)
    assert f"{pages} blocks. At once fit {long:.1f} requests of max_model" in fits
    assert f"{short:.1f} of 4096 tokens" in fits
    assert f"{blocks * window.block_bytes / 2**30:.2f} GiB on the device: {blocks} blocks" in beside
    assert beside.endswith(f"of {(blocks - 5) / 8:.1f} requests.")


def test_ranks_take_the_least_of_them(
    available: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = windows(monkeypatch)
    available.bytes = 10**6 * V_BYTES
    rank = Worker()
    alone = rank.determine_available_memory()

    def reduce(value: torch.Tensor, operation: Any, group: Any) -> None:
        assert (operation, group) == (torch.distributed.ReduceOp.MIN, "of the ranks")
        value.clamp_(max=window.bytes_for(500))

    rank.vllm_config.parallel_config.tensor_parallel_size = 2
    monkeypatch.setattr(worker, "get_tp_group", lambda: SimpleNamespace(cpu_group="of the ranks"))
    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    assert alone > rank.determine_available_memory() == window.bytes_for(500)


def test_a_device_without_room_for_one_request(
    available: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM knows of the blocks of window layers only."""
    windows(monkeypatch)
    available.bytes = 10**6 * V_BYTES
    rank = Worker(max_model_len=1024)
    # 65 pages, 21 blocks; a page takes an eighth of a page's bytes besides.
    monkeypatch.setattr(Engine, "determine_available_memory", lambda self: 76 * K_BYTES)
    assert rank.determine_available_memory() == 65 * K_BYTES + 21 * K_BYTES // 2
    monkeypatch.setattr(Engine, "determine_available_memory", lambda self: 75 * K_BYTES)
    with pytest.raises(KCacheConfigError, match=r"max_model_len=1024 needs more than 0\.07 GiB"):
        rank.determine_available_memory()


def test_an_override_of_window_blocks_is_checked_by_its_pages(available: SimpleNamespace) -> None:
    rank = Worker()
    rank.determine_available_memory()
    with pytest.raises(KCacheConfigError, match="override=40: the rows of 601 pages beside"):
        rank._check_host_memory(601, 40)


def load_one_layer(monkeypatch: pytest.MonkeyPatch, rank: Worker) -> list[int]:
    """What `load_model` makes of a model of one layer: page tokens of each cache."""
    cache = rank.vllm_config.cache_config = SimpleNamespace(block_size=16)
    monkeypatch.setattr(
        worker.current_platform,
        "update_block_size_for_backend",
        lambda config: setattr(config.cache_config, "block_size", 128),
    )
    rank.get_kv_cache_spec = lambda: {  # type: ignore[method-assign]
        "layer": SimpleNamespace(block_size=cache.block_size)
    }
    monkeypatch.setattr(worker, "_settings", lambda config: rank.kcache_config)
    monkeypatch.setattr(worker, "split_layers", lambda config, settings: ["layer"])
    monkeypatch.setattr(worker, "get_layers_from_vllm_config", lambda config, kind: {})
    monkeypatch.setattr(
        worker,
        "cache_shape_of",
        lambda config, settings, specs, names: SimpleNamespace(
            page_tokens=specs["layer"].block_size, k_bits=settings.resolved_k_bits
        ),
    )
    monkeypatch.setattr(worker.counters, "Counters", lambda path: None)
    made: list[int] = []

    def make(self: Worker, shape: Any) -> Any:
        made.append(shape.page_tokens)
        return SimpleNamespace(shape=shape, k_stats=[])

    monkeypatch.setattr(Worker, "_make_cache", make)
    rank.rank = 0
    rank.vllm_config.parallel_config.data_parallel_index = 0
    rank.load_model()
    return made


def test_pages_have_the_block_size_that_the_executor_sets_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM may leave the block size to the attention backend, after the model is loaded."""
    assert load_one_layer(monkeypatch, Worker(k_bits=16)) == [128]


@pytest.mark.parametrize(
    ("k_bits", "load_format", "warns"), [(4, "dummy", 1), (4, "auto", 0), (16, "dummy", 0)]
)
def test_k_of_random_weights_is_a_warning(
    k_bits: int, load_format: str, warns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank, said = Worker(k_bits=k_bits), []
    rank.model_runner = rank.device = None  # type: ignore[attr-defined, assignment]
    rank.vllm_config.load_config = SimpleNamespace(load_format=load_format)
    monkeypatch.setattr(worker, "calibrate", lambda *arguments: ["measured"])
    monkeypatch.setattr(worker.logger, "warning", said.append)
    load_one_layer(monkeypatch, rank)
    assert rank.split_cache.k_stats == (["measured"] if k_bits == 4 else [])
    assert len(said) == warns
    if warns:
        assert "load_format 'dummy' with k_bits 4: K was measured of random weights" in said[0]


def test_other_weights_are_refused_where_k_was_measured() -> None:
    rank = Worker()
    rank.reload_weights("here")
    assert rank.reloaded == ("here",)
    rank.split_cache.shape.k_bits = 4  # type: ignore[misc]
    with pytest.raises(KCacheConfigError, match="does not support reload_weights: with k_bits 4"):
        rank.reload_weights("there")
    assert rank.reloaded == ("here",)


def test_the_pool_ends_with_the_worker() -> None:
    """One that failed before its model was loaded has none."""
    rank, closed = Worker(), []
    rank.split_cache.close = lambda: closed.append(True)
    rank.shutdown()
    assert closed == [True]
    del rank.split_cache
    rank.shutdown()
