# SPDX-License-Identifier: Apache-2.0
"""Features of vLLM over the split cache on a GPU, in few engines: each batch tries one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu.adapter import RANK, write_adapter
from tests.gpu.comparing import (
    GRAPHS,
    LONG,
    MEMORY,
    SHARED,
    SHORT,
    assert_same_text_or_tie,
    run_both,
)
from tests.integration.engines import GATE, MODEL, kjv, tokens_of

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

GREEDY = {"max_tokens": 40, "logprobs": 5, "ignore_eos": True}
# Sequences of one prompt go different ways; the most likely token alone takes all of them one way.
SAMPLED = {"max_tokens": 24, "n": 4, "temperature": 1.0, "seed": 7, "ignore_eos": True}
SEVERAL = {**GREEDY, "n": 3, "temperature": 1.0, "top_k": 1}


def mixed(many: int) -> dict[str, Any]:
    """Prompts and answers of all lengths: while some decode, others come in chunks."""
    prompts = [kjv(25 * i, 1 + 7 * i % 40) for i in range(many)]
    sampling = [{**GREEDY, "max_tokens": 8 + 11 * i % 90} for i in range(many)]
    return {"prompts": prompts, "sampling": sampling}


def test_parallel_sampling_and_chunks_in_float32(tmp_path: Path) -> None:
    work = [
        {"prompts": [kjv(10, 12), SHORT[1]], "sampling": SAMPLED},
        {"prompts": [kjv(10, 12), LONG], "sampling": SEVERAL},
        {"prompts": [LONG + " And Jacob said", *SHORT], "sampling": SAMPLED},
        mixed(24),
    ]
    engine = {**GRAPHS, "dtype": "float32", "max_num_batched_tokens": 512}
    stock, split = run_both(tmp_path, work, GATE, **engine)
    assert tokens_of(split) == tokens_of(stock)
    # Each batch did what it is there for.
    sampled, several, later, _ = tokens_of(split)
    assert len(set(map(tuple, sampled[0]))) > 1
    assert all(len(set(map(tuple, sequences))) == 1 for sequences in several)
    assert len(set(map(tuple, later[0]))) > 1
    assert split["batches"][2][0]["cached_tokens"] > 2000
    assert split["prefill_kernel"] == "torch"


def test_lora_torch_compile_and_flash_attention_in_bfloat16(tmp_path: Path) -> None:
    """vLLM's own compilation and graphs, asynchronous scheduling, chunks beside decodes.

    LoRA is here because vLLM's kernels for it take no float32 on a GPU.
    """
    adapter = str(write_adapter(tmp_path / "adapter", Path(MODEL)))
    plain = [*SHORT, SHARED]
    work = [
        {"prompts": plain, "sampling": GREEDY},
        {"prompts": plain, "sampling": GREEDY, "lora": [adapter] * 4},
        {"prompts": plain, "sampling": GREEDY, "lora": [adapter, None] * 2},
        {"prompts": [LONG, kjv(10, 12)], "sampling": SEVERAL},
        {"prompts": [LONG + " In the beginning", SHARED + " And"], "sampling": GREEDY},
        mixed(40),
    ]
    engine = {
        **MEMORY,
        "enforce_eager": False,
        "block_size": 16,
        "dtype": "bfloat16",
        "max_num_batched_tokens": 512,
        "enable_lora": True,
        "max_lora_rank": RANK,
        # Few sizes: each is captured, and compiled code is the same for all.
        "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 48]},
    }
    stock, split = run_both(tmp_path, work, {**GATE, "prefill": "flash_attn"}, **engine)
    assert_same_text_or_tie(split, stock)
    # Adapted texts are others, with and without plain requests beside them.
    base, adapted, alternating = tokens_of(split)[:3]
    assert all(a != b for a, b in zip(base, adapted, strict=True))
    assert all(a != b for a, b in zip(base[::2], alternating[::2], strict=True))
    # A prefix that was computed without the adapter is none with it, and the other way round.
    assert split["batches"][1][3]["cached_tokens"] == 0
    assert split["batches"][2][3]["cached_tokens"] > 500
    assert split["batches"][4][0]["cached_tokens"] > 2000
    assert split["prefill_kernel"] == "flash_attn"
    assert split["async_scheduling"] == stock["async_scheduling"] is True
