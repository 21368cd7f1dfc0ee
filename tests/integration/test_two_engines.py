# SPDX-License-Identifier: Apache-2.0
"""Engines of one process (multiprocessing off) do not touch each other's V, settings or figures."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.integration.engines import in_forks
from tests.integration.tiny_models import write_llama

TOKENS = 24
LENGTHS = ((150, 40), (90, 200), (120, 70))


def _prompts(lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    own = random.Random(seed)
    return [[own.randrange(3, 128) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each engine alone, in a fork of its own, and all of them in one."""
    folder = tmp_path_factory.mktemp("engines")
    small = write_llama(folder / "small")
    large = write_llama(
        folder / "large", num_hidden_layers=3, hidden_size=512, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    engine = {
        "dtype": "float32", "max_model_len": 256, "enforce_eager": True, "seed": 0,
        "skip_tokenizer_init": True, "kv_cache_memory_bytes": 16 << 20,
    }  # fmt: skip
    few = {"top_n": 6, "sink_tokens": 16, "recent_tokens": 16, "host_memory_gib": 0.1}
    specs = {
        "small": {**engine, "model": small, "kv_backend": "kcache", "kcache_config": few},
        "large": {
            **engine, "model": large, "block_size": 32, "kv_backend": "kcache",
            "kcache_config": {**few, "top_n": 8, "sink_tokens": 32},
        },
        "stock": {**engine, "model": small},
    }  # fmt: skip
    texts = [_prompts(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    work = "tests.integration.two_engines:run"
    calls: dict[str, list[Any]] = {
        name: [work, [spec], [own], TOKENS]
        for (name, spec), own in zip(specs.items(), texts, strict=True)
    }
    calls["together"] = [work, list(specs.values()), texts, TOKENS]
    found = in_forks(folder, calls)
    for name, outcome in found.items():
        assert outcome["code"] == 0, name + outcome["stdout"][-3000:] + outcome["stderr"][-6000:]
    return {name: outcome["result"] for name, outcome in found.items()}


def test_they_took_turns(outcomes: dict[str, Any]) -> None:
    assert min(outcomes["together"]["turns"]) >= TOKENS


@pytest.mark.parametrize(("place", "name"), [*enumerate(("small", "large", "stock"))])
def test_texts_are_those_of_each_alone(outcomes: dict[str, Any], place: int, name: str) -> None:
    assert outcomes["together"]["tokens"][place] == outcomes[name]["tokens"][0]


@pytest.mark.parametrize(("place", "name"), [*enumerate(("small", "large"))])
def test_figures_are_those_of_each_alone(outcomes: dict[str, Any], place: int, name: str) -> None:
    alone = outcomes[name]["metrics"][0]
    assert alone["selected_blocks"] > 0
    assert outcomes["together"]["metrics"][place] == alone


def test_the_engines_differ(outcomes: dict[str, Any]) -> None:
    """Otherwise one could stand in for another unseen."""
    small, large = (outcomes[name]["metrics"][0] for name in ("small", "large"))
    assert small["fetched_bytes"] != large["fetched_bytes"]
    tokens = [outcomes[name]["tokens"][0] for name in ("small", "large", "stock")]
    assert tokens[0] != tokens[1] != tokens[2]
