# SPDX-License-Identifier: Apache-2.0
"""The gate with K codes: with everything selected the text is stock vLLM's, whatever codes say."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.comparing import SHORT, TIE_NATS, distance
from tests.integration.engines import GATE, kjv, run_engine, run_engines, spec_of, tokens_of
from tests.integration.tiny_models import write_llama

pytestmark = pytest.mark.slow

HEAD_SIZE, KV_HEADS, LAYERS = 128, 2, 3
CODES = {**GATE, "k_bits": 4}
# Prompts of several chunks, and a cache that cannot hold all requests.
ENGINE = {
    "skip_tokenizer_init": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
    "num_gpu_blocks_override": 60,
}
CACHE_BYTES = 2**30
# As users start it who set nothing: K codes, rows of int8, and blocks above a mass threshold.
DEFAULT = {"kv_backend": "kcache", "dtype": "bfloat16"}


def work() -> list[dict[str, Any]]:
    """Chunked prompts, prefix hits, several sequences of a prompt, and a crowd."""
    generator = random.Random(0)
    prompts = [generator.choices(range(3, 500), k=length) for length in (5, 40, 700, 90)]
    crowd = [generator.choices(range(3, 500), k=200) for _ in range(8)]
    sampling = {"max_tokens": 24, "ignore_eos": True, "detokenize": False}
    return [
        {"prompts": prompts, "sampling": sampling},
        {"prompts": [[*prompt, 7, 8, 9] for prompt in prompts], "sampling": sampling},
        {
            "prompts": prompts[1:2],
            "sampling": {**sampling, "n": 4, "temperature": 1.0, "seed": 7},
        },
        {"prompts": crowd, "sampling": {**sampling, "max_tokens": 96}},
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_llama(
        tmp_path_factory.mktemp("model") / "llama", hidden_size=4 * HEAD_SIZE,
        num_attention_heads=4, num_key_value_heads=KV_HEADS, num_hidden_layers=LAYERS,
        vocab_size=512, max_position_embeddings=2048,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stock(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Stock vLLM with its own attention."""
    return run_engine(tmp_path_factory.mktemp("stock"), work(), model=model, **ENGINE)


def test_text_equals_stock(model: str, stock: dict[str, Any], tmp_path: Path) -> None:
    """Through chunked prefill, shared prefixes, preemption and n > 1."""
    codes = run_engine(tmp_path, work(), CODES, model=model, **ENGINE)
    assert max(row["cached_tokens"] for row in codes["batches"][1]) > 100
    assert codes["vllm_metrics"]["vllm:num_preemptions"] > 0
    samples = codes["batches"][2][0]["tokens"]
    assert len({tuple(tokens) for tokens in samples}) > 1
    assert tokens_of(codes) == tokens_of(stock)
    # Every decode went through codes, and each selected block was scored again by its row.
    figures = codes["kcache_metrics"]
    assert figures["decode_layer_steps"] >= LAYERS * 96
    blocks = sum(count for _, count in figures["estimate_error"])
    assert blocks == figures["selected_blocks"] * 2  # query heads of a KV head
    assert figures["dropped_mass"][0] == [1e-4, figures["selected_lists"]]
    # Codes are no exact K, and not far from it.
    errors = dict(figures["estimate_error"])
    assert errors[0.01] < blocks / 2
    assert sum(count for bound, count in errors.items() if bound > 1) < blocks / 20


def check_figures(figures: dict[str, Any], layers: int, blocks: int) -> None:
    """Lists, their blocks and the rows of the host are of the split layers of all ranks."""
    assert figures["selected_lists"] > 0
    assert figures["selected_lists"] % (layers * KV_HEADS) == 0
    scored_again = sum(count for _, count in figures["estimate_error"])
    assert scored_again == figures["selected_blocks"] * 2  # query heads of a KV head
    token_bytes = 2 * HEAD_SIZE * 4
    assert figures["host_pool_bytes"] == blocks * layers * KV_HEADS * 32 * token_bytes


def test_text_equals_stock_beside_dense_layers(
    model: str, stock: dict[str, Any], tmp_path: Path
) -> None:
    """The first and the last keep K and V in vLLM's pages, of another size than those of codes."""
    settings = {**CODES, "dense_layers": [0, LAYERS - 1]}
    codes = run_engine(tmp_path, work()[:2], settings, model=model, **ENGINE)
    assert tokens_of(codes) == tokens_of(stock)[:2]
    check_figures(codes["kcache_metrics"], LAYERS - 2, codes["num_blocks"])


@pytest.fixture
def unbound_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM asks for a NUMA node for each rank, to bind its threads there."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@pytest.mark.usefixtures("unbound_ranks")
def test_text_equals_stock_on_two_ranks(model: str, stock: dict[str, Any], tmp_path: Path) -> None:
    """Each rank measures its own heads, while all of them run the pass."""
    codes = run_engine(tmp_path, work()[:1], CODES, model=model, tensor_parallel_size=2, **ENGINE)
    assert tokens_of(codes) == tokens_of(stock)[:1]
    check_figures(codes["kcache_metrics"], LAYERS, codes["num_blocks"])


@pytest.mark.usefixtures("unbound_ranks")
@pytest.mark.full
def test_text_equals_stock_on_two_stages(model: str, stock: dict[str, Any], tmp_path: Path) -> None:
    """Each stage measures its own layers, on what the one before sends it; and the model that
    serves is compiled, as vLLM on a CPU needs it for stages."""
    codes = run_engine(
        tmp_path, work()[:2], CODES, model=model, pipeline_parallel_size=2,
        enforce_eager=False, **ENGINE,
    )  # fmt: skip
    assert tokens_of(codes) == tokens_of(stock)[:2]


def test_blocks_for_the_same_memory(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of head size 128 in bfloat16 7.5 times stock's; the host keeps rows of int8. By default."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    batch = [{"prompts": [[5, 6, 7]], "sampling": {"max_tokens": 2, "detokenize": False}}]
    arguments = {**ENGINE, "num_gpu_blocks_override": None}
    codes = run_engine(tmp_path, batch, model=model, **DEFAULT, **arguments)
    elements = 32 * KV_HEADS * LAYERS
    assert codes["num_blocks"] == CACHE_BYTES // (elements * (HEAD_SIZE // 2 + 4))
    assert codes["num_blocks"] >= 7.4 * (CACHE_BYTES // (elements * 2 * HEAD_SIZE * 2))
    page_bytes = codes["kcache_metrics"]["host_pool_bytes"] / codes["num_blocks"]
    assert page_bytes == elements // 8 * (8 * 2 * HEAD_SIZE + 8 * 4)


def test_text_of_the_default(tmp_path: Path) -> None:
    """That of stock vLLM, up to ties (comparing.py): though blocks are left out, and K and V
    rounded twice, to bfloat16 and to int8."""
    sampling = {"max_tokens": 24, "ignore_eos": True, "logprobs": 5}
    batch = [{"prompts": [*SHORT, kjv(0, 8), kjv(300, 8)], "sampling": sampling}]
    engine = {"max_model_len": 1024, "max_num_batched_tokens": 256, "num_gpu_blocks_override": 60}
    specs = {
        "stock": spec_of(batch, dtype="bfloat16", **engine),
        "split": spec_of(batch, **DEFAULT, **engine),
    }
    assert "kcache_config" not in specs["split"]["engine"]
    runs = run_engines(tmp_path, specs)
    split = runs["split"]
    found = distance(split, runs["stock"])
    assert found.largest_gap <= TIE_NATS, found
    assert found.equal > 0
    figures = split["kcache_metrics"]
    # Some lists left nothing out, and some a share that shows.
    dropped = figures["dropped_mass"]
    assert dropped[0][1] < figures["selected_lists"] == sum(count for _, count in dropped)
    assert figures["selected_blocks"] > 0
    # 3 query heads of a KV head; 30 layers of 3 KV heads of 64, V blocks of 8 tokens.
    assert sum(count for _, count in figures["estimate_error"]) == figures["selected_blocks"] * 3
    row_bytes = 8 * 2 * 64 + 8 * 2 * 2
    assert figures["host_pool_bytes"] == 60 * 30 * 3 * (32 // 8) * row_bytes
