# SPDX-License-Identifier: Apache-2.0
"""Replay in the workers of a server, through vLLM's own option:

    vllm serve ... --worker-extension-cls benchmarks.engine.server_replay.max

Each worker looks its extension up before it is made. Then decode steps are made to select what was
recorded, from the capture of the first graph on.
"""

from __future__ import annotations

from benchmarks.replay.record import RECORDINGS, Recording


class NoExtension:
    """Adds nothing to the worker."""


def __getattr__(name: str) -> type[NoExtension]:
    """Of "sum" and "max", how a rule combines query heads: installs the recording for it."""
    path = {str(combine): path for combine, path in RECORDINGS.items()}.get(name)
    if path is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from benchmarks.replay.replay import Replay

    Replay(Recording.load(path), "cuda").install()
    return NoExtension
