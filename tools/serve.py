# SPDX-License-Identifier: Apache-2.0
"""Serve a model with --kv-backend kcache and say how to try it once the server answers.

    python tools/serve.py MODEL [--port 8000] [-- FLAGS OF vllm serve]

Ctrl-C or SIGTERM ends the server and waits for it. The exit code is the server's.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType

HOST = "127.0.0.1"
PATIENCE_SECONDS = 20
CPU_KV_CACHE_GIB = 1  # of K; the host pool takes as much for V
TRY_IT = """
The server is ready. Try it from another terminal:

    curl http://{host}:{port}/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{{"model": "{name}", "temperature": 0, "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

Counters: curl -s http://{host}:{port}/metrics | grep vllm_kcache
Ctrl-C stops it.
"""  # noqa: E501 (a command to copy is one line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("--port", type=int, default=8000)
    own, flags = split_at_double_dash(sys.argv[1:])
    arguments = parser.parse_args(own)
    model = arguments.model.resolve()
    if not (model / "config.json").is_file():
        print(f"serve: {model} has no config.json; make model gets it", file=sys.stderr)
        return 1
    command = serve_command(model, arguments.port, flags)
    print(f"serve: {' '.join(command)}", flush=True)
    # In a session of its own, a Ctrl-C reaches it once, through us.
    server = subprocess.Popen(command, env=server_environment(), start_new_session=True)
    stopper = Stopper(server)
    signal.signal(signal.SIGINT, stopper.stop)
    signal.signal(signal.SIGTERM, stopper.stop)
    announce = threading.Thread(
        target=announce_when_ready, args=(server, arguments.port, model.name), daemon=True
    )
    announce.start()
    return stopper.wait()


class Stopper:
    """Ends the server: politely first, by force when asked again or when it takes too long.

    vLLM does not always end when it is told to in the middle of its start.
    """

    def __init__(self, server: subprocess.Popen[bytes]) -> None:
        self.server = server
        self.deadline: float | None = None

    def stop(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if self.deadline is None:
            print("serve: stopping", flush=True)
            self.deadline = time.monotonic() + PATIENCE_SECONDS
            self.server.send_signal(signal.SIGTERM)
        else:
            self.deadline = time.monotonic()

    def wait(self) -> int:
        """Exit code of the server, once it and its children are gone."""
        while self.server.poll() is None:
            if self.deadline is not None and time.monotonic() >= self.deadline:
                print("serve: it does not stop; killing it", flush=True)
                os.killpg(self.server.pid, signal.SIGKILL)
                return self.server.wait()
            time.sleep(0.1)
        return self.server.returncode


def split_at_double_dash(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Arguments before the first "--", and after it."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def serve_command(model: Path, port: int, flags: list[str]) -> list[str]:
    """`vllm serve` of this environment; later flags win over those set here."""
    vllm = Path(sys.executable).with_name("vllm")
    command = [str(vllm), "serve", str(model), "--served-model-name", model.name]
    command += ["--host", HOST, "--port", str(port), "--kv-backend", "kcache"]
    if not has_gpu():
        # Compiling for the CPU takes minutes and gains little on a small model.
        command += ["--enforce-eager"]
        if not has_fast_bfloat16():
            # Without the instructions bfloat16 is emulated, and slower than float32.
            command += ["--dtype", "float32"]
    return command + flags


def server_environment() -> dict[str, str]:
    environment = dict(os.environ)
    environment.setdefault("HF_HUB_OFFLINE", "1")
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not has_gpu():
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CPU_KV_CACHE_GIB))
    return environment


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def has_fast_bfloat16() -> bool:
    cpu_information = Path("/proc/cpuinfo")
    if not cpu_information.is_file():
        return False
    return any(flag in cpu_information.read_text() for flag in ("avx512_bf16", "amx_bf16"))


def announce_when_ready(server: subprocess.Popen[bytes], port: int, name: str) -> None:
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=2) as answer:
                if answer.status == 200:
                    print(TRY_IT.format(host=HOST, port=port, name=name), flush=True)
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
