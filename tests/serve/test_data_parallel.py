# SPDX-License-Identifier: Apache-2.0
"""Two engines behind two API server processes: one port, one budget of host memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.serve.server import MODEL_NAME, Server

pytestmark = pytest.mark.slow

ENGINES = ("0", "1")
# As many blocks as an engine has; host memory for three quarters of what both would take.
KV_CACHE_BYTES, HOST_GIB = 128 * 2**20, 0.1875
NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE, FLOAT32_BYTES = 30, 3, 64, 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log_path = tmp_path_factory.mktemp("serve") / "server.log"
    flags = [
        "--kv-backend", "kcache", "--kv-cache-memory-bytes", str(KV_CACHE_BYTES),
        "--kcache-config.host_memory_gib", str(HOST_GIB), "--data-parallel-size", "2",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as environment:
        # Two engines share few cores here.
        environment.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        running = Server(log_path, flags)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.close()


def test_both_engines_answer_and_are_counted(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:

        def complete(_: int) -> str:
            answer = client.completions.create(
                model=MODEL_NAME, prompt="The capital of France is", max_tokens=8, temperature=0
            )
            return answer.choices[0].text

        with ThreadPoolExecutor(8) as clients:
            texts = set(clients.map(complete, range(16)))
    assert len(texts) == 1
    assert "Paris" in texts.pop()
    for engine in ENGINES:
        lists = server.metric("vllm_kcache_selected_blocks_count", engine=engine)
        assert lists > 0
        assert lists % (NUM_LAYERS * NUM_KV_HEADS) == 0
    # 16 requests of 8 tokens, whose first is prefill's.
    assert server.metric("vllm_kcache_selected_blocks_count") >= 16 * 7 * NUM_LAYERS * NUM_KV_HEADS


def test_engines_share_host_memory(server: Server) -> None:
    blocks = {
        server.metric("vllm_kcache_host_pool_blocks", engine=engine, state="total")
        for engine in ENGINES
    }
    info = server.samples("vllm:cache_config_info")
    (tokens,) = {int(sample.labels["block_size"]) for sample in info}
    v_bytes = NUM_LAYERS * NUM_KV_HEADS * HEAD_SIZE * FLOAT32_BYTES * tokens
    assert blocks == {int(HOST_GIB * 2**30 / len(ENGINES)) // v_bytes}
