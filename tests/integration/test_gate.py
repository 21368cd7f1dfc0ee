# SPDX-License-Identifier: Apache-2.0
"""The gate: with everything selected, the text is stock vLLM's, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.engines import GATE, kjv, run_engine, tokens_of

pytestmark = pytest.mark.slow

SHORT = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "List three primary colours:",
]
LONG = kjv(0, 100)
SHARED = kjv(300, 40)
BATCHES: list[dict[str, Any]] = [
    # Short prompts, and 3000+ tokens in several chunks, all in one batch.
    {"prompts": [*SHORT, LONG, SHARED], "sampling": {"max_tokens": 48}},
    # Both share their beginning with prompts of the first batch.
    {
        "prompts": [LONG + " In the beginning", SHARED + " And Jacob said"],
        "sampling": {"max_tokens": 48},
    },
    # n > 1 shares the prompt's blocks between sequences that go different ways.
    {
        "prompts": [kjv(10, 12)],
        "sampling": {"max_tokens": 24, "n": 4, "temperature": 1.0, "seed": 7},
    },
    # Each step makes new requests of the best sequences: prefix hits of half-filled blocks.
    {"prompts": [SHORT[0], kjv(10, 12)], "beam_search": {"beam_width": 3, "max_tokens": 12}},
]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Stock vLLM with its own attention."""
    return run_engine(tmp_path_factory.mktemp("stock"), BATCHES)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The split cache with everything selected."""
    return run_engine(tmp_path_factory.mktemp("split"), BATCHES, kcache=GATE)


def test_text_equals_stock(stock: dict[str, Any], split: dict[str, Any]) -> None:
    assert stock["batches"][0][5]["prompt_tokens"] > 3000
    assert all(row["cached_tokens"] > 500 for row in split["batches"][1])
    samples = split["batches"][2][0]["tokens"]
    assert len({tuple(tokens) for tokens in samples}) > 1
    beams = [row["tokens"] for row in split["batches"][3]]
    assert all(len({tuple(tokens) for tokens in found}) == 3 for found in beams)
    assert tokens_of(split) == tokens_of(stock)
    # Decode went through the selection, in every layer.
    assert split["kcache_metrics"]["decode_layer_steps"] >= 30 * 2 * 40
    lists = split["kcache_metrics"]["selected_lists"]
    assert split["kcache_metrics"]["dropped_mass"][0] == [1e-4, lists]


def test_twice_the_blocks_for_the_same_memory(stock: dict[str, Any], split: dict[str, Any]) -> None:
    assert split["num_blocks"] in (2 * stock["num_blocks"], 2 * stock["num_blocks"] + 1)
    assert split["kcache_metrics"]["host_pool_blocks"] == split["num_blocks"]


def test_text_equals_stock_with_dense_layers(tmp_path: Path, stock: dict[str, Any]) -> None:
    """Layers that keep V on the device run vLLM's own attention beside split ones."""
    dense = run_engine(tmp_path, BATCHES[:1], kcache={**GATE, "dense_layers": [0, 7]})
    assert tokens_of(dense) == tokens_of(stock)[:1]
    assert dense["kcache_metrics"]["decode_layer_steps"] % 28 == 0
    # 28 layers hold K only, 2 hold K and V: 60 / 32 times stock's blocks.
    assert dense["num_blocks"] == pytest.approx(stock["num_blocks"] * 60 / 32, rel=0.01)


def test_text_equals_stock_under_preemption(tmp_path: Path) -> None:
    """Eight requests in a cache that cannot hold them: some are preempted and recomputed."""
    prompts = [kjv(40 * i, 8) for i in range(8)]
    batches = [{"prompts": prompts, "sampling": {"max_tokens": 96, "ignore_eos": True}}]
    small = {"num_gpu_blocks_override": 60, "max_model_len": 1024, "max_num_batched_tokens": 256}
    stock = run_engine(tmp_path, batches, **small)
    split = run_engine(tmp_path, batches, kcache=GATE, **small)
    assert split["vllm_metrics"]["vllm:num_preemptions"] > 0
    assert tokens_of(split) == tokens_of(stock)
