# SPDX-License-Identifier: Apache-2.0
"""Decode steps of Triton and CUDA kernels together, without a GPU, against the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def test_steps_equal_reference(library: Path) -> None:
    """In a process of its own: the interpreter must be on before Triton is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.csrc.interpreted", str(library)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert "every step equals the reference" in done.stdout
