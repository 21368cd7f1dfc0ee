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


def test_kernels_equal_reference() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.checks"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert "cases equal the reference" in done.stdout
