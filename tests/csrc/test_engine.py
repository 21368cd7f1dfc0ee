# SPDX-License-Identifier: Apache-2.0
"""Whole engines whose layers are split as on a GPU (engine.py), in vLLM's second runner.

The text is stock vLLM's with everything selected, and the CPU's with little.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.csrc.engine import LIBRARY
from tests.integration.engines import GATE, Runs, in_forks, run_engines, spec_of, tokens_of
from tests.integration.test_drafts_in_two_pools import StateEngines, window_specs
from tests.integration.test_second_runner import NGRAM_GPU, check_drafts
from tests.integration.test_speculation import (
    ENGINE,
    KV_HEADS,
    LAYERS,
    NGRAM,
    SELECTION,
    VOCABULARY,
    heads_of,
    hits_of,
    smaller_model,
    work,
)
from tests.integration.tiny_models import write_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

# A few hundred rows, so that some are evicted.
HOT = {"hot_cache_gib": 0.0005}


def small(batch: dict[str, Any], prompts: int, most: int, new: int) -> dict[str, Any]:
    """As many of a batch's prompts, cut to `most` tokens, and `new` ones after each."""
    sampling = {**batch["sampling"], "max_tokens": new}
    return {
        "prompts": [prompt[:most] for prompt in batch["prompts"][:prompts]],
        "sampling": sampling,
    }


# Emulated kernels take a thousand times as long. Still prompts come in chunks, and a crowd is too
# large for the pages.
FIRST, CROWD = work()
FIRST, CROWD = small(FIRST, 3, 260, 12), small(CROWD, 5, 90, 24)
BATCHES = [FIRST, hits_of(FIRST), CROWD]
FEW_PAGES = {**ENGINE, "num_gpu_blocks_override": 18}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_llama(
        tmp_path_factory.mktemp("model") / "llama", num_key_value_heads=KV_HEADS,
        num_hidden_layers=LAYERS, vocab_size=VOCABULARY, max_position_embeddings=1024,
    )  # fmt: skip


@pytest.fixture
def on_gpu(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs engines as on a GPU; `call` is what runs one."""
    monkeypatch.setenv(LIBRARY, str(library))

    def run(specs: dict[str, dict[str, Any]], call: str = "run") -> Runs:
        calls = {name: [f"tests.csrc.engine:{call}", spec] for name, spec in specs.items()}
        return Runs(in_forks(tmp_path, calls, "tests.integration.second_runner"))

    return run


def check(found: dict[str, Any], stock: dict[str, Any], words: int = 4) -> None:
    """The text is the other's, and says something; rows came from the hot cache and the host."""
    assert all(len(set(tokens)) > words for (tokens,) in tokens_of(stock)[0])
    assert tokens_of(found) == tokens_of(stock)
    figures = found["kcache_metrics"]
    assert figures["eager_decode_steps"] > 0
    assert min(figures["hot_cache_hits"], figures["hot_cache_misses"]) > 0


def test_text_is_that_of_stock(model: str, tmp_path: Path, on_gpu: Any) -> None:
    """Prompts in chunks, with their context from the host; steps of one token and of several."""
    stock = run_engines(tmp_path, {"stock": spec_of([FIRST], model=model, **ENGINE)})["stock"]
    settings = {**GATE, **HOT, "k_bits": 4}
    engine = {**FEW_PAGES, "model": model}
    runs = on_gpu({
        "plain": spec_of([FIRST], settings, **engine),
        "drafts": spec_of([FIRST], settings, speculative_config=NGRAM_GPU, **engine),
    })  # fmt: skip
    for found in runs["plain"], runs["drafts"]:
        check(found, stock)
        assert found["async_scheduling"]
    check_drafts(runs["drafts"])


@pytest.mark.full
@pytest.mark.parametrize("k_bits", [4, 16])
@pytest.mark.parametrize("drafts", [None, NGRAM_GPU], ids=["plain", "drafts"])
def test_prefix_hits_and_preemption(
    k_bits: int, drafts: dict[str, Any] | None, model: str, tmp_path: Path, on_gpu: Any
) -> None:
    stock = run_engines(tmp_path, {"stock": spec_of(BATCHES, model=model, **ENGINE)})["stock"]
    engine = {**FEW_PAGES, "model": model, "speculative_config": drafts}
    found = on_gpu({"": spec_of(BATCHES, {**GATE, **HOT, "k_bits": k_bits}, **engine)})[""]
    check(found, stock)
    assert max(row["cached_tokens"] for row in found["batches"][1]) > 0
    assert found["vllm_metrics"]["vllm:num_preemptions"] > 0


@pytest.mark.full
@pytest.mark.parametrize("name", ["draft", "eagle3", "mtp"])
def test_drafts_of_a_model(name: str, model: str, tmp_path: Path, on_gpu: Any) -> None:
    drafts = {"draft": (model, smaller_model(model, tmp_path)), **heads_of(model, tmp_path)}
    served, speculation = drafts[name]
    engine = {**ENGINE, "model": served}
    stock = run_engines(tmp_path, {"stock": spec_of([FIRST], **engine)})["stock"]
    settings = {**GATE, **HOT, "k_bits": 4}
    found = on_gpu({"": spec_of([FIRST], settings, speculative_config=speculation, **engine)})[""]
    check(found, stock, 1 if name == "mtp" else 4)
    check_drafts(found)


@pytest.mark.full
@pytest.mark.parametrize(
    "kind", [{"k_bits": 4, "host_dtype": "model"}, {"k_bits": 4, "host_dtype": "int8"},
             {"k_bits": 16}], ids=["codes", "int8", "exact"],
)  # fmt: skip
@pytest.mark.parametrize("drafts", [None, NGRAM_GPU], ids=["plain", "drafts"])
def test_a_selection_is_that_of_the_cpu(
    kind: dict[str, Any], drafts: dict[str, Any] | None, model: str, tmp_path: Path, on_gpu: Any
) -> None:
    settings = {**SELECTION, **kind}
    engine = {**ENGINE, "model": model, "speculative_config": drafts}
    cpu = {**engine, "speculative_config": drafts and NGRAM}
    theirs = run_engines(tmp_path, {"cpu": spec_of([FIRST], settings, **cpu)})["cpu"]
    found = on_gpu({"": spec_of([FIRST], {**settings, **HOT}, **engine)})[""]
    check(found, theirs)
    for figures in (run["kcache_metrics"] for run in (theirs, found)):
        assert figures["dropped_mass"][0][1] < figures["selected_lists"] / 2


@pytest.mark.full
@pytest.mark.parametrize("model_type", ["gemma3_text", "gemma2", "gpt_oss"])
def test_beside_window_layers(model_type: str, tmp_path: Path, on_gpu: Any) -> None:
    """Soft caps of Gemma 2 and learned sinks of gpt-oss among them."""
    specs = window_specs(tmp_path, model_type, [{**GATE, **HOT, "k_bits": 4}])
    specs["4"]["engine"]["speculative_config"] = NGRAM_GPU
    check_in_two_pools(specs, tmp_path, on_gpu)


@pytest.mark.full
def test_beside_states(tmp_path: Path, on_gpu: Any) -> None:
    engines = StateEngines(tmp_path)
    drafts = {"speculative_config": NGRAM_GPU}
    specs = {
        "plain": engines.stock_spec(),
        "4": engines.spec({**GATE, **HOT, "k_bits": 4}, **drafts),
    }
    check_in_two_pools(specs, tmp_path, on_gpu, "run_beside_states")


def check_in_two_pools(
    specs: dict[str, dict[str, Any]], folder: Path, on_gpu: Any, call: str = "run"
) -> None:
    """Of two engines, stock vLLM and one with drafts: equal texts, the second with prefix hits."""
    for spec in specs.values():
        spec["batches"] = BATCHES[:2]
    plain = run_engines(folder, {"plain": specs["plain"]})["plain"]
    found = on_gpu({"4": specs["4"]}, call)["4"]
    check(found, plain, 2)
    check_drafts(found)
    assert max(row["cached_tokens"] for row in found["batches"][1]) > 0
