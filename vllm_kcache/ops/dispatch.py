# SPDX-License-Identifier: Apache-2.0
"""The one place where a step finds its implementation."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

STEMS = ("write", "score", "select", "fetch", "attend")
PACKAGES = {"cpu": "vllm_kcache.reference", "cuda": "vllm_kcache.kernels"}


def implementation(stem: str, device: torch.device) -> ModuleType:
    """The module that runs one step on one kind of device.

    Args:
        stem: "write", "score", "select", "fetch" or "attend".
        device: where the query and the K pages lie. "cpu" gives `vllm_kcache.reference.<stem>`,
            "cuda" gives `vllm_kcache.kernels.<stem>`. Both define the step under the same name and
            with the same signature. Imported at the first call, so that a machine without a GPU
            never imports Triton.
    Raises:
        ValueError: an unknown stem, or a device that has no implementation.
    """
    return _module(stem, device.type)


@functools.cache
def _module(stem: str, device_type: str) -> ModuleType:
    if stem not in STEMS:
        raise ValueError(f"stem={stem!r}: must be one of {', '.join(STEMS)}")
    if device_type not in PACKAGES:
        raise ValueError(f"device={device_type}: must be one of {', '.join(PACKAGES)}")
    return importlib.import_module(f"{PACKAGES[device_type]}.{stem}")
