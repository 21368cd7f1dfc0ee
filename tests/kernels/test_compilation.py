# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compile for GPUs that need not be there. (They run in tests/csrc/.)

The compiler needs the interpreter off, so the cases run in processes of their own.
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


def compiled(library: Path, capability: str) -> str:
    """What compiling for a GPU printed."""
    arguments = ("tests.csrc.interpreted", str(library), "tests.kernels.compilation")
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={
            # What was compiled stays with the clone. Triton looks at the sources itself.
            "TRITON_CACHE_DIR": str(FOLDER / "triton"), **os.environ, "TRITON_INTERPRET": "0",
            "OMP_NUM_THREADS": "1", "KCACHE_CAPABILITY": capability,
        },
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


@pytest.mark.parametrize("capability", ["8.6", "9.0"])
def test_kernels_compile(capability: str, library: Path) -> None:
    """For the GPUs with the most and the least shared memory of those that are served."""
    lines = compiled(library, capability.replace(".", ""))
    assert f"kernels compiled for compute capability {capability}" in lines
