# SPDX-License-Identifier: Apache-2.0
"""The hot V cache on a GPU: requests come and go over few pages, and no step attends to stale V."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.replay.residency import compare_copies
from tests.kernels import simulation
from vllm_kcache.kernels import extension

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
DEVICE, ROUNDS = "cuda", 150


def test_reused_pages_never_serve_stale_v() -> None:
    simulation.check(DEVICE, rounds=ROUNDS, sizes=(8, 24, 64, 200))


@pytest.mark.parametrize("update", [True, False], ids=["coherent", "update-switched-off"])
def test_comparing_all_copies_with_the_host(update: bool) -> None:
    """What mixed loads end with: no stale copy is left, and it would be seen."""
    run = simulation.Simulation(DEVICE, 200, write_update=update, seed=1)
    run.run(ROUNDS)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    resident, stale = compare_copies(run.cache, list(run.v_pool))
    assert resident > 20
    assert (stale == 0) == update


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
