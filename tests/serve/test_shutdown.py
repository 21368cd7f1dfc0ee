# SPDX-License-Identifier: Apache-2.0
"""The end of a server: it stops when told to, in the middle of a request, and leaves nothing."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serve.server import MODEL_NAME, Server, counter_files

pytestmark = pytest.mark.slow


def test_sigterm_in_mid_stream_ends_every_process(tmp_path: Path) -> None:
    server = Server(
        tmp_path / "server.log",
        ["--kv-backend", "kcache", "--kv-cache-memory-bytes", str(64 * 2**20)],
    )
    try:
        server.wait_until_ready()
        processes = server.processes()
        assert len(processes) > 1  # the engine core has a process of its own
        files = counter_files(processes)
        assert len(files) == 1  # one worker
        read_one_chunk_and_stop(server)
        assert server.process.returncode in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not alive, f"still alive: {alive}"
        assert not [path for path in files if path.exists()]
    finally:
        server.close()


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
