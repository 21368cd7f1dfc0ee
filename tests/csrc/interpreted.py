# SPDX-License-Identifier: Apache-2.0
"""Whole decode steps without a GPU: Triton kernels interpreted, the extension on the host.

TRITON_INTERPRET=1 python -m tests.csrc.interpreted LIBRARY MODULE
"""

from __future__ import annotations

import importlib
import sys

import torch

from tests.kernels.interpreter import patch_once_a_launch
from vllm_kcache.kernels import extension


def main() -> None:
    """Run `main` of a module of cases, with the emulated extension in place of the built one."""
    patch_once_a_launch()
    torch.ops.load_library(sys.argv[1])
    extension.load = lambda: None  # type: ignore[assignment]
    importlib.import_module(sys.argv[2]).main()


if __name__ == "__main__":
    main()
