# SPDX-License-Identifier: Apache-2.0
"""Which settings the accuracy benchmark compares."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from vllm_kcache.config import KCacheConfig, KCacheConfigError

COVERAGES = (0.85, 0.9, 0.95, 0.97, 0.98, 0.99)
THRESHOLDS = (0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005)
FIXED_TOKENS = (32, 64, 128, 256, 512, 1024)
CAP_TOKENS = (512, 1024)
V_BLOCK_TOKENS = (4, 8, 16)
DENSE_LAYERS = (1, 2)
GRIDS = ("default", "quick")
# What a small fixed N can hold: the first pair that fits it.
_SINK_AND_RECENT = ((None, None), (8, 8), (8, 1), (0, 1))


@dataclass
class EngineSettings:
    """Settings that share an engine: it is started once and reconfigured for each.

    Attributes:
        start: what only a new engine can change.
        settings: what `reconfigure` changes, in order.
        skipped: settings that cannot be measured, each with the reason.
    """

    start: dict[str, Any]
    settings: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[tuple[dict[str, Any], str]] = field(default_factory=list)

    @property
    def v_block_tokens(self) -> int:
        """Tokens of a V block."""
        return self.start["v_block_tokens"]

    def add_fixed(self, tokens: int, **more: Any) -> None:
        """A fixed number of tokens a head, in whole V blocks."""
        if tokens < self.v_block_tokens:
            reason = f"fewer tokens than a V block of {self.v_block_tokens}"
            self.skipped.append(({"top_n_tokens": tokens, **more}, reason))
            return
        top_n = tokens // self.v_block_tokens
        for sink, recent in _SINK_AND_RECENT:
            setting = {"top_n": top_n, **more}
            if sink is not None:
                setting.update(sink_tokens=sink, recent_tokens=recent)
            try:
                KCacheConfig.from_user(setting).selection(self.v_block_tokens)
            except KCacheConfigError:
                continue
            self.settings.append(setting)
            return
        reason = "smaller than what sink and recent keep"
        self.skipped.append(({"top_n": top_n, **more}, reason))


def make_grid(
    name: str,
    v_block_tokens: int,
    v_blocks: list[int] | None,
    dense_layers: list[int] | None,
    has_mean_tail: bool,
) -> list[EngineSettings]:
    """The engines of a sweep and the settings of each.

    Args:
        name: "default": everything on the model's own V block without dense layers, and a shorter
            list on each other V block and number of dense layers. "quick": a few settings, one
            engine.
        v_block_tokens: V block that "auto" means for the model.
        v_blocks: V blocks to measure; None is the grid's own choice.
        dense_layers: numbers of dense layers to measure; None is the grid's own choice.
        has_mean_tail: the engine can keep mean V (on the CPU).
    """
    if name == "quick":
        sizes, dense = v_blocks or [v_block_tokens], dense_layers or [0]
    else:
        others = [tokens for tokens in V_BLOCK_TOKENS if tokens != v_block_tokens]
        sizes = v_blocks or [v_block_tokens, *others]
        dense = dense_layers or [0, *DENSE_LAYERS]
    engines = []
    for size in sizes:
        for layers in dense:
            is_main = size == sizes[0] and layers == dense[0]
            # Dense layers and V blocks are not crossed: only the first of one goes with the others.
            if size != sizes[0] and layers != dense[0]:
                continue
            engine = EngineSettings({"v_block_tokens": size, "dense_layers": layers})
            if name == "quick":
                _quick(engine)
            elif is_main:
                _full(engine, has_mean_tail)
            else:
                _short(engine)
            engines.append(engine)
    return engines


def _quick(engine: EngineSettings) -> None:
    engine.settings += [{"top_n": "all"}, *({"coverage": c} for c in (0.9, 0.95, 0.97, 0.99))]
    for tokens in (128, 512):
        engine.add_fixed(tokens)


def _short(engine: EngineSettings) -> None:
    engine.settings += [{"top_n": "all"}, *({"coverage": c} for c in COVERAGES)]
    for tokens in (128, 512, 1024):
        engine.add_fixed(tokens)


def _full(engine: EngineSettings, has_mean_tail: bool) -> None:
    engine.settings.append({"top_n": "all"})
    engine.settings += [{"coverage": c} for c in COVERAGES]
    for tokens in FIXED_TOKENS:
        engine.add_fixed(tokens)
    engine.settings += [{"coverage": c, "head_combine": "max"} for c in COVERAGES]
    for threshold in THRESHOLDS:
        engine.settings.append({"mass_threshold": threshold})
    for cap in CAP_TOKENS:
        for combine in ("sum", "max"):
            for coverage in (0.95, 0.97, 0.99):
                engine.settings.append(
                    {
                        "coverage": coverage,
                        "top_n": cap // engine.v_block_tokens,
                        "head_combine": combine,
                    }
                )
    engine.settings += [{"coverage": 0.97, "sink_tokens": sink} for sink in (0, 64)]
    engine.settings += [{"coverage": 0.97, "recent_tokens": recent} for recent in (8, 128)]
    for tail in ("drop", "mean"):
        if tail == "mean" and not has_mean_tail:
            engine.skipped.append(({"tail": tail}, "only the CPU implementation has it"))
            continue
        engine.settings.append({"coverage": 0.97, "tail": tail})
        engine.settings.append({"coverage": 0.9, "tail": tail})
        engine.add_fixed(512, tail=tail)


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


def listed(settings: list[dict[str, Any]], v_block_tokens: int) -> list[EngineSettings]:
    """Engines for settings that a user lists, in order; equal starts share one.

    Args:
        settings: as `kcache_config`.
        v_block_tokens: V block of those that name none.
    """
    from vllm_kcache.integration.runtime import RECONFIGURABLE

    engines: list[EngineSettings] = []
    for setting in settings:
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
