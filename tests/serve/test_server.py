# SPDX-License-Identifier: Apache-2.0
"""A real server process with --kv-backend kcache, its default settings, and real clients.

One server for all: the last test ends it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.serve.server import (
    FLOAT32_BYTES,
    HEAD_SIZE,
    KV_CACHE_BYTES,
    MODEL_NAME,
    NUM_KV_HEADS,
    NUM_LAYERS,
    Server,
    complete,
    counter_files,
    serving,
)

pytestmark = pytest.mark.slow

PARALLEL_CLIENTS = 16
SHARED_MEMORY = Path("/dev/shm")
# fmt: off
FRUITS = (
    "apple", "banana", "cherry", "damson", "elderberry", "fig", "grape", "hazelnut",
    "imbe", "jackfruit", "kiwi", "lemon", "mango", "nectarine", "orange", "papaya",
)
# fmt: on


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("serve")) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as made:
        yield made
    server.wait_until_idle()


def test_completion(client: openai.OpenAI) -> None:
    assert "Paris" in complete(client, "The capital of France is", tokens=8)


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=24,
        temperature=0,
    )
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens <= 24


def test_streamed_text_is_the_text(client: openai.OpenAI) -> None:
    prompt = "Water boils when"
    chunks = client.completions.create(
        model=MODEL_NAME, prompt=prompt, max_tokens=32, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert len(pieces) > 8
    assert "".join(pieces) == complete(client, prompt, tokens=32)


def test_a_long_prompt_decodes_from_a_selection(server: Server, client: openai.OpenAI) -> None:
    """1500 tokens: decode steps leave blocks out, and the figures say so."""
    sentence = "The lighthouse keeper wrote down the wind, the tide and the ships that passed. "
    lists_before = server.metric("vllm_kcache_selected_blocks_count")
    selected_before = server.metric("vllm_kcache_selected_blocks_sum")
    bytes_before = server.metric("vllm_kcache_fetched_bytes_total")
    dropped_before = server.buckets("vllm_kcache_dropped_mass")
    answer = client.completions.create(
        model=MODEL_NAME,
        prompt=sentence * 90,
        max_tokens=8,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage.prompt_tokens > 1400
    assert answer.usage.completion_tokens == 8
    # The first token comes from the prefill; each later one is a decode step of every layer.
    lists = server.metric("vllm_kcache_selected_blocks_count") - lists_before
    assert lists == 7 * NUM_LAYERS * NUM_KV_HEADS
    selected = server.metric("vllm_kcache_selected_blocks_sum") - selected_before
    v_block_tokens = 8
    all_blocks = answer.usage.prompt_tokens // v_block_tokens
    assert 0 < selected < 0.9 * lists * all_blocks
    fetched_bytes = server.metric("vllm_kcache_fetched_bytes_total") - bytes_before
    # K and V, which answer.
    assert fetched_bytes == selected * v_block_tokens * 2 * HEAD_SIZE * FLOAT32_BYTES
    dropped = {
        bound: count - dropped_before[bound]
        for bound, count in server.buckets("vllm_kcache_dropped_mass").items()
    }
    # At this length every list keeps most of the mass, and some drop something.
    assert dropped[math.inf] == lists
    assert dropped[max(bound for bound in dropped if bound < 0.6)] == lists
    assert dropped[min(dropped)] < lists


def test_host_pool_mirrors_the_device_cache(server: Server) -> None:
    blocks = server.metric("vllm_kcache_host_pool_blocks", state="total")
    block_tokens = 128
    code_block_bytes = NUM_LAYERS * NUM_KV_HEADS * block_tokens * (HEAD_SIZE // 2 + 4)
    assert blocks == KV_CACHE_BYTES // code_block_bytes


def test_metrics_survive_what_lies_where_the_counters_should(server: Server) -> None:
    """A folder made all of /metrics an error, a pipe made it wait and the server with it."""
    (path,) = counter_files(server.processes())
    kept = path.with_name(f"{path.name}.kept")
    path.rename(kept)
    plants = (
        (path.mkdir, path.rmdir),
        (lambda: os.mkfifo(path), path.unlink),
        (lambda: path.write_bytes(b"\xff" * 4096), path.unlink),
        (lambda: path.symlink_to(kept), path.unlink),
    )
    try:
        for plant, remove in plants:
            plant()
            try:
                answer = httpx.get(f"{server.url}/metrics", timeout=10)
                assert answer.status_code == 200
                assert server.metric("vllm_kcache_host_pool_blocks", state="total") == 0
                assert server.metric("vllm:num_requests_running") == 0
            finally:
                remove()
    finally:
        kept.rename(path)
    assert server.metric("vllm_kcache_host_pool_blocks", state="total") > 0
    assert "cannot be read" in server.log_tail()


def test_sixteen_clients_get_their_own_answers(server: Server, client: openai.OpenAI) -> None:
    """Each of 16 at once gets, word for word, what it gets alone."""
    prompts = [f"A short poem about the {fruit}:\n" for fruit in FRUITS]
    assert len(prompts) == PARALLEL_CLIENTS
    alone = [complete(client, prompt) for prompt in prompts]
    assert len(set(alone)) > PARALLEL_CLIENTS // 2  # a mix-up would show
    with ThreadPoolExecutor(PARALLEL_CLIENTS) as pool:
        together = list(pool.map(lambda prompt: complete(client, prompt), prompts))
    assert together == alone


def test_a_client_that_leaves_frees_its_blocks(server: Server, client: openai.OpenAI) -> None:
    generated = server.metric("vllm:generation_tokens_total")
    body = {
        "model": MODEL_NAME,
        "prompt": "Once upon a time",
        "max_tokens": 2000,
        "ignore_eos": True,
        "stream": True,
    }
    lines = 0
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: "):
                json.loads(line.removeprefix("data: "))
                lines += 1
            if lines == 5:
                assert server.metric("vllm_kcache_host_pool_blocks", state="used") > 0
                break
    server.wait_until_idle()
    # It stopped because the client left, not because it came to the end of 2000 tokens.
    assert 5 <= server.metric("vllm:generation_tokens_total") - generated < 500
    assert "Paris" in complete(client, "The capital of France is", tokens=8)


def test_clients_leaving_a_full_server_free_everything(server: Server) -> None:
    """Sixteen streams of 48 tokens, every other one left after three chunks."""

    def run(number: int) -> int:
        body = {
            "model": MODEL_NAME,
            "prompt": f"Chapter {number}. ",
            "max_tokens": 48,
            "ignore_eos": True,
            "stream": True,
        }
        chunks = 0
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as answer:
            for line in answer.iter_lines():
                chunks += line.startswith("data: {")
                if number % 2 and chunks == 3:
                    break
        return chunks

    with ThreadPoolExecutor(PARALLEL_CLIENTS) as pool:
        chunks = list(pool.map(run, range(PARALLEL_CLIENTS)))
    assert all(count == 3 for count in chunks[1::2])
    assert all(count > 3 for count in chunks[::2])
    server.wait_until_idle()
    assert server.process.poll() is None


def test_sigterm_in_mid_stream_ends_every_process(server: Server) -> None:
    """It stops when told to, in the middle of a request, and leaves nothing. Ends the server."""
    processes = server.processes()
    assert len(processes) > 1  # the engine core has a process of its own
    files = counter_files(processes)
    assert len(files) == 1  # one worker
    read_one_chunk_and_stop(server)
    assert server.process.returncode in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive, f"still alive: {alive}"
    assert not [path for path in files if path.exists()]


def read_one_chunk_and_stop(server: Server) -> None:
    body = {
        "model": MODEL_NAME,
        "prompt": "Once upon a time",
        "max_tokens": 1900,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        next(line for line in answer.iter_lines() if line.startswith("data: "))
        told = time.monotonic()
        server.stop(signal.SIGTERM)
    assert time.monotonic() - told < 30
