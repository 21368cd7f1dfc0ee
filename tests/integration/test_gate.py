# SPDX-License-Identifier: Apache-2.0
"""The gate: with everything selected, the text is stock vLLM's, token for token."""

from __future__ import annotations

from pathlib import Path

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


def test_text_equals_stock(tmp_path: Path) -> None:
    """Short prompts, 3000+ tokens in several chunks, prefix hits, all in one batch."""
    long_prompt = kjv(0, 100)
    batches = [
        {"prompts": [*SHORT, long_prompt, kjv(300, 40)], "sampling": {"max_tokens": 48}},
        # Both share their beginning with prompts of the first batch.
        {
            "prompts": [long_prompt + " In the beginning", kjv(300, 40) + " And Jacob said"],
            "sampling": {"max_tokens": 48},
        },
    ]
    stock = run_engine(tmp_path, batches)
    split = run_engine(tmp_path, batches, kcache=GATE)
    assert stock["batches"][0][5]["prompt_tokens"] > 3000
    assert all(row["cached_tokens"] > 500 for row in split["batches"][1])
    assert tokens_of(split) == tokens_of(stock)
    # Decode went through the selection, in every layer.
    assert split["kcache_metrics"]["decode_layer_steps"] >= 30 * 2 * 40
    lists = split["kcache_metrics"]["selected_lists"]
    assert split["kcache_metrics"]["dropped_mass"][0] == [1e-4, lists]


def test_text_equals_stock_under_preemption(tmp_path: Path) -> None:
    """Eight requests in a cache that cannot hold them: some are preempted and recomputed."""
    prompts = [kjv(40 * i, 8) for i in range(8)]
    batches = [{"prompts": prompts, "sampling": {"max_tokens": 96, "ignore_eos": True}}]
    small = {"num_gpu_blocks_override": 60, "max_model_len": 1024, "max_num_batched_tokens": 256}
    stock = run_engine(tmp_path, batches, **small)
    split = run_engine(tmp_path, batches, kcache=GATE, **small)
    assert split["vllm_metrics"]["vllm:num_preemptions"] > 0
    assert tokens_of(split) == tokens_of(stock)


def test_text_equals_stock_with_dense_layers(tmp_path: Path) -> None:
    """Layers that keep V on the device run vLLM's own attention beside split ones."""
    batches = [{"prompts": [*SHORT, kjv(0, 30)], "sampling": {"max_tokens": 32}}]
    stock = run_engine(tmp_path, batches)
    split = run_engine(tmp_path, batches, kcache={**GATE, "dense_layers": [0, 7]})
    assert tokens_of(split) == tokens_of(stock)
    assert split["kcache_metrics"]["decode_layer_steps"] % 28 == 0
    # 28 layers hold K only, 2 hold K and V: 60 / 32 times stock's blocks.
    assert split["num_blocks"] == pytest.approx(stock["num_blocks"] * 60 / 32, rel=0.01)


def test_parallel_samples_and_beams(tmp_path: Path) -> None:
    """n > 1 shares the prompt's blocks between sequences that go different ways."""
    batches = [
        {
            "prompts": [kjv(10, 12)],
            "sampling": {"max_tokens": 24, "n": 4, "temperature": 1.0, "seed": 7},
        }
    ]
    stock = run_engine(tmp_path, batches)
    split = run_engine(tmp_path, batches, kcache=GATE)
    assert len({tuple(tokens) for tokens in split["batches"][0][0]["tokens"]}) > 1
    assert tokens_of(split) == tokens_of(stock)
