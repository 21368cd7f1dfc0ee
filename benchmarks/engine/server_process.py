# SPDX-License-Identifier: Apache-2.0
"""The `vllm serve` that benchmarks/engine/server.py measures."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from benchmarks.rows import ROOT
from tests.serve.server import VLLM, Server, free_port


class BenchmarkServer(Server):
    """`vllm serve` as the options say, its output in a file.

    Args:
        log_path: where standard output and error go.
        arguments: of `vllm serve`, without host and port.
    """

    def __init__(self, log_path: Path, arguments: list[str]) -> None:
        self.log_path = log_path
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
        }  # fmt: skip
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        with log_path.open("wb") as log:
            # A session of its own: whatever happens, the whole group can be ended.
            self.process = subprocess.Popen(
                [*VLLM, "serve", *arguments, *where],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def figures(self, names: Iterable[str]) -> dict[str, float]:
        """Figures of /metrics, by name."""
        return {name: self.metric(name) for name in names}

    def cache_tokens(self) -> int:
        """Tokens of cache that the engine has."""
        (info,) = self.samples("vllm:cache_config_info")
        return int(info.labels["num_gpu_blocks"]) * int(info.labels["block_size"])
