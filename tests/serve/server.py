# SPDX-License-Identifier: Apache-2.0
"""A real `vllm serve` process for tests: start, ask, read its metrics, stop."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / "models" / "SmolLM2-135M-Instruct"
MODEL_NAME = "smollm2"
_SCRIPT = Path(sys.executable).with_name("vllm")
# vLLM unpacked into a folder has no script.
VLLM = [str(_SCRIPT)] if _SCRIPT.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
KV_CACHE_BYTES = 128 * 2**20
NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE, FLOAT32_BYTES = 30, 3, 64, 4
START_SECONDS = 240
STOP_SECONDS = 60


def environment() -> dict[str, str]:
    """The caller's environment, offline."""
    result = dict(os.environ, HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    result.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over --kv-cache-memory-bytes
    return result


class Server:
    """`vllm serve` with a small float32 cache, its output in a file.

    Args:
        log_path: Where standard output and error go.
        flags: Flags for `vllm serve` after the common ones.
    """

    def __init__(self, log_path: Path, flags: list[str]) -> None:
        self.log_path = log_path
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        # fmt: off
        command = [
            *VLLM, "serve", str(MODEL), "--served-model-name", MODEL_NAME,
            "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32",
            "--max-model-len", "2048", "--enforce-eager", *flags,
        ]
        # fmt: on
        with log_path.open("wb") as log:
            # A session of its own: whatever happens, the whole group can be ended.
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Return when the server answers.

        Raises:
            RuntimeError: It ended, or did not answer within START_SECONDS; with the end of its log.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"vllm serve ended with code {self.process.returncode}:\n{self.log_tail()}"
                )
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.25)
        raise RuntimeError(f"vllm serve did not answer in {START_SECONDS} s:\n{self.log_tail()}")

    def log_tail(self, lines: int = 200) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def metric(self, name: str, **labels: str) -> float:
        """One figure of /metrics, summed over the labels that are not named.

        Raises:
            KeyError: There is no such sample.
        """
        found = [
            sample.value for sample in self.samples(name) if labels.items() <= sample.labels.items()
        ]
        if not found:
            raise KeyError(f"/metrics has no sample {name} with {labels}")
        return sum(found)

    def buckets(self, name: str) -> dict[float, float]:
        """Cumulative counts of a histogram by upper bound."""
        return {
            float(sample.labels["le"]): sample.value for sample in self.samples(f"{name}_bucket")
        }

    def samples(self, name: str) -> list[Sample]:
        """Every sample of that name at /metrics."""
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        families = text_string_to_metric_families(text)
        return [sample for family in families for sample in family.samples if sample.name == name]

    def wait_until_idle(self, seconds: float = 20) -> None:
        """Return when no request runs and every block is free.

        Raises:
            AssertionError: Something is still held after that many seconds.
        """
        deadline = time.monotonic() + seconds
        while True:
            held = {
                "running requests": self.metric("vllm:num_requests_running"),
                "waiting requests": self.metric("vllm:num_requests_waiting"),
                "cache usage": self.metric("vllm:kv_cache_usage_perc"),
                "host pool blocks": self.metric("vllm_kcache_host_pool_blocks", state="used"),
            }
            if not any(held.values()):
                return
            assert time.monotonic() < deadline, f"still held after {seconds} s: {held}"
            time.sleep(0.2)

    def processes(self) -> list[psutil.Process]:
        """The server and every process under it."""
        main = psutil.Process(self.process.pid)
        return [main, *main.children(recursive=True)]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=STOP_SECONDS)

    def close(self) -> None:
        """End the server if it runs, and whatever of its process group is left after that.

        SIGKILL comes last: it also takes the process that frees the server's shared memory.
        """
        if self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
        deadline = time.monotonic() + 15
        while self._group_lives() and time.monotonic() < deadline:
            time.sleep(0.1)
        if self._group_lives():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=STOP_SECONDS)

    def _group_lives(self) -> bool:
        self.process.poll()
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True


@contextlib.contextmanager
def serving(folder: Path, *flags: str) -> Iterator[Server]:
    """A server of the split cache that answers, ended at the end; its log is in `folder`."""
    common = ["--kv-backend", "kcache", "--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
    running = Server(folder / "server.log", [*common, *flags])
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.close()


def counter_files(processes: list[psutil.Process]) -> set[Path]:
    """Files of the plugin in shared memory that these processes map."""
    maps = [Path(region.path) for process in processes for region in process.memory_maps()]
    shared = Path("/dev/shm")
    return {path for path in maps if path.parent == shared and "vllm_kcache" in path.name}


def complete(client: openai.OpenAI, prompt: str, tokens: int = 16) -> str:
    """Greedy text after a prompt."""
    answer = client.completions.create(
        model=MODEL_NAME, prompt=prompt, max_tokens=tokens, temperature=0
    )
    return answer.choices[0].text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
