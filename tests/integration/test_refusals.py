# SPDX-License-Identifier: Apache-2.0
"""Every refusal, by its message: the feature, its value, what to do. And nothing else is refused.

Configurations are vLLM's own, made from folders that hold a config.json only. Where vLLM itself
stops a combination on this machine, the field is set on a finished configuration.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch

from tests.integration.refusal_cases import CASES, FREE, NGRAM, PREFIX
from vllm_kcache.config import KCacheConfig, KCacheConfigError

pytestmark = pytest.mark.usefixtures("quick_vllm")


def engine_args(folder: str, **arguments: Any) -> Any:
    from vllm import EngineArgs

    return EngineArgs(model=folder, skip_tokenizer_init=True, load_format="dummy", **arguments)


def stock_config(folder: str, **arguments: Any) -> Any:
    """vLLM's configuration, without our backend."""
    return engine_args(folder, **arguments).create_engine_config()


def messages(vllm_config: Any, **settings: Any) -> list[str]:
    from vllm_kcache.integration import refusals

    return list(refusals.found(vllm_config, KCacheConfig.from_user(settings)))


SNAPSHOT = "snapshots ({value})"  # test_snapshot_is_refused


def test_every_entry_has_a_case() -> None:
    from vllm_kcache.integration.refusals import REFUSALS

    for names in ([r.feature for r in REFUSALS], [r.name for r in REFUSALS]):
        assert len(names) == len(set(names))
    entries = {refusal.feature for refusal in REFUSALS if refusal.value is not None}
    assert entries == {case.entry for case in CASES.values()} | {SNAPSHOT}
    # Those of test_what_the_plugin_sets_itself; those of test_layer_refusals.py, and that of
    # test_worker_memory.py.
    assert {r.name for r in REFUSALS if r.argument is not None} == {
        "attention_backend", "backend_per_kind", "worker_cls"
    }  # fmt: skip
    assert {r.name for r in REFUSALS if r.argument is None and r.value is None} == {
        "attention_type", "derived_backend", "not_causal", "output_quantisation",
        "kv_cache_groups", "layer_shapes", "v_head_size", "layer_query_heads", "shared_cache",
        "reload_weights", "window_layer", "draft_windows", "draft_shares",
    }  # fmt: skip


def test_every_entry_has_a_reason_and_a_way_out() -> None:
    from vllm_kcache.integration import refusals

    for refusal in refusals.REFUSALS:
        with pytest.raises(KCacheConfigError) as caught:
            refusals.refuse(refusal.name, "this value")
        text = str(caught.value)
        assert text.startswith(PREFIX + refusal.feature.format(value="this value") + ": ")
        assert text.endswith(f": {refusal.reason}. {refusal.remedy}")
        assert refusal.remedy.endswith(".")
        assert not refusal.reason.endswith(".")


def test_an_unknown_entry_is_a_mistake_of_ours() -> None:
    from vllm_kcache.integration import refusals

    with pytest.raises(ValueError, match="unpack"):
        refusals.refuse("no such entry")


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, folders: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    # Taken from vLLM once, before the variable: with it, vLLM refuses the CPU before we can.
    vllm_config = changed(stock_config(folders(case.model), **case.arguments), case.changed)
    for variable, value in case.variables.items():
        monkeypatch.setenv(variable, value)
    every = messages(vllm_config, **case.settings)
    found = [text for text in every if text.startswith(PREFIX + case.expected)]
    assert len(found) == 1, every
    assert case.remedy in found[0]


def changed(vllm_config: Any, changes: dict[str, Any]) -> Any:
    """A configuration with some fields set. A field that vLLM has renamed is an error."""
    vllm_config = copy.deepcopy(vllm_config)
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        owner = vllm_config
        for name in path:
            owner = getattr(owner, name)
        # Hugging Face configurations take any attribute; vLLM's have theirs.
        assert hasattr(owner, last) or "hf_text_config" in path, f"vLLM has no {dotted}"
        if isinstance(value, str) and ":" in value:
            module, made = value.split(":")
            value = getattr(importlib.import_module(module), made)()
        object.__setattr__(owner, last, value)
    return vllm_config


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if not case.changed])
def test_refused_at_start(
    name: str, folders: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with our flag: vLLM's engine never gets a configuration."""
    case = CASES[name]
    for variable, value in case.variables.items():
        monkeypatch.setenv(variable, value)
    arguments = engine_args(
        folders(case.model), kv_backend="kcache", kcache_config=case.settings, **case.arguments
    )
    with pytest.raises(KCacheConfigError) as caught:
        arguments.create_engine_config()
    assert str(caught.value).startswith(PREFIX)


def test_snapshot_is_refused(
    folders: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_kcache.integration.features import SNAPSHOT_SERVER

    assert importlib.util.find_spec(SNAPSHOT_SERVER) is not None
    vllm_config = stock_config(folders("llama"))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec(SNAPSHOT_SERVER, None))
    (found,) = messages(vllm_config)
    assert found.startswith(PREFIX + "snapshots (vllm snapshot create):")
    assert "Start the server with vllm serve" in found


# What the plugin sets itself.


@pytest.mark.parametrize(
    ("arguments", "expected", "remedy"),
    [
        (
            {"attention_backend": "FLASH_ATTN"},
            "attention_backend=FLASH_ATTN:",
            "Leave --attention-backend out",
        ),
        (
            {"attention_config": {"backend": "TRITON_ATTN"}},
            "attention_backend=TRITON_ATTN:",
            "Leave --attention-backend out",
        ),
        (
            {"attention_config": {"backend_per_kind": {"full_attention": "FLASH_ATTN"}}},
            "backend_per_kind={full_attention: FLASH_ATTN}:",
            "Leave backend_per_kind out",
        ),
        ({"worker_cls": "some.Worker"}, "worker_cls=some.Worker:", "Leave --worker-cls out"),
    ],
)
def test_what_the_plugin_sets_itself(
    arguments: dict[str, Any], expected: str, remedy: str, folders: Callable[[str], str]
) -> None:
    with pytest.raises(KCacheConfigError) as caught:
        engine_args(folders("llama"), kv_backend="kcache", **arguments).create_engine_config()
    assert str(caught.value).startswith(PREFIX + expected)
    assert remedy in str(caught.value)


# Settings that do not fit the model or the machine.


@pytest.mark.parametrize(
    ("settings", "arguments", "expected"),
    [
        (
            {"v_block_tokens": 32},
            {"block_size": 16},
            "kcache_config.v_block_tokens=32: must divide the KV block size of 16 tokens",
        ),
        ({"top_n": 2}, {}, "kcache_config.top_n=2: must be at least 6"),
        ({"dense_layers": 2}, {}, "kcache_config.dense_layers=2: must be at most 1"),
        ({"dense_layers": [5]}, {}, "kcache_config.dense_layers=[5]: must be layer numbers from 0"),
        ({"prefill": "flash_attn"}, {}, "kcache_config.prefill='flash_attn': needs a GPU"),
        ({"prefill": "xformers"}, {}, "kcache_config.prefill='xformers': needs a GPU"),
    ],
)
def test_settings_that_do_not_fit(
    settings: dict[str, Any],
    arguments: dict[str, Any],
    expected: str,
    folders: Callable[[str], str],
) -> None:
    with pytest.raises(KCacheConfigError) as caught:
        engine_args(
            folders("llama"), kv_backend="kcache", kcache_config=settings, **arguments
        ).create_engine_config()
    assert str(caught.value).startswith(expected)


def test_all_refusals_are_found_at_once(folders: Callable[[str], str]) -> None:
    """What `vllm-kcache check` lists."""
    vllm_config = stock_config(
        folders("gemma2"), kv_sharing_fast_prefill=True, pipeline_parallel_size=2
    )
    found = messages(vllm_config, dense_layers=2)
    assert [text.split(":")[0].removeprefix(PREFIX) for text in found] == [
        "kv_sharing_fast_prefill=True",
        "pipeline stages beside sliding-window layers (pipeline_parallel_size=2)",
        "kcache_config.dense_layers=2",
    ]


# What must keep working.


def test_a_draft_model_is_not_refused(folders: Callable[[str], str]) -> None:
    draft = {"method": "draft_model", "model": folders("llama"), "num_speculative_tokens": 2}
    vllm_config = engine_args(
        folders("llama"), kv_backend="kcache", speculative_config=draft
    ).create_engine_config()
    assert messages(vllm_config) == []


@pytest.mark.filterwarnings("ignore:--disable-cascade-attn is deprecated")
@pytest.mark.parametrize("name", FREE)
def test_not_refused(name: str, folders: Callable[[str], str]) -> None:
    model, arguments = FREE[name]
    vllm_config = engine_args(
        folders(model), kv_backend="kcache", **arguments
    ).create_engine_config()
    assert messages(vllm_config, **arguments.get("kcache_config", {})) == []
    assert vllm_config.attention_config.backend.name == "CUSTOM"
    assert vllm_config.parallel_config.worker_cls == (
        "vllm_kcache.integration.cpu_worker.KCacheCPUWorker"
    )


def test_an_engine_knows_how_many_share_its_host(folders: Callable[[str], str]) -> None:
    from vllm_kcache.integration.settings import engines_on_host

    vllm_config = engine_args(
        folders("llama"), kv_backend="kcache", data_parallel_size=2
    ).create_engine_config()
    # What vLLM does in each engine.
    vllm_config.parallel_config.reconfigure_for_independent_dp_rank()
    assert vllm_config.parallel_config.data_parallel_size_local == 1
    assert engines_on_host(vllm_config) == 2
    assert engines_on_host(stock_config(folders("llama"))) == 1


@pytest.mark.parametrize("speculation", [None, NGRAM], ids=["", "ngram"])
# Full layers alone, beside windows, and beside states.
@pytest.mark.parametrize("model", ["llama", "gemma3", "jamba"])
def test_nothing_is_refused_on_a_gpu_either(
    model: str,
    speculation: dict[str, Any] | None,
    folders: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vllm_config = stock_config(folders(model), speculative_config=speculation)
    # As where there is Triton.
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    on_gpu = changed(vllm_config, {"device_config.device_type": "cuda"})
    assert messages(on_gpu, prefill="flash_attn") == []
    assert on_gpu.model_config.dtype == torch.bfloat16
