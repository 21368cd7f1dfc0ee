# SPDX-License-Identifier: Apache-2.0
"""vLLM's second runner, which every engine on a GPU has: the text is that of stock vLLM.

On a CPU, where its kernels are interpreted (second_runner.py); what is split is the CPU's, and in
tests/csrc/test_engine.py a GPU's. Stock's text without drafts is that of the first runner.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.engines import GATE, Runs, in_forks, run_engines, spec_of, tokens_of
from tests.integration.test_drafts_in_two_pools import StateEngines, window_specs
from tests.integration.test_drafts_in_two_pools import check as check_in_two_pools
from tests.integration.test_speculation import (
    ENGINE,
    KV_HEADS,
    LAYERS,
    MTP_WORDS,
    NGRAM,
    SELECTION,
    VOCABULARY,
    figures_of,
    heads_of,
    hits_of,
    smaller_model,
    work,
)
from tests.integration.tiny_models import write_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

NGRAM_GPU = {**NGRAM, "method": "ngram_gpu"}
FIRST, CROWD = work()
BATCHES = [FIRST, hits_of(FIRST), CROWD]


def in_second_runner(folder: Path, specs: dict[str, dict[str, Any]]) -> Runs:
    """As `engines.run_engines`; what stock vLLM generates is not kept."""
    calls = {name: ["tests.integration.generate:run", spec] for name, spec in specs.items()}
    return Runs(in_forks(folder, calls, "tests.integration.second_runner"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_llama(
        tmp_path_factory.mktemp("model") / "llama", num_key_value_heads=KV_HEADS,
        num_hidden_layers=LAYERS, vocab_size=VOCABULARY, max_position_embeddings=1024,
    )  # fmt: skip


def check(found: dict[str, Any], stock: dict[str, Any], words: int = VOCABULARY // 3) -> None:
    """The text is stock's, and says something."""
    assert all(len(set(tokens)) > words for (tokens,) in tokens_of(stock)[0])
    assert tokens_of(found) == tokens_of(stock)
    assert found["kcache_metrics"]["decode_layer_steps"] > 0


def check_drafts(found: dict[str, Any]) -> None:
    _, drafts, accepted = figures_of(found)
    assert 0 < accepted < drafts


@pytest.mark.full
@pytest.mark.parametrize("k_bits", [4, 16])
def test_text_with_and_without_drafts(k_bits: int, model: str, tmp_path: Path) -> None:
    """Several chunks and decodes in a step; drafts that are made while a step is on its way."""
    settings = {**GATE, "k_bits": k_bits}
    engine = {**ENGINE, "model": model}
    stock = run_engines(tmp_path, {"stock": spec_of([FIRST], **engine)})["stock"]
    runs = in_second_runner(tmp_path, {
        "plain": spec_of([FIRST], settings, **engine),
        "ngram_gpu": spec_of([FIRST], settings, speculative_config=NGRAM_GPU, **engine),
    })  # fmt: skip
    for found in runs["plain"], runs["ngram_gpu"]:
        check(found, stock)
        assert found["async_scheduling"]
    check_drafts(runs["ngram_gpu"])


@pytest.fixture(scope="module")
def plain(model: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Stock vLLM's first runner, without drafts: prefix hits and preemption, too."""
    folder = tmp_path_factory.mktemp("plain")
    glm, _ = heads_of(model, folder)["mtp"]
    specs = {
        "llama": spec_of(BATCHES, **{**ENGINE, "model": model}),
        "mtp": spec_of(BATCHES[:2], **{**ENGINE, "model": glm}),
    }
    return run_engines(folder, specs)


@pytest.fixture(scope="module")
def runs(model: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The second runner: drafts of each kind with codes and with exact keys, and stock vLLM's."""
    folder = tmp_path_factory.mktemp("runs")
    drafts = {
        "plain": (model, None), "ngram": (model, NGRAM), "ngram_gpu": (model, NGRAM_GPU),
        "draft": (model, smaller_model(model, folder)), **heads_of(model, folder),
    }  # fmt: skip
    specs = {}
    for name, (served, speculation) in drafts.items():
        engine = {**ENGINE, "model": served, "speculative_config": speculation}
        batches = BATCHES[:2] if name == "mtp" else BATCHES
        specs[f"stock, {name}"] = spec_of(batches, **engine)
        for k_bits in (4, 16):
            specs[f"{name}, {k_bits}"] = spec_of(batches, {**GATE, "k_bits": k_bits}, **engine)
    few = {**SELECTION, "k_bits": 4}
    for name in ("plain", "ngram"):
        engine = {**ENGINE, "model": model, "speculative_config": drafts[name][1]}
        specs[f"few, {name}"] = spec_of([FIRST], few, **engine)
    return in_second_runner(folder, specs)


@pytest.mark.full
@pytest.mark.parametrize("k_bits", [4, 16])
@pytest.mark.parametrize("name", ["plain", "ngram", "ngram_gpu", "draft", "eagle", "eagle3", "mtp"])
def test_drafts_of_each_kind(name: str, k_bits: int, runs: Runs, plain: Runs) -> None:
    """Through prefix hits and preemption; as many drafts are accepted as by stock vLLM."""
    found, stock = runs[f"{name}, {k_bits}"], runs[f"stock, {name}"]
    if name == "mtp":
        check(found, plain["mtp"], MTP_WORDS)
    else:
        check(found, plain["llama"])
        assert found["vllm_metrics"]["vllm:num_preemptions"] > 0
    assert max(row["cached_tokens"] for row in found["batches"][1]) > 0
    if name != "plain":
        check_drafts(found)
        shares = [accepted / drafts for _, drafts, accepted in map(figures_of, (found, stock))]
        assert abs(shares[0] - shares[1]) <= 0.01, shares


@pytest.mark.full
def test_a_selection_is_the_same_for_a_draft(runs: Runs) -> None:
    """Where much is not selected the text is that of the same engine without drafts."""
    found = [runs[f"few, {name}"] for name in ("plain", "ngram")]
    assert tokens_of(found[0]) == tokens_of(found[1])
    check_drafts(found[1])
    for figures in (run["kcache_metrics"] for run in found):
        assert figures["dropped_mass"][0][1] < figures["selected_lists"] / 2


@pytest.mark.full
@pytest.mark.parametrize("k_bits", [4, 16])
def test_drafts_beside_window_layers(k_bits: int, tmp_path: Path) -> None:
    specs = window_specs(tmp_path, "gemma3_text", [{**GATE, "k_bits": k_bits}])
    plain = run_engines(tmp_path, {"plain": specs.pop("plain")})["plain"]
    (spec,) = specs.values()
    spec["engine"]["speculative_config"] = NGRAM_GPU
    found = in_second_runner(tmp_path, {"windows": spec})["windows"]
    check(found, plain, 2)
    check_drafts(found)
    assert found["vllm_metrics"]["vllm:num_preemptions"] > 0
    # How far depends on how many blocks steps that are on their way still hold.
    assert max(row["cached_tokens"] for row in found["batches"][1]) > 0


@pytest.mark.full
def test_drafts_beside_states(tmp_path: Path) -> None:
    """And without drafts. Where states are, and of which draft, is the runner's own affair here."""
    engines = StateEngines(tmp_path)
    plain = engines.run_stock()
    specs = {
        f"{name}, {k_bits}": engines.spec({**GATE, "k_bits": k_bits}, speculative_config=drafts)
        for k_bits in (4, 16)
        for name, drafts in (("plain", None), ("drafts", NGRAM_GPU))
    }
    calls = {
        name: ["tests.integration.state_kernels:run_in_second_runner", spec]
        for name, spec in specs.items()
    }
    runs = Runs(in_forks(tmp_path, calls, "tests.integration.second_runner"))
    for k_bits in (4, 16):
        assert tokens_of(runs[f"plain, {k_bits}"]) == tokens_of(plain)
        check_in_two_pools(runs[f"drafts, {k_bits}"], plain)
