# SPDX-License-Identifier: Apache-2.0
"""What the default selection costs, on real text, through the decode path of the real engine."""

from __future__ import annotations

import argparse
import inspect
import math
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.integration.engines import MODEL, kjv, run_engine

pytestmark = pytest.mark.slow

CONTEXT_TOKENS = 2048
FORCED_TOKENS = 160


def test_default_keeps_the_perplexity(tmp_path: Path) -> None:
    """Teacher-forced: prose and source code, against stock vLLM, within 1%."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [kjv(0, 120), kjv(900, 120), kjv(1800, 120), inspect.getsource(argparse)]
    tokens = [tokenizer(text)["input_ids"] for text in texts]
    assert min(map(len, tokens)) > CONTEXT_TOKENS + FORCED_TOKENS
    batch = {
        "prompts": [row[:CONTEXT_TOKENS] for row in tokens],
        "forced": [row[CONTEXT_TOKENS : CONTEXT_TOKENS + FORCED_TOKENS] for row in tokens],
        "sampling": {},
    }
    stock = run_engine(tmp_path, [batch])
    split = run_engine(tmp_path, [batch], kcache={})

    def perplexity(result: dict) -> float:
        logprobs = [value for row in result["batches"][0] for value in row["logprobs"]]
        assert len(logprobs) == len(texts) * FORCED_TOKENS
        return math.exp(-sum(logprobs) / len(logprobs))

    forced = [row["tokens"][0] for row in split["batches"][0]]
    assert forced == batch["forced"], "a token was not forced"
    metrics = split["kcache_metrics"]
    selected_tokens = metrics["mean_selected_blocks"] * 16
    print(
        f"perplexity {perplexity(split):.4f} against {perplexity(stock):.4f}, "
        f"{selected_tokens:.0f} tokens a head of {CONTEXT_TOKENS}"
    )
    # Most of V is not read, or this would show nothing.
    assert selected_tokens < 0.45 * CONTEXT_TOKENS
    assert perplexity(split) == pytest.approx(perplexity(stock), rel=0.01)
