# SPDX-License-Identifier: Apache-2.0
"""Acceptance by groups against figures worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.accuracy.acceptance import compared, parse


def group(kind: str, drafted: int, accepted: int, *texts: list[int]) -> dict[str, Any]:
    """What an engine tells of one group."""
    return {"kind": kind, "drafted": drafted, "accepted": accepted, "texts": list(texts)}


def test_groups_are_pooled_and_paired() -> None:
    """Shares are of all drafts of a kind, not means of shares; the error is over groups."""
    stock = [group("code", 10, 5, [1, 2]), group("code", 30, 9, [3, 4]), group("prose", 20, 2, [5])]
    ours = [group("code", 10, 6, [1, 2]), group("code", 30, 9, [3, 7]), group("prose", 20, 4, [5])]
    figures = compared(ours, stock)
    assert list(figures) == ["all", "code", "prose"]
    assert figures["code"]["drafted"] == 40
    assert figures["code"]["acceptance"] == pytest.approx(15 / 40)
    assert figures["code"]["stock"] == pytest.approx(14 / 40)
    assert figures["code"]["difference"] == pytest.approx(1 / 40)
    assert figures["code"]["same_texts"] == 0.5
    # Without the first group the difference is 0, without the second .1: sqrt(1 * .05 ** 2).
    assert figures["code"]["error"] == pytest.approx(0.05)
    assert figures["all"]["difference"] == pytest.approx(3 / 60)
    assert figures["all"]["same_texts"] == pytest.approx(2 / 3)


def test_nothing_drafted_is_no_share() -> None:
    figures = compared([group("prose", 0, 0, [1])] * 2, [group("prose", 0, 0, [1])] * 2)
    assert math.isnan(figures["prose"]["acceptance"])


def test_groups_are_of_one_kind(capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the passages are prose: 24 of them are not groups of 8 of either kind."""
    with pytest.raises(SystemExit):
        parse(["model", "--items", "24"])
    assert "--items 24: must be a multiple of 16" in capsys.readouterr().err
