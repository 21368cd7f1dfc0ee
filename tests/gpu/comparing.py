# SPDX-License-Identifier: Apache-2.0
"""Engines of the GPU tests, and how their texts are compared with stock vLLM's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.integration.engines import kjv, run_engine

# Several engines and the kernels' tests share the GPU at the same time. So the memory of the cache
# is set and not measured: another process that ends meanwhile would upset the measurement.
MEMORY = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 3 << 30}
# Full decode graphs without torch.compile: what decides is captured, and start-up stays short.
GRAPHS = {
    **MEMORY,
    "enforce_eager": False,
    "block_size": 16,
    # Few sizes, so that most batches are padded and the largest run without a graph.
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 48],
    },
}
# In bfloat16 two tokens may tie: the model's logits, 16 to 32 in size, come in steps of 0.125, and
# any difference in the order of sums moves one by a step. The first difference is allowed only
# where stock itself puts the two tokens within two steps. In float32 there is no such rule.
TIE_NATS = 0.25

SHORT = ["The capital of France is", "Once upon a time", "def fibonacci(n):"]
LONG = kjv(0, 100)
SHARED = kjv(300, 40)


def batches(max_tokens: int, many: int) -> list[dict[str, Any]]:
    """Short and long prompts, then prefix hits, then many at once."""
    sampling = {"max_tokens": max_tokens, "logprobs": 5, "ignore_eos": True}
    return [
        {"prompts": [*SHORT, LONG, SHARED], "sampling": sampling},
        {
            "prompts": [LONG + " In the beginning", SHARED + " And Jacob said", LONG + " And"],
            "sampling": sampling,
        },
        {"prompts": [kjv(20 * i, 4 + i % 9) for i in range(many)], "sampling": sampling},
    ]


def run_both(
    tmp_path: Path, work: list[dict[str, Any]], kcache: dict[str, Any], **engine: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same batches on stock vLLM and on the split cache, side by side on the GPU."""
    with ThreadPoolExecutor(2) as pool:
        stock = pool.submit(run_engine, tmp_path, work, **engine)
        split = pool.submit(run_engine, tmp_path, work, kcache=kcache, **engine)
        return stock.result(), split.result()


def assert_same_text_or_tie(split: dict[str, Any], stock: dict[str, Any]) -> None:
    """Each request's tokens are equal, or first differ where stock has a tie."""
    equal = total = 0
    for ours, theirs in zip(split["batches"], stock["batches"], strict=True):
        for row, expected in zip(ours, theirs, strict=True):
            for mine, other, steps in zip(
                row["tokens"], expected["tokens"], expected["top"], strict=True
            ):
                total += 1
                if mine == other:
                    equal += 1
                    continue
                at = next(i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b)
                top = steps[at]
                assert str(mine[at]) in top, f"token {at}: {mine[at]} is not among stock's first"
                gap = top[str(other[at])] - top[str(mine[at])]
                assert gap <= TIE_NATS, f"token {at}: stock prefers its own by {gap:.3f} nats"
    print(f"identical texts: {equal} of {total}")
    assert equal >= 0.6 * total
