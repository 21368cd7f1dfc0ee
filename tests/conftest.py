# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the tolerance of each dtype, and which tests need a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

# (relative, absolute), for results of order 1 that were accumulated in float32 (float64 for
# float64) and rounded to the dtype once. Nothing in the tests may be compared with other figures.
TOLERANCES = {
    torch.float64: (1e-10, 1e-11),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 1e-3),
    torch.bfloat16: (1e-2, 4e-3),
}


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None
) -> None:
    """Compare within the tolerance of `dtype`, that of `actual` unless told. NaN is never equal."""
    relative, absolute = TOLERANCES[dtype or actual.dtype]
    torch.testing.assert_close(
        actual.double().cpu(), expected.double().cpu(), rtol=relative, atol=absolute
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Long ones first: files that run side by side then end together.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension built for the CPU (tests/csrc/build.py), loaded. It is built once for each
    state of its sources."""
    from tests.csrc.build import build, compiler, key
    from tests.kept import keep, one_at_a_time, place

    if compiler() is None:
        pytest.skip("no C++ compiler: csrc/ cannot be run without a GPU")
    folder = tmp_path_factory.mktemp("csrc")
    path = place("kcache_emulated.so", key())
    with one_at_a_time("kcache_emulated.so"):
        if not path.exists():
            keep(path, lambda target: shutil.move(build(folder), target))
    torch.ops.load_library(str(path))
    return path
