# SPDX-License-Identifier: Apache-2.0
"""The one way this package changes vLLM: a recorded, idempotent wrap of a named attribute.

Every patch carries its record (target, why, how, upstream state, when it can go), and fails at
once with a clear error when its target no longer exists, so that a new vLLM release cannot leave
the plugin half installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MARK = "__kcache_patch__"


@dataclass(frozen=True)
class PatchRecord:
    """Why one attribute of vLLM is wrapped.

    Attributes:
        target: Dotted name of the attribute.
        why: What does not work without the patch.
        how: What the wrapper does.
        upstream: State of the matter in vLLM.
        until: When the patch can go.
    """

    target: str
    why: str
    how: str
    upstream: str
    until: str


def wrap(owner: Any, name: str, make: Callable[[Callable], Callable], record: PatchRecord) -> None:
    """Replace `owner.name` by `make(original)`, once.

    Args:
        owner: Module or class that defines the attribute.
        name: Name of the attribute. A classmethod or staticmethod is kept one: `make` then gets
            and returns the plain function.
        make: Takes the original function, returns the wrapper.
        record: The reasons, for whoever reads the code; its target is named when it is gone.

    Raises:
        RuntimeError: The target does not exist in the installed vLLM.
    """
    raw = vars(owner).get(name)
    if raw is None:
        raise RuntimeError(
            f"vllm-kcache cannot patch {record.target}: it does not exist in the installed vLLM. "
            "Install a supported release (vllm>=0.32,<0.34)."
        )
    kind = type(raw) if isinstance(raw, classmethod | staticmethod) else None
    original = raw.__func__ if kind is not None else raw
    if getattr(original, _MARK, False):
        return
    # Keeps name, docstring and signature for whoever looks.
    wrapper = functools.update_wrapper(make(original), original)
    setattr(wrapper, _MARK, True)
    setattr(owner, name, kind(wrapper) if kind is not None else wrapper)
