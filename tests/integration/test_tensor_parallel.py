# SPDX-License-Identifier: Apache-2.0
"""Two ranks, each with its KV heads or layers, their K pages and its part of the host memory."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engines import GATE, run_engine, tokens_of
from tests.integration.tiny_models import write_llama

pytestmark = pytest.mark.slow

RANKS = 2
KV_HEADS = 4
HEAD_SIZE = 64
LAYERS = 3
FLOAT32_BYTES = 4


def work() -> list[dict[str, Any]]:
    """Prompts of random tokens: short ones, some of several chunks, then prefix hits."""
    generator = random.Random(0)
    prompts = [generator.choices(range(3, 500), k=length) for length in (5, 40, 700, 1500, 90, 33)]
    sampling = {"max_tokens": 32, "ignore_eos": True, "detokenize": False}
    return [
        {"prompts": prompts, "sampling": sampling},
        {"prompts": [[*prompt, 7, 8, 9] for prompt in prompts], "sampling": sampling},
    ]


def check_two_ranks(tmp_path: Path, block_tokens: int, **engine: Any) -> None:
    """The text of stock vLLM on two ranks, and host memory for the V of all heads, once.

    Args:
        block_tokens: vLLM's block size.
        engine: more arguments of the engine. The ranks share the heads unless it says otherwise.
    """
    model = write_llama(
        tmp_path / "model", hidden_size=8 * HEAD_SIZE, num_attention_heads=8,
        num_key_value_heads=KV_HEADS, num_hidden_layers=LAYERS, vocab_size=512,
        max_position_embeddings=2048,
    )  # fmt: skip
    arguments = {
        "model": model,
        "skip_tokenizer_init": True,
        "max_model_len": 2048,
        "max_num_batched_tokens": 512,
        "block_size": block_tokens,
        **({} if "pipeline_parallel_size" in engine else {"tensor_parallel_size": RANKS}),
        **engine,
    }
    with ThreadPoolExecutor(2) as pool:
        stock_run = pool.submit(run_engine, tmp_path, work(), **arguments)
        split = run_engine(tmp_path, work(), kcache=GATE, **arguments)
        stock = stock_run.result()
    assert tokens_of(split) == tokens_of(stock)
    assert len({tuple(row[0]) for row in tokens_of(split)[0]}) == len(work()[0]["prompts"])
    assert split["batches"][1][3]["cached_tokens"] > 1400
    figures = split["kcache_metrics"]
    # Every rank counts the lists of its own heads and layers.
    assert figures["selected_lists"] > 0
    assert figures["selected_lists"] % (KV_HEADS * LAYERS) == 0
    v_bytes = LAYERS * KV_HEADS * HEAD_SIZE * block_tokens * FLOAT32_BYTES
    assert figures["host_pool_bytes"] == split["num_blocks"] * v_bytes


def test_text_equals_stock_on_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ranks of several engines share few cores here.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    check_two_ranks(tmp_path, 32)


def test_text_equals_stock_on_two_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stage has a layer more. Stock on a CPU runs stages only where it compiles the model."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    check_two_ranks(tmp_path, 32, pipeline_parallel_size=RANKS, enforce_eager=False)
