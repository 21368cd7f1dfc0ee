# SPDX-License-Identifier: Apache-2.0
"""Which settings are compared, and which of them can share an engine.

A setting is a `kcache_config`. One that has `kv_cache_dtype` is stock vLLM with arguments of
`vllm.LLM`, such as a cache in fp8, compared with plain stock as all others are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from vllm_kcache.config import KCacheConfig


def default_settings(v_block_tokens: int) -> list[dict[str, Any]]:
    """What is compared when nothing is asked for: everything, and three rules at some levels.

    Args:
        v_block_tokens: tokens of a V block, of which a fixed number must be made.
    """
    settings: list[dict[str, Any]] = [{"top_n": "all"}]
    settings += [{"mass_threshold": level} for level in (0.001, 0.002, 0.003, 0.005)]
    settings += [{"coverage": level} for level in (0.9, 0.95, 0.97, 0.99)]
    return settings + [{"top_n": tokens // v_block_tokens} for tokens in (128, 512)]


@dataclass
class EngineSettings:
    """Settings that share an engine: it is started once and reconfigured for each.

    Attributes:
        start: what only a new engine can change; None for stock.
        settings: what `reconfigure` changes, in order; one that is empty for stock.
        arguments: of `vllm.LLM`, for stock.
    """

    start: dict[str, Any] | None
    settings: list[dict[str, Any]] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What is printed of it."""
        return json.dumps(self.arguments if self.start is None else self.start)


def is_stock(setting: dict[str, Any]) -> bool:
    """The setting is of stock vLLM, not of the split cache."""
    return "kv_cache_dtype" in setting


def parse_settings(given: list[str] | None) -> list[dict[str, Any]] | None:
    """Objects and lists of objects, in order.

    Raises:
        ValueError: something else.
    """
    if given is None:
        return None
    settings: list[dict[str, Any]] = []
    for text in given:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"--settings {text!r}: {error}") from None
        settings += value if isinstance(value, list) else [value]
    if not settings or not all(isinstance(setting, dict) for setting in settings):
        raise ValueError("--settings must be JSON objects, or lists of them")
    return settings


def by_engine(settings: list[dict[str, Any]], v_block_tokens: int) -> list[EngineSettings]:
    """The engines for these settings, in order; equal starts share one.

    Args:
        settings: see the module.
        v_block_tokens: V block of those that name none.

    Raises:
        KCacheConfigError: a setting is refused.
    """
    from vllm_kcache.split_cache import RECONFIGURABLE

    engines: list[EngineSettings] = []
    for setting in settings:
        if is_stock(setting):
            if not any(engine.arguments == setting for engine in engines):
                engines.append(EngineSettings(None, [{}], setting))
            continue
        start = {"v_block_tokens": v_block_tokens, "dense_layers": 0}
        start |= {key: value for key, value in setting.items() if key not in RECONFIGURABLE}
        rest = {key: value for key, value in setting.items() if key in RECONFIGURABLE}
        KCacheConfig.from_user(setting).selection(start["v_block_tokens"])
        for engine in engines:
            if engine.start == start:
                engine.settings.append(rest)
                break
        else:
            engines.append(EngineSettings(start, [rest]))
    return engines
