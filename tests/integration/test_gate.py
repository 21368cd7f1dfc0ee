# SPDX-License-Identifier: Apache-2.0
"""The gate: with everything selected, the text is stock vLLM's, token for token.

`make test` cuts the model to six of its layers, `make test-all` runs all thirty as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engines import GATE, MODEL, Runs, kjv, run_engines, spec_of, tokens_of
from tests.integration.tiny_models import cut_model

# With all layers, the five engines of the fixture take several minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

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


# Eight requests in a cache that cannot hold them: some are preempted and recomputed.
CROWDED = [
    {
        "prompts": [kjv(40 * i, 8) for i in range(8)],
        "sampling": {"max_tokens": 96, "ignore_eos": True},
    }
]
SMALL = {"num_gpu_blocks_override": 60, "max_model_len": 1024, "max_num_batched_tokens": 256}
ALL_LAYERS = list(range(30))
# The first and the last: what is left of the model says nothing, but says it in many words, and
# other words after other prompts. (Without the last two it repeats one word.)
CUT = [0, 1, 2, 3, 28, 29]


@dataclass(frozen=True)
class Gate:
    """Engines of one model: "stock" and "split", with "dense" layers, and "crowded" ones."""

    layers: int
    dense_layers: list[int]
    runs: Runs


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(CUT, id="6 layers"),
        pytest.param(ALL_LAYERS, id="all layers", marks=pytest.mark.full),
    ],
)
def gate(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Gate:
    """Every engine that the tests need, run to its end."""
    folder = tmp_path_factory.mktemp("gate")
    layers = request.param
    whole = layers == ALL_LAYERS
    engine = {"model": MODEL if whole else cut_model(Path(MODEL), folder / "model", layers)}
    dense_layers = [0, len(layers) // 4]
    dense = {**GATE, "dense_layers": dense_layers}
    specs = {
        "stock": spec_of(BATCHES, **engine),
        "split": spec_of(BATCHES, GATE, **engine),
        "dense": spec_of(BATCHES[:1], dense, **engine),
        "stock, crowded": spec_of(CROWDED, **engine, **SMALL),
        "split, crowded": spec_of(CROWDED, GATE, **engine, **SMALL),
    }
    return Gate(len(layers), dense_layers, run_engines(folder, specs))


def test_text_equals_stock(gate: Gate) -> None:
    stock, split = gate.runs["stock"], gate.runs["split"]
    assert stock["batches"][0][5]["prompt_tokens"] > 3000
    assert all(row["cached_tokens"] > 500 for row in split["batches"][1])
    samples = split["batches"][2][0]["tokens"]
    assert len({tuple(tokens) for tokens in samples}) > 1
    beams = [row["tokens"] for row in split["batches"][3]]
    assert all(len({tuple(tokens) for tokens in found}) == 3 for found in beams)
    assert tokens_of(split) == tokens_of(stock)
    # Decode went through the selection, in every layer.
    assert split["kcache_metrics"]["decode_layer_steps"] >= gate.layers * 2 * 40
    lists = split["kcache_metrics"]["selected_lists"]
    assert split["kcache_metrics"]["dropped_mass"][0] == [1e-4, lists]


def test_text_depends_on_the_prompt(gate: Gate) -> None:
    """Equal text says little where all text is equal."""
    for batch in (tokens_of(gate.runs["stock"])[0], tokens_of(gate.runs["stock, crowded"])[0]):
        texts = [tokens for (tokens,) in batch]
        assert len(set(map(tuple, texts))) == len(texts)
        distinct = sorted(len(set(tokens)) for tokens in texts)
        assert distinct[0] >= 5
        assert distinct[len(distinct) // 2] >= 15


def test_twice_the_blocks_for_the_same_memory(gate: Gate) -> None:
    stock, split = gate.runs["stock"], gate.runs["split"]
    assert split["num_blocks"] in (2 * stock["num_blocks"], 2 * stock["num_blocks"] + 1)
    assert split["kcache_metrics"]["host_pool_blocks"] == split["num_blocks"]


def test_text_equals_stock_with_dense_layers(gate: Gate) -> None:
    """Layers that keep V on the device run vLLM's own attention beside split ones."""
    stock, dense = gate.runs["stock"], gate.runs["dense"]
    assert tokens_of(dense) == tokens_of(stock)[:1]
    split_layers = gate.layers - len(gate.dense_layers)
    assert dense["kcache_metrics"]["decode_layer_steps"] % split_layers == 0
    # A layer that holds K and V takes the room of two that hold K only.
    room = split_layers + 2 * len(gate.dense_layers)
    assert dense["num_blocks"] == pytest.approx(stock["num_blocks"] * 2 * gate.layers / room, 0.01)


def test_text_equals_stock_under_preemption(gate: Gate) -> None:
    split = gate.runs["split, crowded"]
    assert split["vllm_metrics"]["vllm:num_preemptions"] > 0
    assert tokens_of(split) == tokens_of(gate.runs["stock, crowded"])
