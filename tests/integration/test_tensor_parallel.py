# SPDX-License-Identifier: Apache-2.0
"""Two ranks, each with its KV heads or layers, their K pages and its part of the host memory."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engines import GATE, run_engine, run_engines, spec_of, tokens_of
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


def arguments_of(folder: Path, block_tokens: int) -> dict[str, Any]:
    """Arguments of the engines, on one rank or two; their model is made in `folder`."""
    model = write_llama(
        folder / "model", hidden_size=8 * HEAD_SIZE, num_attention_heads=8,
        num_key_value_heads=KV_HEADS, num_hidden_layers=LAYERS, vocab_size=512,
        max_position_embeddings=2048,
    )  # fmt: skip
    return {
        "model": model,
        "skip_tokenizer_init": True,
        "max_model_len": 2048,
        "max_num_batched_tokens": 512,
        "block_size": block_tokens,
    }


def check_ranks(
    tmp_path: Path, block_tokens: int, stock: dict[str, Any] | None = None, **engine: Any
) -> None:
    """The text of stock vLLM, and host memory for the V of all heads and layers, once.

    Args:
        block_tokens: vLLM's block size.
        stock: What stock vLLM made of `work`; None runs it here, on two ranks as well.
        engine: more arguments of the engine. The ranks share the heads unless it says otherwise.
    """
    arguments = {
        **arguments_of(tmp_path, block_tokens),
        **({} if "pipeline_parallel_size" in engine else {"tensor_parallel_size": RANKS}),
        **engine,
    }
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(run_engine, tmp_path, work(), **arguments) if stock is None else None
        split = run_engine(tmp_path, work(), kcache=GATE, **arguments)
        stock = stock if run is None else run.result()
    assert tokens_of(split) == tokens_of(stock)
    assert len({tuple(row[0]) for row in tokens_of(split)[0]}) == len(work()[0]["prompts"])
    assert split["batches"][1][3]["cached_tokens"] > 1400
    figures = split["kcache_metrics"]
    # Every rank counts the lists of its own heads and layers.
    assert figures["selected_lists"] > 0
    assert figures["selected_lists"] % (KV_HEADS * LAYERS) == 0
    v_bytes = LAYERS * KV_HEADS * HEAD_SIZE * block_tokens * FLOAT32_BYTES
    assert figures["host_pool_bytes"] == split["num_blocks"] * v_bytes


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Stock vLLM on one rank, where nothing is shared out."""
    folder = tmp_path_factory.mktemp("stock")
    return run_engines(folder, {"stock": spec_of(work(), **arguments_of(folder, 32))})["stock"]


@pytest.fixture(autouse=True)
def unbound_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of several engines share few cores here."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def test_text_equals_stock_on_two_ranks(tmp_path: Path, stock: dict[str, Any]) -> None:
    check_ranks(tmp_path, 32, stock)


@pytest.mark.full
def test_text_equals_stock_on_four_ranks(tmp_path: Path, stock: dict[str, Any]) -> None:
    """Each has one KV head."""
    check_ranks(tmp_path, 32, stock, tensor_parallel_size=KV_HEADS)


def test_text_equals_stock_on_two_stages(tmp_path: Path, stock: dict[str, Any]) -> None:
    """One stage has a layer more. vLLM on a CPU runs stages only where it compiles the model."""
    check_ranks(tmp_path, 32, stock, pipeline_parallel_size=RANKS, enforce_eager=False)
