# SPDX-License-Identifier: Apache-2.0
"""The figure of a decode step: what lies in which memory, and what crosses the link."""

from __future__ import annotations

from typing import Any

_GPU, _HOST, _LINK = "#E3EEF7", "#FBEFE3", "#F0F0F0"
_STORE, _STEP, _CROSSES = "#FFFFFF", "#0072B2", "#D55E00"
_WIDE, _HIGH = 12.0, 6.6


def draw_data_flow() -> Any:
    """The figure; nothing in it is measured."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(_WIDE * 0.85, _HIGH * 0.85))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(0, _WIDE)
    axis.set_ylim(0, _HIGH)
    axis.set_axis_off()
    _areas(axis)
    _stores(axis)
    _steps(axis)
    _flows(axis)
    return figure


def _areas(axis: Any) -> None:
    for x, y, wide, high, color, name in (
        (0.2, 2.15, 11.6, 4.25, _GPU, "GPU memory (HBM)"),
        (0.2, 1.45, 11.6, 0.55, _LINK, "PCIe"),
        (0.2, 0.2, 11.6, 1.1, _HOST, "host memory (pinned)"),
    ):
        _box(axis, x, y, wide, high, color, edge="none")
        side, place = ("left", x + 0.15) if color == _GPU else ("right", x + wide - 0.15)
        axis.text(place, y + high - 0.14, name, va="top", ha=side, fontsize=9, color="#444444")


def _stores(axis: Any) -> None:
    for x, y, wide, high, text in (
        (2.0, 2.45, 2.4, 0.95, "K pages\nevery K, paged by vLLM"),
        (7.0, 2.45, 2.6, 0.95, "hot V cache: copies of\nV blocks, the newest always"),
        (4.0, 0.32, 5.6, 0.72, "host V pool: V of every page, written through, complete"),
    ):
        _box(axis, x, y, wide, high, _STORE, edge="#555555")
        axis.text(x + wide / 2, y + high / 2, text, ha="center", va="center", fontsize=9)


# Left edge of each step, all of one width and height.
_PLACES = {"write": 0.5, "score": 2.75, "select": 5.0, "fetch": 7.25, "attend": 9.5}
_STEP_WIDE, _STEP_HIGH, _STEP_Y = 1.75, 0.95, 4.75
_SAYS = {
    "write": "K and V of\nthe new token",
    "score": "exact QK over\nevery K",
    "select": "fewest V blocks\nthat cover the mass",
    "fetch": "V blocks that\nare not resident",
    "attend": "softmax and PV over\nthe selected tokens",
}


def _steps(axis: Any) -> None:
    for number, (name, x) in enumerate(_PLACES.items(), start=1):
        _box(axis, x, _STEP_Y, _STEP_WIDE, _STEP_HIGH, _STEP, edge="none")
        middle = x + _STEP_WIDE / 2
        axis.text(middle, _STEP_Y + _STEP_HIGH - 0.2, f"{number}. {name}", ha="center",
                  va="center", color="white", weight="bold", fontsize=9.5)  # fmt: skip
        axis.text(middle, _STEP_Y + 0.36, _SAYS[name], ha="center", va="center", color="white",
                  fontsize=7.5)  # fmt: skip


def _flows(axis: Any) -> None:
    middle = {name: x + _STEP_WIDE / 2 for name, x in _PLACES.items()}
    top = 3.4  # of the stores in GPU memory
    y = _STEP_Y + _STEP_HIGH / 2
    axis.text(middle["score"] + 0.88, 6.03, "new query", ha="center", fontsize=8)
    for name in ("score", "attend"):
        _arrow(axis, (middle[name], 6.2), (middle[name], _STEP_Y + _STEP_HIGH), "#777777")
    axis.plot([middle["score"], middle["attend"]], [6.2, 6.2], color="#777777", linewidth=1.2)
    for before, after in (("score", "select"), ("select", "fetch"), ("fetch", "attend")):
        _arrow(axis, (_PLACES[before] + _STEP_WIDE, y), (_PLACES[after], y), "#222222")
    axis.text(4.75, _STEP_Y - 0.22, "mass of\neach block", ha="center", va="top", fontsize=7.5)
    axis.text(7.0, _STEP_Y - 0.22, "lists of\nblocks", ha="center", va="top", fontsize=7.5)
    _arrow(axis, (1.9, _STEP_Y), (2.6, top), _STEP, "K", (1.98, 4.1))
    _arrow(
        axis, (3.4, top), (middle["score"], _STEP_Y), _STEP, "every K,\nat HBM speed", (3.6, 3.9)
    )
    axis.plot([0.9, 0.9], [_STEP_Y, 0.68], color=_CROSSES, linewidth=1.5)
    _arrow(axis, (0.9, 0.68), (4.0, 0.68), _CROSSES, "V of the new\ntoken", (1.0, 1.52))
    _arrow(axis, (4.4, 3.0), (9.9, _STEP_Y), "#999999", "K of the selected", (5.15, 2.95))
    misses = "misses only: whole V blocks, read by\na kernel beside the scoring"
    _arrow(axis, (7.6, 1.04), (7.6, 2.45), _CROSSES, misses, (7.7, 1.52))
    _arrow(axis, (8.0, _STEP_Y), (8.0, top), _STEP, "look up", (8.08, 3.95))
    _arrow(axis, (9.3, top), (10.6, _STEP_Y), _STEP, "selected V", (10.15, 3.9))


def _box(
    axis: Any, x: float, y: float, wide: float, high: float, color: str, edge: str
) -> None:  # fmt: skip
    from matplotlib.patches import FancyBboxPatch

    axis.add_patch(
        FancyBboxPatch(
            (x, y), wide, high, boxstyle="round,pad=0,rounding_size=0.08", facecolor=color,
            edgecolor=edge, linewidth=1,
        )
    )  # fmt: skip


def _arrow(
    axis: Any, start: tuple[float, float], end: tuple[float, float], color: str, text: str = "",
    at: tuple[float, float] = (0, 0),
) -> None:  # fmt: skip
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", xy=end, xytext=start, arrowprops=style)
    if text:
        axis.text(*at, text, fontsize=7.5, color="#333333", va="bottom")
