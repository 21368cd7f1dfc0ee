# SPDX-License-Identifier: Apache-2.0
"""Where a row of the results comes from: GPU, versions, commit, command, date."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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
    return " ".join([f"python -m benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


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
