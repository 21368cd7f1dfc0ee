# SPDX-License-Identifier: Apache-2.0
"""Whole decode steps without a GPU: Triton kernels interpreted, the extension on the host.

TRITON_INTERPRET=1 python -m tests.csrc.interpreted LIBRARY
"""

from __future__ import annotations

import sys

import torch

from tests.kernels import checks, simulation
from vllm_kcache.kernels import extension


def main() -> None:
    """Steps, caches and pages as in tests/kernels; any difference raises."""
    torch.ops.load_library(sys.argv[1])
    extension.load = lambda: None  # type: ignore[assignment]
    checks.main()
    simulation.check("cpu", rounds=9, sizes=(8,))
    print("every step equals the reference")


if __name__ == "__main__":
    main()
