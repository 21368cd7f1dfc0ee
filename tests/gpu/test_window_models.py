# SPDX-License-Identifier: Apache-2.0
"""Models with window layers on a GPU: the text is stock vLLM's, through captured graphs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.comparing import GRAPHS, run_both
from tests.integration.engines import GATE, tokens_of
from tests.integration.test_window_models import FULL, WINDOW, work
from tests.integration.tiny_models import write_window_model
from tests.kernels import sinks

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.parametrize(
    "case", itertools.product(sinks.SHAPES, sinks.RULES, sinks.GPU_KINDS), ids=str
)
def test_steps_of_codes_with_sinks(case: tuple[Any, ...]) -> None:
    shape, rule, kind = case
    sinks.check(shape, rule, *kind, device="cuda")


@pytest.mark.parametrize(
    ("model_type", "k_bits"),
    [("gemma3_text", 16), ("gemma3_text", 4), ("gpt_oss", 16), ("gpt_oss", 4)],
)
def test_text_equals_stock_in_float32(model_type: str, k_bits: int, tmp_path: Path) -> None:
    model = write_window_model(
        tmp_path / "model", model_type, num_hidden_layers=4,
        layer_types=[WINDOW, FULL, WINDOW, FULL],
    )  # fmt: skip
    engine = {
        **GRAPHS, "model": model, "dtype": "float32", "skip_tokenizer_init": True,
        "max_model_len": 448, "max_num_batched_tokens": 256,
    }  # fmt: skip
    settings = {**GATE, "k_bits": k_bits, "hot_cache_gib": 0.25}
    stock, split = run_both(tmp_path, work(), settings, **engine)
    assert tokens_of(split) == tokens_of(stock)
    assert max(row["cached_tokens"] for row in split["batches"][1]) > 300
    figures = split["kcache_metrics"]
    assert figures["dropped_mass"][0] == [1e-4, figures["selected_lists"]]
    # Two layers of two KV heads.
    assert figures["selected_lists"] % 4 == 0
