# SPDX-License-Identifier: Apache-2.0
"""The extension on the CPU (build.py), in place of the one for GPUs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_kcache.kernels import extension


@pytest.fixture
def emulated(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kernels` take the extension, on tensors of the CPU."""
    monkeypatch.setattr(extension, "load", lambda: None)


@pytest.fixture
def clock_step(library: Path) -> object:
    """Sets how many nanoseconds pass each time that a kernel reads the clock; 0 stops it."""
    set_step: Callable[[int], None] = ctypes.CDLL(str(library)).emulator_set_clock_step
    set_step.argtypes = [ctypes.c_longlong]  # type: ignore[attr-defined]
    yield set_step
    set_step(1000)
