# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels on small odd shapes, under Triton's interpreter, against the reference.

The interpreter must be on before Triton is imported, so the cases run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_interpreted(module: str) -> str:
    """Run `python -m module` under the interpreter; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def test_kernels_equal_reference() -> None:
    assert "cases equal the reference" in run_interpreted("tests.kernels.checks")


def test_reused_pages_never_serve_stale_v() -> None:
    assert "every step equals the reference" in run_interpreted("tests.kernels.simulation")
