# SPDX-License-Identifier: Apache-2.0
"""A server on a GPU: one answer, and the figures that stand at /metrics when it is there."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from tests.serve.server import (
    FLOAT32_BYTES,
    HEAD_SIZE,
    MODEL_NAME,
    NUM_KV_HEADS,
    NUM_LAYERS,
    serving,
)

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

# Other tests use the same GPU.
SHARE = "--gpu-memory-utilization=0.1"
V_BLOCK_TOKENS = 8
DECODE_STEPS = 7


@pytest.mark.parametrize("k_bits", [16, 4])
def test_figures_are_there_with_the_answer(k_bits: int, tmp_path: Path) -> None:
    """No step comes after the last token to carry them over. The server runs without graphs."""
    prompt = "The lighthouse keeper wrote down the wind, the tide and the ships that passed. " * 90
    with serving(tmp_path, SHARE, f"--kcache-config.k_bits={k_bits}") as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
            answer = client.completions.create(
                model=MODEL_NAME,
                prompt=prompt,
                max_tokens=1 + DECODE_STEPS,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 1 + DECODE_STEPS
        lists = server.metric("vllm_kcache_selected_blocks_count")
        assert lists == DECODE_STEPS * NUM_LAYERS * NUM_KV_HEADS
        selected = server.metric("vllm_kcache_selected_blocks_sum")
        assert 0 < selected < 0.9 * lists * answer.usage.prompt_tokens / V_BLOCK_TOKENS
        hits = server.metric("vllm_kcache_hot_cache_hits_total")
        host_rows = server.metric("vllm_kcache_hot_cache_misses_total") + server.metric(
            "vllm_kcache_direct_host_reads_total"
        )
        # With K codes the prompt's rows are resident from the start.
        assert host_rows > 0 or k_bits == 4
        assert hits + host_rows == selected
        row_bytes = V_BLOCK_TOKENS * HEAD_SIZE * FLOAT32_BYTES * (1 if k_bits == 16 else 2)
        assert server.metric("vllm_kcache_fetched_bytes_total") == host_rows * row_bytes
        assert max(server.buckets("vllm_kcache_dropped_mass").values()) == lists
        assert server.metric("vllm_kcache_eager_decode_steps_total") == DECODE_STEPS
