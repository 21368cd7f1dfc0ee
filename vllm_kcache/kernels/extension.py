# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the compiled extension (csrc/), which selects and fetches on a GPU."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

FILE_NAME = "_C.abi3.so"


class ExtensionError(RuntimeError):
    """The extension is not there, or does not load. The message says what to do."""


def path() -> Path:
    """Where the build puts the extension, built or not."""
    return Path(__file__).resolve().parents[1] / FILE_NAME


@functools.cache
def load() -> None:
    """Load the extension.

    Raises:
        ExtensionError: It was not built, or it does not load with this PyTorch.
    """
    if not path().exists():
        raise ExtensionError(
            "vllm-kcache was installed without its CUDA extension, which a GPU needs: install its "
            "wheel, or install it from source where nvcc and PyTorch for CUDA are found "
            "(docs/install-and-serve.md)"
        )
    try:
        torch.ops.load_library(str(path()))
    except OSError as error:
        raise ExtensionError(
            f"{path()} does not load with torch {torch.__version__} ({error}): install vllm-kcache "
            "again"
        ) from error
