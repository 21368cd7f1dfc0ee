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


@pytest.mark.parametrize(
    ("module", "printed"),
    [
        ("tests.kernels.checks", "cases equal the reference"),
        ("tests.kernels.simulation", "every step equals the reference"),
        ("tests.kernels.split_cache", "runs equal the CPU's"),
        ("tests.kernels.attend_rows", "attend as defined"),
        ("tests.kernels.code_steps", "checks are as defined"),
        ("tests.kernels.sinks", "checks with sinks are as defined"),
        ("tests.kernels.joint_steps", "tokens a request are as defined"),
        ("tests.kernels.self_checking", "faults are found"),
        ("tests.kernels.test_replay", "equal the definition"),
    ],
)
def test_interpreted(module: str, printed: str, library: Path) -> None:
    """In a process of its own: the interpreter must be on before Triton is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.csrc.interpreted", str(library), module],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert printed in done.stdout
