# SPDX-License-Identifier: Apache-2.0
"""The extension on the CPU (build.py), in place of the one for GPUs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.csrc.build import build, compiler, key
from tests.kept import keep, one_at_a_time, place
from vllm_kcache.kernels import extension


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built library, loaded. It is built once for each state of its sources."""
    if compiler() is None:
        pytest.skip("no C++ compiler: csrc/ cannot be run without a GPU")
    folder = tmp_path_factory.mktemp("csrc")
    path = place("kcache_emulated.so", key())
    with one_at_a_time("kcache_emulated.so"):
        if not path.exists():
            keep(path, lambda target: shutil.move(build(folder), target))
    torch.ops.load_library(str(path))
    return path


@pytest.fixture
def emulated(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kernels` take the extension, on tensors of the CPU."""
    monkeypatch.setattr(extension, "available", lambda: True)
