# SPDX-License-Identifier: Apache-2.0
"""The hot V cache on a GPU: requests come and go over few pages, and no step attends to stale V."""

from __future__ import annotations

import pytest
import torch

from benchmarks.replay.residency import compare_copies
from tests.kernels import simulation

pytestmark = pytest.mark.gpu

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
    resident, stale = compare_copies(run.cache, [view.host_rows for view in run.views])
    assert resident > 20
    assert (stale == 0) == update
