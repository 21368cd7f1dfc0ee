# SPDX-License-Identifier: Apache-2.0
"""The emulator that runs csrc/ on the host: what it computes, and the faults it must not hide."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.csrc.build import compile_library, compiler, translate

FAULTS = Path(__file__).resolve().parent / "faults.cu"
LAUNCH_FAILURE = 719
Run = Callable[[int], tuple[int, np.ndarray]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a kernel of faults.cu: the launch's error, and 192 integers that it may have written."""
    if compiler() is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("faults")
    source = folder / "faults.cpp"
    source.write_text(translate(FAULTS.read_text()))
    library = ctypes.CDLL(str(compile_library([source], folder, "faults.so")))

    def call(which: int) -> tuple[int, np.ndarray]:
        out = np.full(192, -1, dtype=np.int32)
        return library.run(which, out.ctypes.data_as(ctypes.c_void_p)), out

    return call


def test_right_kernels_compute(run: Run) -> None:
    error, out = run(0)
    assert error == 0
    assert (out == 64 * 65 // 2).all()
    error, out = run(6)
    lane = np.arange(32)
    up = np.where(lane < 3, lane, lane - 3)
    assert error == 0
    assert (out[:64] == np.tile(up[lane ^ 1] + 100, 2)).all()


def test_a_missing_barrier_shows_in_the_result(run: Run) -> None:
    error, out = run(1)
    assert error == 0
    assert (out != 64 * 65 // 2).any()


def test_a_warp_may_be_far_ahead_of_another(run: Run) -> None:
    """Within some launches, a word that the other warp writes 40 exchanges before is not there."""
    results = [run(7) for _ in range(20)]
    assert all(error == 0 for error, _ in results)
    assert any((out == -7).any() for _, out in results)
    assert any((out == 1).any() for _, out in results)


def test_shared_memory_that_nobody_wrote_is_poison(run: Run) -> None:
    error, out = run(5)
    assert error == 0
    assert (out == -1).all()


@pytest.mark.parametrize("pending", [0, 1, 2])
def test_copies_are_not_there_before_a_wait(pending: int, run: Run) -> None:
    """Nor what they take the place of."""
    error, out = run(9 + pending)
    assert error == 0
    first, second, replaced = out.reshape(3, 64)
    assert (first == (7 if pending < 2 else -1)).all()
    assert (second == (7 if pending < 1 else -1)).all()
    assert (replaced == -1).all()


def test_thread_blocks_have_no_order(run: Run) -> None:
    first, second = run(8)[1], run(8)[1]
    assert sorted(first) == sorted(second) == list(range(192))
    assert (first != second).any()


@pytest.mark.parametrize(
    ("which", "text"),
    [
        (2, "at the same time"),
        (3, "waits for lanes that do not come"),
        (4, "wrote past the shared memory of line"),
    ],
    ids=["two barriers", "missing lanes", "past the end"],
)
def test_faults_are_errors(
    which: int, text: str, run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(which)[0] == LAUNCH_FAILURE
    assert text in capfd.readouterr().err
