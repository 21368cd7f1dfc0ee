# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels without a GPU: interpreted against the reference, and compiled.

The interpreter must be on before Triton is imported, and the compiler needs it off, so the cases
run in processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kept import FOLDER

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def run_interpreted(module: str) -> str:
    """Run `python -m module` under the interpreter; what it printed."""
    return run(module, interpret=True)


def run(module: str, *arguments: str, interpret: bool) -> str:
    """Run `python -m module`; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={
            # What was compiled stays with the clone. Triton looks at the sources itself.
            "TRITON_CACHE_DIR": str(FOLDER / "triton"),
            **os.environ,
            "TRITON_INTERPRET": str(int(interpret)),
            "OMP_NUM_THREADS": "1",
        },
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


def test_the_check_at_start_finds_faults() -> None:
    assert "faults are found" in run_interpreted("tests.kernels.self_checking")


@pytest.mark.parametrize("capability", ["8.6", "9.0"])
def test_kernels_compile(capability: str) -> None:
    """For the GPUs with the most and the least shared memory of those that are served."""
    number = capability.replace(".", "")
    lines = run("tests.kernels.compilation", number, interpret=False)
    assert f"kernels compiled for compute capability {capability}" in lines
