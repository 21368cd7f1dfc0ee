# SPDX-License-Identifier: Apache-2.0
"""How many tokens a selection keeps and how many of them the hot V cache holds: estimates.

Both depend on the model and its text. They were measured on SmolLM2-135M and extrapolated; a user
who has measured another model gives its figures to the planner.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from vllm_kcache.types import HeadCombine, Selection

# Tokens a head that coverage selected, mean over layers and heads, English text of 4096 tokens,
# combine "sum" (.97: measured at 2K, 1.29 times what .95 took there); by the length they grow with
# its square root (424, 577, 850 at 2K, 4K, 8K). Combine "max" took 531 and 818 where "sum" took 345
# and 577.
SELECTED_AT_4K = ((0.90, 345), (0.95, 577), (0.97, 746))
SELECTED_GROWTH = 0.5
COMBINE_MAX_FACTOR = 1.45
# Tokens a head that a mass threshold selected with V blocks of 8 tokens, combine "max", mean over
# layers and heads, eight English texts of 4096 tokens: the most of three lengths (446, 497 and 448
# tokens at 2K, 4K and 8K with .002: a list has at most G / threshold blocks, whatever the length).
# With V blocks of 16 tokens, twice the threshold took 1.12 and 1.13 times as many.
THRESHOLD_AT_4K = ((0.005, 257), (0.003, 372), (0.002, 497), (0.0015, 603), (0.001, 773))
THRESHOLD_V_BLOCK_TOKENS = 8
THRESHOLD_V_BLOCK_EXPONENT = 0.17
# Hit rate by the cache's size in multiples of the mean selected set: two texts, one request.
HIT_RATES = ((0.0, 0.0), (1.0, 0.37), (1.5, 0.80), (2.0, 0.90), (3.0, 0.96), (4.0, 0.98))


def interpolate(points: tuple[tuple[float, float], ...], at: float) -> float:
    """Straight lines between points; constant outside them."""
    if at <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return points[-1][1]


def power_law(points: Sequence[tuple[float, float]], at: float) -> float:
    """Straight lines on logarithmic axes; outside the points the nearest line goes on."""
    pairs = list(itertools.pairwise(points))
    (x0, y0), (x1, y1) = next((pair for pair in pairs if at <= pair[1][0]), pairs[-1])
    return y0 * (y1 / y0) ** (math.log(at / x0) / math.log(x1 / x0))


def covering_tokens(coverage: float, context: float, combine: HeadCombine = "sum") -> float:
    """Tokens a head that a coverage selects: a power law of the mass that is left out."""
    if coverage >= 1:
        return context
    points = [(1 / (1 - share), tokens) for share, tokens in SELECTED_AT_4K]
    factor = COMBINE_MAX_FACTOR if combine == "max" else 1.0
    at_4k = factor * power_law(points, 1 / (1 - coverage))
    return min(context, at_4k * (context / 4096) ** SELECTED_GROWTH)


def threshold_tokens(threshold: float, v_block_tokens: int, context: float) -> float:
    """Tokens a head that a mass threshold selects, of V blocks of `v_block_tokens` tokens."""
    share = v_block_tokens / THRESHOLD_V_BLOCK_TOKENS
    points = [(1 / level, tokens) for level, tokens in THRESHOLD_AT_4K]
    tokens = power_law(points, share / threshold) * share**THRESHOLD_V_BLOCK_EXPONENT
    return min(context, tokens)


def selected_tokens_of(selection: Selection, v_block_tokens: int, context: float) -> float:
    """Tokens a head that a rule selects from a context, forced V blocks included."""
    tokens = context
    if selection.mass_threshold is not None:
        length = selection.threshold_length or context
        share = min(1.0, length / max(1.0, context)) ** 0.5
        tokens = threshold_tokens(selection.mass_threshold * share, v_block_tokens, context)
    elif selection.coverage is not None:
        tokens = covering_tokens(selection.coverage, context, selection.combine)
    if selection.top_n is not None:
        tokens = min(tokens, selection.top_n * v_block_tokens)
    return tokens
