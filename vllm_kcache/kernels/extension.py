# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled extension (csrc/), which selects and fetches on a GPU."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

FILE_NAME = "_C.abi3.so"


def path() -> Path:
    """Where the build puts the extension, built or not."""
    return Path(__file__).resolve().parents[1] / FILE_NAME


@functools.cache
def load() -> None:
    """Make `torch.ops.kcache` available, at the first call.

    Raises RuntimeError when the extension was not built or does not load.
    """
    if not path().exists():
        raise RuntimeError(
            f"{path()} is missing: vllm-kcache was installed without its CUDA extension. Install "
            "it again where nvcc and PyTorch for CUDA are found"
        )
    try:
        torch.ops.load_library(str(path()))
    except OSError as error:
        raise RuntimeError(
            f"{path()} does not load with torch {torch.__version__}: install vllm-kcache again"
        ) from error
