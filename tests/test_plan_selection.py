# SPDX-License-Identifier: Apache-2.0
"""What the planner estimates of a selection, against what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_kcache.config import KCacheConfig
from vllm_kcache.plan_cost import LINK_SHARE
from vllm_kcache.plan_selection import (
    HIT_RATES,
    covering_tokens,
    interpolate,
    selected_tokens_of,
    threshold_tokens,
)

STUDY = Path(__file__).resolve().parents[1] / "benchmarks/results/selection_study.jsonl"


@pytest.mark.parametrize("points", [LINK_SHARE, HIT_RATES])
def test_curves_rise_and_pass_through_their_points(points: tuple) -> None:
    assert [interpolate(points, x) for x, _ in points] == [y for _, y in points]
    lowest, highest = points[0][0], points[-1][0]
    values = [interpolate(points, lowest + i * (highest - lowest) / 50) for i in range(-5, 60)]
    assert values == sorted(values)


def test_covering_tokens_are_the_measured_ones() -> None:
    """Coverage .95, combine sum, at 2K, 4K and 8K: 424, 577, 850."""
    measured = {2048: 424, 4096: 577, 8192: 850}
    for context, tokens in measured.items():
        assert covering_tokens(0.95, context) == pytest.approx(tokens, rel=0.05)
    assert covering_tokens(0.9, 4096) == pytest.approx(345)
    assert covering_tokens(0.95, 4096, "max") == pytest.approx(818, rel=0.05)
    assert covering_tokens(1.0, 4096) == 4096
    assert covering_tokens(0.99, 256) == 256
    assert covering_tokens(0.99, 4096) > covering_tokens(0.98, 4096) > 746


def test_threshold_tokens_are_those_of_the_study() -> None:
    """Every row of the rule that the package has, at all lengths and both V blocks."""
    found = 0
    for line in STUDY.read_text().splitlines():
        row = json.loads(line)
        if row["label"] == "threshold, clip":
            rule = row["rule"]
            tokens = threshold_tokens(rule["level"], rule["block_tokens"], row["context"])
            # The estimate is that of 4K, where a threshold selects the most.
            most = 1.06 if row["context"] == 4096 else 1.25
            assert row["tokens"] / 1.06 <= tokens <= row["tokens"] * most
            found += 1
    assert found >= 15


def test_a_stricter_rule_selects_fewer() -> None:
    strict = [threshold_tokens(level, 8, 32768) for level in (0.0001, 0.001, 0.002, 0.01, 0.1)]
    assert strict == sorted(strict, reverse=True)
    assert threshold_tokens(0.0001, 8, 512) == 512


def test_caps_and_everything() -> None:
    def tokens(context: int, **settings: object) -> float:
        return selected_tokens_of(KCacheConfig(**settings).selection(8), 8, context)

    assert tokens(4096, top_n="all") == 4096
    assert tokens(4096, top_n=16) == 128
    assert tokens(100, top_n=16) == 100
    assert tokens(4096, coverage=0.9) == pytest.approx(345)
    assert tokens(4096, coverage=0.9, top_n=16) == 128
    assert tokens(32768, mass_threshold=0.002) == pytest.approx(497)
    assert tokens(32768, mass_threshold=0.002, top_n=16) == 128
