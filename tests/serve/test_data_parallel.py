# SPDX-License-Identifier: Apache-2.0
"""Two engines behind two API server processes: one port, one budget of host memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.serve.server import (
    FLOAT32_BYTES,
    HEAD_SIZE,
    NUM_KV_HEADS,
    NUM_LAYERS,
    Server,
    complete,
    serving,
)

pytestmark = pytest.mark.slow

ENGINES = ("0", "1")
# Three quarters of what the V of both engines' blocks would take.
HOST_GIB = 0.1875
FLAGS = (f"--kcache-config.host_memory_gib={HOST_GIB}", "--data-parallel-size=2")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as environment:
        # Two engines share few cores here.
        environment.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        with serving(tmp_path_factory.mktemp("serve"), *FLAGS) as running:
            yield running


def check_both_engines_answer(server: Server) -> None:
    """Requests reach both engines, and the metrics tell them apart."""
    prompts = ["The capital of France is"] * 16
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client,
        ThreadPoolExecutor(8) as clients,
    ):
        texts = set(clients.map(lambda prompt: complete(client, prompt, tokens=8), prompts))
    assert len(texts) == 1
    assert "Paris" in texts.pop()
    for engine in ENGINES:
        lists = server.metric("vllm_kcache_selected_blocks_count", engine=engine)
        assert lists > 0
        assert lists % (NUM_LAYERS * NUM_KV_HEADS) == 0
    # 16 requests of 8 tokens, whose first is prefill's.
    assert server.metric("vllm_kcache_selected_blocks_count") >= 16 * 7 * NUM_LAYERS * NUM_KV_HEADS


def check_host_memory_is_shared(server: Server) -> None:
    """Each engine has the blocks that half of the host memory holds."""
    blocks = {
        server.metric("vllm_kcache_host_pool_blocks", engine=engine, state="total")
        for engine in ENGINES
    }
    info = server.samples("vllm:cache_config_info")
    (tokens,) = {int(sample.labels["block_size"]) for sample in info}
    row_bytes = NUM_LAYERS * NUM_KV_HEADS * 2 * HEAD_SIZE * FLOAT32_BYTES * tokens
    assert blocks == {int(HOST_GIB * 2**30 / len(ENGINES)) // row_bytes}


def test_both_engines_answer_and_are_counted(server: Server) -> None:
    check_both_engines_answer(server)


def test_engines_share_host_memory(server: Server) -> None:
    check_host_memory_is_shared(server)
