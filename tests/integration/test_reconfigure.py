# SPDX-License-Identifier: Apache-2.0
"""What may change while an engine runs, without an engine (with one: test_accuracy.py)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.config import KCacheConfig, KCacheConfigError
from vllm_kcache.integration.counters import Counters
from vllm_kcache.integration.reconfigure import reconfigure
from vllm_kcache.integration.worker import SplitCacheWorker
from vllm_kcache.split_cache import CPUSplitCache
from vllm_kcache.split_cache_gpu import GPUSplitCache, PrefillKernels

SHAPE = CacheShape(1, 2, 2, 64, 32, 8, torch.float32)


def split_cache(dtype: torch.dtype = torch.float32, **settings: Any) -> CPUSplitCache:
    config = KCacheConfig.from_user(settings)
    shape = replace(SHAPE, dtype=dtype)
    made = CPUSplitCache(config, shape, Counters(), torch.device("cpu"))
    made.allocate(4)
    return made


def test_the_selection_changes() -> None:
    made = split_cache(v_block_tokens=8)
    in_force = made.reconfigure({"top_n": 64, "head_combine": "max", "sink_tokens": 16})
    assert in_force == made.config
    assert (made.selection.top_n, made.selection.coverage) == (64, None)
    assert (made.selection.combine, made.selection.sink_blocks) == ("max", 2)
    assert made.config.v_block_tokens == 8


def test_what_is_not_given_takes_its_default() -> None:
    made = split_cache(coverage=0.9, sink_tokens=32)
    made.reconfigure({"coverage": 0.7, "tail": "renormalize"})
    made.reconfigure({})
    assert made.selection == split_cache().selection
    assert made.config.resolved_tail == "clip"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"v_block_tokens": 16}, r"v_block_tokens=16: needs a new engine; .* 8\."),
        ({"k_bits": 16}, "k_bits=16: needs a new engine; this one runs with 4"),
        ({"host_dtype": "int8"}, "host_dtype='int8': needs a new engine; .* 'model'"),
        ({"prefill": "xformers"}, "prefill='xformers': needs a new engine; .* 'torch'"),
        ({"dense_layers": 1}, "dense_layers=1: needs a new engine"),
        ({"hot_cache_gib": 1.0}, "hot_cache_gib=1.0: needs a new engine"),
        ({"top_m": 3}, "top_m"),
        ({"coverage": 2.0}, "coverage=2.0"),
        ({"top_n": 2}, "top_n=2: must be at least"),
    ],
)
def test_refusals_change_nothing(settings: dict[str, Any], message: str) -> None:
    made = split_cache(v_block_tokens=8)
    before = made.config, made.selection
    with pytest.raises(KCacheConfigError, match=message):
        made.reconfigure({"coverage": 0.5, **settings})
    assert (made.config, made.selection) == before


def test_values_of_the_start_may_be_repeated() -> None:
    made = split_cache(v_block_tokens=8, dense_layers=(0,))
    made.reconfigure({"v_block_tokens": 8, "dense_layers": [0], "coverage": 0.5})
    assert made.selection.coverage == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_is_the_value_that_it_means(dtype: torch.dtype) -> None:
    """In both directions; of memory it is no value that could be given."""
    values = {
        "k_bits": 4, "host_dtype": "int8" if dtype.itemsize == 2 else "model",
        "v_block_tokens": 8, "prefill": "torch", "dense_layers": 2,
    }  # fmt: skip
    autos = dict.fromkeys(values, "auto") | {"dense_layers": [1, 0]}
    for started, given in ((autos, values), (values, autos), ({"dense_layers": 2}, values)):
        made = split_cache(dtype, **started)
        made.reconfigure({**given, "coverage": 0.5})
        assert made.selection.coverage == 0.5
    for key in ("hot_cache_gib", "host_memory_gib"):
        with pytest.raises(KCacheConfigError, match=f"{key}=1.0: needs .* 'auto'"):
            split_cache(dtype).reconfigure({key: 1.0})


def test_a_gpu_names_the_kernel_of_prompts_that_it_chose() -> None:
    made = object.__new__(GPUSplitCache)
    made.prefill = PrefillKernels("flash_attn", None, None)  # type: ignore[arg-type]
    made.shape = SHAPE
    settings = [
        made._settings_of_start(KCacheConfig(prefill=name)) for name in ("auto", "flash_attn")
    ]
    assert settings[0] == settings[1]
    assert settings[0]["prefill"] == "flash_attn"


def test_lists_do_not_grow_past_the_cap_of_the_start() -> None:
    made = split_cache(top_n=64)
    made.reconfigure({"top_n": 64, "coverage": 0.9})
    for settings in ({"top_n": 65}, {"top_n": "all"}, {"coverage": 0.9}):
        with pytest.raises(KCacheConfigError, match="top_n=64"):
            made.reconfigure(settings)
    everything = split_cache(top_n="all")
    everything.reconfigure({"top_n": 500})
    everything.reconfigure({"top_n": "all"})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("eager", [True, False])
def test_the_worker_refuses_what_graphs_hold(device: str, eager: bool) -> None:
    made = split_cache()
    config = SimpleNamespace(
        device_config=SimpleNamespace(device_type=device),
        model_config=SimpleNamespace(enforce_eager=eager),
    )
    worker = SimpleNamespace(vllm_config=config, split_cache=made)
    if device == "cuda" and not eager:
        with pytest.raises(KCacheConfigError, match="enforce_eager=True"):
            SplitCacheWorker.kcache_reconfigure(worker, {"coverage": 0.5})
        assert made.selection == split_cache().selection
    else:
        in_force = SplitCacheWorker.kcache_reconfigure(worker, {"coverage": 0.5})
        assert in_force == {"coverage": 0.5}
        assert made.selection.coverage == 0.5


class FakeLLM:
    """Only what `reconfigure` asks of an LLM."""

    def __init__(self, settings: dict[str, Any] | None, busy: bool, emptied: bool) -> None:
        additional = {} if settings is None else {"kcache": settings}
        self.llm_engine = SimpleNamespace(
            vllm_config=SimpleNamespace(additional_config=additional),
            has_unfinished_requests=lambda: busy,
        )
        self.emptied = emptied
        self.calls: list[Any] = []

    def collective_rpc(self, method: str, args: tuple) -> list[Any]:
        self.calls.append((method, args))
        return [args[0]]

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        return self.emptied


def test_the_prefix_cache_is_emptied_unless_kept() -> None:
    settings = {"coverage": 0.5}
    for kept in (False, True):
        llm = FakeLLM({}, busy=False, emptied=True)
        assert reconfigure(llm, settings, keep_prefix_cache=kept) == settings
        assert llm.calls == [("kcache_reconfigure", (settings,)), *([] if kept else ["reset"])]


@pytest.mark.parametrize(
    ("llm", "message"),
    [
        (FakeLLM(None, busy=False, emptied=True), "without kv_backend"),
        (FakeLLM({}, busy=True, emptied=True), "requests are running"),
        (FakeLLM({}, busy=False, emptied=False), "could not be emptied"),
    ],
)
def test_reconfigure_refuses(llm: FakeLLM, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        reconfigure(llm, {"coverage": 0.5})
