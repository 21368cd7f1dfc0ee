# SPDX-License-Identifier: Apache-2.0
"""Models with window layers on a GPU: the text is stock vLLM's, through captured graphs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conftest import assert_close
from tests.gpu.comparing import GRAPHS
from tests.integration.engines import GATE, run_engine, tokens_of
from tests.integration.test_window_models import FULL, WINDOW, work
from tests.integration.tiny_models import write_window_model
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

# gpt-oss has learned sinks, Gemma 2 a soft cap on scores; Llama 4 in place of windows chunks, with
# which vLLM captures no decode steps.
MODELS = {"gemma3_text": (16, 4), "gpt_oss": (16, 4), "gemma2": (16, 4), "llama4_text": (4,)}
CASES = [(model, k_bits) for model, each in MODELS.items() for k_bits in each]


@pytest.fixture(scope="module", autouse=True)
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Any, Future]]:
    """Results by model and k_bits, None for stock vLLM's: all start at the same time, and kernels
    are tested meanwhile."""
    runs: dict[Any, Future] = {}
    with ThreadPoolExecutor(len(MODELS) + len(CASES)) as pool:
        for model_type, each in MODELS.items():
            folder = tmp_path_factory.mktemp(model_type)
            model = write_window_model(
                folder / "model", model_type, num_hidden_layers=4,
                layer_types=[WINDOW, FULL, WINDOW, FULL],
            )  # fmt: skip
            engine = {
                **GRAPHS, "model": model, "dtype": "float32", "skip_tokenizer_init": True,
                "max_model_len": 448, "max_num_batched_tokens": 256,
            }  # fmt: skip
            for k_bits in (None, *each):
                own = folder / str(k_bits)
                own.mkdir()
                settings = None if k_bits is None else {**GATE, "k_bits": k_bits}
                if settings is not None:
                    settings["hot_cache_gib"] = 0.25
                runs[model_type, k_bits] = pool.submit(run_engine, own, work(), settings, **engine)
        yield runs


@pytest.mark.parametrize(
    "case",
    itertools.product(sinks.SHAPES[:1], sinks.RULES[::2], sinks.GPU_KINDS, sinks.SOFT_CAPS),
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
def test_text_equals_stock_in_float32(
    model_type: str, k_bits: int, engines: dict[Any, Future]
) -> None:
    stock, split = engines[model_type, None].result(), engines[model_type, k_bits].result()
    assert tokens_of(split) == tokens_of(stock)
    assert max(row["cached_tokens"] for row in split["batches"][1]) > 300
    figures = split["kcache_metrics"]
    assert figures["dropped_mass"][0] == [1e-4, figures["selected_lists"]]
    # Two layers of two KV heads.
    assert figures["selected_lists"] % 4 == 0
