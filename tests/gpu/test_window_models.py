# SPDX-License-Identifier: Apache-2.0
"""Models with window layers, with states, or made for images, on a GPU: the text is stock vLLM's,
through captured graphs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm

from tests.conftest import assert_close
from tests.gpu.comparing import GRAPHS, assert_same_text_or_tie
from tests.integration.engines import GATE, run_engine, tokens_of
from tests.integration.families import LINEAR
from tests.integration.test_window_models import FULL, WINDOW, work
from tests.integration.tiny_models import write_qwen3_vl, write_random_model, write_window_model
from tests.kernels import sinks
from tests.kernels.layers import layer_of
from tests.shapes import Shape, build_case
from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.integration import prefill
from vllm_kcache.kernels.decode import decode_step
from vllm_kcache.kernels.self_check import check_kernels
from vllm_kcache.reference.full import attend_full
from vllm_kcache.split_cache_gpu import Ragged
from vllm_kcache.types import Selection

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

# By Transformers' name: values of k_bits. gpt-oss has learned sinks, Gemma 2 a soft cap on scores;
# Llama 4 in place of windows chunks, with which vLLM captures no decode steps, and Qwen3.5 layers
# with a state. The language layers of Qwen3-VL are all full, and rotate in three directions.
MODELS = {
    "gemma3_text": (16, 4), "qwen3_5_text": (16, 4), "gpt_oss": (16, 4), "gemma2": (16, 4),
    "llama4_text": (4,), "qwen3_vl": (16, 4),
}  # fmt: skip
EXPERTS, STATES, IMAGES = ("gpt_oss", "llama4_text"), "qwen3_5_text", "qwen3_vl"
ENGINE: dict[str, Any] = {
    **GRAPHS, "dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 448,
    "max_num_batched_tokens": 256, "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 30,
    "compilation_config": {**GRAPHS["compilation_config"], "cudagraph_capture_sizes": [1, 2, 4, 8]},
}  # fmt: skip
# vLLM's kernels of linear layers are made for heads of 128 channels and for bfloat16. FlashInfer's
# for prompts need not be there.
STATE_LAYERS = {
    "layer_types": [LINEAR, FULL, LINEAR, FULL], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "head_dim": 64,
}  # fmt: skip
ENGINES = {
    STATES: {**ENGINE, "dtype": "bfloat16", "gdn_prefill_backend": "triton"},
    IMAGES: {**ENGINE, "language_model_only": True},
}  # fmt: skip
# An engine of a tiny model takes a core and most of a minute, and other tests run beside these.
AT_ONCE = 5


def has_expert_kernels() -> bool:
    """Whether vLLM's kernels of experts are there: an installation may leave them out."""
    return any(Path(vllm.__file__).parent.glob("_moe_C*.so"))


CASES = [
    pytest.param(
        model, k_bits,
        marks=pytest.mark.skipif(
            model in EXPERTS and not has_expert_kernels(), reason="vLLM without kernels of experts"
        ),
    )
    for model, each in MODELS.items()
    for k_bits in each
]  # fmt: skip


def write_model(folder: Path, model_type: str) -> str:
    """A random model of four layers, two of them full, or all; returns its folder."""
    if model_type == STATES:
        return write_random_model(folder, model_type, **STATE_LAYERS)
    if model_type == IMAGES:
        return write_qwen3_vl(folder)
    kinds = [WINDOW, FULL, WINDOW, FULL]
    return write_window_model(folder, model_type, num_hidden_layers=4, layer_types=kinds)


def work_of(model_type: str) -> list[dict[str, Any]]:
    """What engines are asked; where ties are looked at, greedily and with log-probabilities."""
    batches = work()
    if model_type == STATES:
        del batches[2]
        for batch in batches:
            batch["sampling"] = {**batch["sampling"], "logprobs": 5}
    return batches


@pytest.fixture(scope="module", autouse=True)
def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Any, Future]]:
    """Results by model and k_bits, None for stock vLLM's. They run while kernels are tested."""
    runs: dict[Any, Future] = {}
    pool = ThreadPoolExecutor(AT_ONCE)
    for model_type, each in MODELS.items():
        if model_type in EXPERTS and not has_expert_kernels():
            continue
        folder = tmp_path_factory.mktemp(model_type)
        model = write_model(folder / "model", model_type)
        engine = {**ENGINES.get(model_type, ENGINE), "model": model}
        for k_bits in (None, *each):
            own = folder / str(k_bits)
            own.mkdir()
            settings = None if k_bits is None else {**GATE, "k_bits": k_bits, "hot_cache_gib": 0.25}
            runs[model_type, k_bits] = pool.submit(
                run_engine, own, work_of(model_type), settings, **engine
            )
    yield runs
    # After a failure with -x nobody waits for those that have not begun.
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "case",
    list(itertools.product(sinks.SHAPES[:1], sinks.RULES[::2], sinks.GPU_KINDS, sinks.SOFT_CAPS)),
    ids=str,
)
def test_steps_of_codes_with_sinks(case: tuple[Any, ...]) -> None:
    shape, rule, kind, soft_cap = case
    sinks.check(shape, rule, *kind, soft_cap, device="cuda")


# Layers of gpt-oss and of Gemma 2, in bfloat16: query heads, KV heads, head size, bits of K.
@pytest.mark.parametrize(
    ("layer", "special"),
    [
        ((64, 8, 64, 4, "int8"), {"has_sinks": True}),
        ((64, 8, 64, 16, "model"), {"has_sinks": True}),
        ((16, 8, 256, 16, "model"), {"soft_cap": 50.0}),
        ((16, 8, 256, 4, "int8"), {"soft_cap": 50.0}),
        ((32, 16, 128, 16, "model"), {"soft_cap": 50.0}),
        ((32, 16, 128, 4, "int8"), {"soft_cap": 50.0}),
    ],
    ids=str,
)
def test_the_check_at_start(layer: tuple[Any, ...], special: dict[str, Any]) -> None:
    """Also replayed from graphs, and where launches depend on one another."""
    heads, kv_heads, head_size, k_bits, host_dtype = layer
    shape = CacheShape(
        1, heads, kv_heads, head_size, 16, 8, torch.bfloat16, k_bits, host_dtype
    )  # fmt: skip
    for rule, tail in ((sinks.RULES[2], "clip"), (sinks.RULES[0], "renormalize")):
        check_kernels(shape, rule, tail, "cuda", **special)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_size", [64, 256])
def test_a_step_with_a_soft_cap(head_size: int, dtype: torch.dtype) -> None:
    """All tokens are selected, so that it is the last token of exact attention."""
    shape, cap = Shape((300, 0, 33), 2, 2, head_size, 16, 8), 4.0
    case = build_case(shape, dtype, sharpness=3.0)
    layer = layer_of(case, Selection(None, None, 1, 8, "sum"), "renormalize", 256, "cuda")
    batch, out = replace(layer.batch, soft_cap=cap), torch.full_like(layer.batch.query, torch.nan)
    decode_step(layer.view, layer.workspace, batch, out)
    starts = torch.tensor([0, 1, 1, 2], dtype=torch.int32)
    expected = attend_full(
        case.query[[0, 2]], case.k_pages, case.v_pool, case.block_table, starts, case.seq_lens,
        case.scale, soft_cap=cap,
    )  # fmt: skip
    assert_close(out[[0, 2]], expected)
    assert not out[1].any()


@pytest.mark.parametrize("head_size", [64, 256])
def test_prompts_with_a_soft_cap(head_size: int) -> None:
    """The chosen kernel as plain torch has it."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn((37, heads, head_size), generator=generator).bfloat16().cuda()
        for heads in (4, 2, 2)
    )
    at = Ragged(torch.tensor([0, 20, 37], dtype=torch.int32, device="cuda"), 20, (20, 17))
    kernels = prefill.choose("auto", head_size, torch.bfloat16, capped=True)
    assert kernels.name != "xformers"
    batch = (3 * query, keys, values, at, at, True, head_size**-0.5, 4.0)
    found, expected = kernels.attend(*batch), prefill.attend_torch(*batch)
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1], torch.bfloat16)


@pytest.mark.parametrize(("model_type", "k_bits"), CASES)
def test_text_equals_stock(model_type: str, k_bits: int, engines: dict[Any, Future]) -> None:
    """In float32; where vLLM's kernels take bfloat16 only, up to ties."""
    stock, split = engines[model_type, None].result(), engines[model_type, k_bits].result()
    if model_type == STATES:
        assert_same_text_or_tie(split, stock)
    else:
        assert tokens_of(split) == tokens_of(stock)
    assert max(row["cached_tokens"] for row in split["batches"][1]) > 300
    texts = [tokens for batch in tokens_of(stock) for row in batch for tokens in row]
    assert len(set(map(tuple, texts))) == len(texts)
    figures = split["kcache_metrics"]
    assert figures["dropped_mass"][0] == [1e-4, figures["selected_lists"]]
    # Two layers of two KV heads, or four.
    assert figures["selected_lists"] % (8 if model_type == IMAGES else 4) == 0
    # Of some 90 steps those without a prompt's chunk come from graphs.
    if model_type != "llama4_text":
        assert figures["eager_decode_steps"] < 30
