# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the compiled extension (csrc/). Without it the Triton kernels do all the work."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

import torch

from vllm_kcache.kernels import meta

logger = logging.getLogger(__name__)

# The environment switch by which tests run the Triton kernels beside the extension.
SWITCH = "VLLM_KCACHE_EXTENSION"
FILE_NAME = "_C.abi3.so"


def path() -> Path:
    """Where the build puts the extension, built or not."""
    return Path(__file__).resolve().parents[1] / FILE_NAME


@functools.cache
def available() -> bool:
    """Load the extension at the first call. False when it was not built or is switched off.

    Raises RuntimeError when it was built but does not load: a broken build is not passed over.
    """
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise RuntimeError(f"{SWITCH}={switch}: must be 0 or 1")
    if switch == "0" or not torch.cuda.is_available():
        return False
    if not path().exists():
        logger.warning(
            "vllm-kcache was installed without its CUDA extension (nvcc or PyTorch for CUDA was "
            "not found then): select and fetch run on the slower Triton kernels"
        )
        return False
    try:
        torch.ops.load_library(str(path()))
    except OSError as error:
        raise RuntimeError(
            f"{path()} does not load with torch {torch.__version__}: install vllm-kcache again, "
            f"or set {SWITCH}=0 to run without it"
        ) from error
    meta.register()
    return True
