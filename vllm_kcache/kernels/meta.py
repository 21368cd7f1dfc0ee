# SPDX-License-Identifier: Apache-2.0
"""Meta functions of the extension's operations, which write into their arguments only."""

from __future__ import annotations

from typing import Any

import torch

NAMES = ("select_blocks", "fetch_blocks", "select_fetch", "follow_scores", "copy_misses")


def _returns_nothing(*_arguments: Any) -> None:
    return None


def register() -> None:
    """Register the Meta functions; the library must be loaded."""
    for name in NAMES:
        torch.library.register_fake(f"kcache::{name}", _returns_nothing)
