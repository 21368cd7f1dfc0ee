# SPDX-License-Identifier: Apache-2.0
"""Replay in the workers of an engine, through vLLM's own option:

    vllm serve ... --worker-extension-cls benchmarks.replay.extension.max

Each worker looks its extension up before it is made. Then decode steps are made to select what was
recorded, from the capture of the first graph on.
"""

from __future__ import annotations

from typing import Any

from benchmarks.replay.record import RECORDINGS, V_BLOCK_TOKENS, Recording
from vllm_kcache.config import KCacheConfig


def name_for(config: dict[str, Any], shortest: int) -> str:
    """The extension that plays what the rule of a configuration reads.

    Args:
        config: Of the split cache.
        shortest: Tokens of the shortest request.

    Raises:
        ValueError: it has no place for every recorded block.
    """
    combine = KCacheConfig.from_user(config).selection(V_BLOCK_TOKENS).combine
    Recording.load(RECORDINGS[combine]).check_context(shortest)
    return f"{__name__}.{combine}"


class Player:
    """What a worker is given; calls come through vLLM's `collective_rpc`."""

    def replay_cost_ms(self, num_requests: int, tokens: int) -> float:
        """See `Replay.cost_ms`."""
        return _installed[-1].cost_ms(num_requests, tokens)


# Of this process, the last one plays.
_installed: list[Any] = []


def __getattr__(name: str) -> type[Player]:
    """Of "sum" and "max", how a rule combines query heads: installs the recording for it."""
    path = {str(combine): path for combine, path in RECORDINGS.items()}.get(name)
    if path is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from benchmarks.replay.replay import Replay

    # Every worker's current GPU is the first one until the worker is made.
    replay = Replay(Recording.load(path), "cpu")
    replay.install()
    _installed.append(replay)
    return Player
