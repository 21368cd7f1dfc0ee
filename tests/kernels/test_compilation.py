# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compile for GPUs that need not be there. (They run in tests/csrc/.)

The compiler needs the interpreter off, so the cases run in processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def compiled(library: Path, capability: str) -> str:
    """What compiling for a GPU printed."""
    arguments = ("tests.csrc.interpreted", str(library), "tests.kernels.compilation")
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={
            **os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1",
            "KCACHE_CAPABILITY": capability,
        },
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def test_kernels_compile(library: Path) -> None:
    """For the GPUs with the least and the most shared memory of those that are served."""
    with ThreadPoolExecutor() as pool:
        printed = pool.map(lambda capability: compiled(library, capability), ("86", "90"))
        for capability, lines in zip(("8.6", "9.0"), printed, strict=True):
            assert f"kernels compiled for compute capability {capability}" in lines
