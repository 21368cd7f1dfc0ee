# SPDX-License-Identifier: Apache-2.0
"""The hot V cache on a GPU: requests come and go over few pages, and no step attends to stale V."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import simulation
from vllm_kcache.kernels import extension

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]


def test_reused_pages_never_serve_stale_v() -> None:
    simulation.check("cuda", rounds=150, sizes=(8, 24, 64, 200))


def test_triton_kernels_alone() -> None:
    """The same with the extension switched off, in a process of its own."""
    code = "from tests.kernels import simulation as s; s.check('cuda', rounds=60, sizes=(8, 64))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, extension.SWITCH: "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
