# SPDX-License-Identifier: Apache-2.0
"""The gate for models with window layers: their text is stock vLLM's, the full layers split."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engines import (
    GATE,
    ROOT,
    Runs,
    kjv,
    run_engine,
    run_engines,
    spec_of,
    tokens_of,
)
from tests.integration.tiny_models import write_window_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

GEMMA = ROOT / "models/gemma-3-270m"
WINDOW, FULL = "sliding_attention", "full_attention"
KV_HEADS, HEAD_SIZE, BLOCK = 2, 64, 32
# Prompts of several chunks, all but one longer than a window or within the first.
ENGINE = {"skip_tokenizer_init": True, "max_model_len": 448, "max_num_batched_tokens": 256}
STOCK_BLOCKS = 60
SETTINGS: dict[str, dict[str, Any]] = {
    "16": {**GATE, "k_bits": 16},
    "4": {**GATE, "k_bits": 4},
    # A full layer that is not split is in the group of those that are.
    "4, dense": {**GATE, "k_bits": 4, "dense_layers": [5]},
    # Of a model in which every other layer has a window.
    "16, every other": {**GATE, "k_bits": 16},
    "4, every other": {**GATE, "k_bits": 4},
}
# Blocks of window layers, few enough for a crowd to wait; and pages of the request that both pools
# are made for, more where a page is smaller.
POOLS = {
    "16": (22, 7),
    "4": (17, 12),
    "4, dense": (22, 7),
    "16, every other": (30, 5),
    "4, every other": (18, 11),
}


@dataclass(frozen=True)
class Gate:
    """Engines of one model: "stock", and by settings."""

    split_layers: int
    runs: Runs


def work() -> list[dict[str, Any]]:
    """Chunked prompts, prefix hits, several sequences of a prompt, and a crowd."""
    generator = random.Random(0)
    prompts = [generator.choices(range(3, 500), k=length) for length in (5, 40, 400, 90)]
    crowd = [generator.choices(range(3, 500), k=220) for _ in range(5)]
    sampling = {"max_tokens": 16, "ignore_eos": True, "detokenize": False}
    return [
        {"prompts": prompts, "sampling": sampling},
        {"prompts": [[*prompt, 7, 8, 9] for prompt in prompts], "sampling": sampling},
        {
            "prompts": prompts[1:2],
            "sampling": {**sampling, "n": 3, "temperature": 1.0, "seed": 7},
        },
        {"prompts": crowd, "sampling": {**sampling, "max_tokens": 48}},
    ]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("gemma3_text", ["16", "4"]), id="gemma3"),
        pytest.param(("gemma3_text", ["4, dense"]), id="gemma3, dense", marks=pytest.mark.full),
        pytest.param(("olmo3", ["16", "4"]), id="olmo3", marks=pytest.mark.full),
        # Chunks in place of windows.
        pytest.param(("llama4_text", ["16", "4"]), id="llama4", marks=pytest.mark.full),
        # Scores have a soft cap, in all layers.
        pytest.param(("gemma2", ["16", "4"]), id="gemma2", marks=pytest.mark.full),
        # Every other layer has a window; the full ones are split and have learned sinks.
        pytest.param(
            ("gpt_oss", ["16, every other", "4, every other"]), id="gpt-oss", marks=pytest.mark.full
        ),
    ],
)
def gate(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Gate:
    """Every engine of a model, run to its end."""
    model_type, names = request.param
    folder = tmp_path_factory.mktemp("gate")
    layer_types = [WINDOW, WINDOW, FULL] * 2
    if model_type == "gpt_oss":
        layer_types = [WINDOW, FULL] * 3
    model = write_window_model(
        folder / "model", model_type, num_hidden_layers=6, layer_types=layer_types
    )
    specs = {"stock": spec_of(work(), model=model, num_gpu_blocks_override=STOCK_BLOCKS, **ENGINE)}
    for name in names:
        specs[name] = spec_of(
            work(), SETTINGS[name], model=model, num_gpu_blocks_override=POOLS[name][0], **ENGINE
        )
    dense = len(SETTINGS[names[0]].get("dense_layers", []))
    return Gate(layer_types.count(FULL) - dense, run_engines(folder, specs))


def split_runs(gate: Gate) -> dict[str, dict[str, Any]]:
    return {name: gate.runs[name] for name in gate.runs.outcomes if name != "stock"}


def test_text_equals_stock(gate: Gate) -> None:
    """Through chunked prefill, shared prefixes, n > 1 and preemption."""
    stock = gate.runs["stock"]
    for split in split_runs(gate).values():
        assert tokens_of(split) == tokens_of(stock)
        assert max(row["cached_tokens"] for row in split["batches"][1]) > 300
        assert split["vllm_metrics"]["vllm:num_preemptions"] > 0
    # Equal text says little where all text is equal.
    texts = [tokens for batch in tokens_of(stock) for row in batch for tokens in row]
    assert len(set(map(tuple, texts))) == len(texts)
    distinct = sorted(len(set(tokens)) for tokens in texts)
    assert distinct[0] >= 3
    assert distinct[len(distinct) // 2] >= 8


def test_full_layers_alone_are_split(gate: Gate) -> None:
    for name, split in split_runs(gate).items():
        figures = split["kcache_metrics"]
        assert figures["decode_layer_steps"] >= gate.split_layers * 48
        assert figures["decode_layer_steps"] % gate.split_layers == 0
        assert figures["dropped_mass"][0] == [1e-4, figures["selected_lists"]]
        # A chunk of a prompt holds 8 blocks, and vLLM keeps one; 3 are a request's.
        blocks, pages = POOLS[name]
        assert split["num_blocks"] == blocks
        assert figures["host_pool_blocks"] == 1 + (blocks - 9) * pages // 3
        row_bytes = (1 if name.startswith("16") else 2) * BLOCK * HEAD_SIZE * 4
        assert figures["host_pool_bytes"] == (
            figures["host_pool_blocks"] * gate.split_layers * KV_HEADS * row_bytes
        )


@pytest.mark.full
def test_text_equals_stock_on_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers in processes of their own: pools are planned there and made in the engine's."""
    # vLLM asks for a NUMA node for each rank, to bind its threads there.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    model = write_window_model(
        tmp_path / "model", "gemma3_text", num_hidden_layers=3, layer_types=[WINDOW, FULL, WINDOW]
    )
    stock = run_engine(tmp_path, work()[:2], model=model, **ENGINE)
    split = run_engine(
        tmp_path, work()[:2], SETTINGS["4"], model=model, tensor_parallel_size=2, **ENGINE
    )
    assert tokens_of(split) == tokens_of(stock)
    assert max(row["cached_tokens"] for row in split["batches"][1]) > 300


@pytest.mark.full
@pytest.mark.skipif(not (GEMMA / "config.json").is_file(), reason="make gemma has not run")
def test_text_of_gemma_equals_stock(tmp_path: Path) -> None:
    """Gemma 3 270M: 3 of 18 layers are split, in long prompts and in what follows them."""
    batches: list[dict[str, Any]] = [
        {
            "prompts": ["The capital of France is", kjv(0, 100), kjv(300, 40)],
            "sampling": {"max_tokens": 48},
        },
        {"prompts": [kjv(0, 100) + " In the beginning"], "sampling": {"max_tokens": 48}},
    ]
    engine = {"model": str(GEMMA), "max_model_len": 4096}
    specs = {"stock": spec_of(batches, **engine)}
    for k_bits in (16, 4):
        specs[str(k_bits)] = spec_of(batches, {**GATE, "k_bits": k_bits}, **engine)
    runs = run_engines(tmp_path, specs)
    assert runs["stock"]["batches"][0][1]["prompt_tokens"] > 2500
    for name in ("16", "4"):
        assert tokens_of(runs[name]) == tokens_of(runs["stock"])
        assert runs[name]["batches"][1][0]["cached_tokens"] > 2000
        assert runs[name]["kcache_metrics"]["decode_layer_steps"] >= 3 * 2 * 40
    (texts,) = ([row["texts"][0] for row in batch] for batch in runs["stock"]["batches"][:1])
    assert len(set(texts)) == len(texts)
    assert all(len(set(row["tokens"][0])) >= 8 for row in runs["stock"]["batches"][0])
