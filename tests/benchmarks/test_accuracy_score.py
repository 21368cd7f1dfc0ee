# SPDX-License-Identifier: Apache-2.0
"""The arithmetic against sums written out, and the summary of known figures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.accuracy import score
from benchmarks.accuracy.score import FIELDS, compare_logits, selection_figures, summarise


def brute_force(test: list[float], stock: list[float], token: int) -> list[float]:
    """One position, in plain Python."""

    def probabilities(logits: list[float]) -> list[float]:
        weights = [math.exp(value - max(logits)) for value in logits]
        return [weight / sum(weights) for weight in weights]

    p, q = probabilities(stock), probabilities(test)
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    return [math.log(q[token]), math.log(p[token]), kl, float(np.argmax(p) == np.argmax(q))]


@pytest.mark.parametrize("piece_values", [1 << 24, 40])
def test_equals_brute_force(monkeypatch: pytest.MonkeyPatch, piece_values: int) -> None:
    """Whether rows are compared at once or in pieces."""
    monkeypatch.setattr(score, "_PIECE_VALUES", piece_values)
    generator = torch.Generator().manual_seed(0)
    stock = torch.randn((7, 19), generator=generator) * 8
    test = stock + torch.randn((7, 19), generator=generator)
    tokens = torch.randint(19, (7,), generator=generator)
    result = compare_logits(test, stock, tokens)
    for row in range(7):
        expected = brute_force(test[row].tolist(), stock[row].tolist(), int(tokens[row]))
        assert result[row].tolist() == pytest.approx(expected, abs=1e-12)


def test_equal_logits_have_no_divergence() -> None:
    logits = torch.randn((3, 50)) * 20
    result = compare_logits(logits, logits.clone(), torch.zeros(3, dtype=torch.int64))
    assert result[:, FIELDS.index("kl")].abs().max() == 0
    assert (result[:, FIELDS.index("agrees")] == 1).all()


def test_small_divergences_are_not_lost() -> None:
    """For a small change d of the logits KL is half the variance of d: here about 1e-11."""
    stock = torch.linspace(-10, 10, 1000)[None]
    change = torch.zeros(1, 1000)
    change[0, -1] = 2.0**-16
    p = float(stock.double().softmax(-1)[0, -1])
    expected = p * (1 - p) * 2.0**-33
    kl = compare_logits(stock + change, stock, torch.tensor([0]))[0, FIELDS.index("kl")]
    assert float(kl) == pytest.approx(expected, rel=1e-3)


def test_a_token_that_stock_rules_out_adds_nothing() -> None:
    stock = torch.tensor([[1.0, 2.0, float("-inf")]])
    test = torch.tensor([[1.0, 2.0, float("-inf")]])
    assert compare_logits(test, stock, torch.tensor([0]))[0, 2] == 0
    test[0, 2] = 1.5
    assert 0 < compare_logits(test, stock, torch.tensor([0]))[0, 2] < 1


def test_summary() -> None:
    positions = np.zeros((2, 3, len(FIELDS)))
    positions[:, :, 0] = [[-1, -2, -3], [-1, -2, -3]]  # by the split cache
    positions[:, :, 1] = [[-1, -1, -2], [-1, -2, -2]]  # by stock
    positions[:, :, 2] = [[0, 0.1, 0.2], [0, 0.3, 0.4]]
    positions[:, :, 3] = [[1, 1, 0], [1, 0, 0]]
    result = summarise(positions, ["prose", "code", "prose"])
    assert result["positions"] == 6
    assert result["perplexity"] == pytest.approx(math.exp(2))
    assert result["stock_perplexity"] == pytest.approx(math.exp(1.5))
    assert result["perplexity_change"] == pytest.approx(math.exp(0.5) - 1)
    # Means of the items: 0, 0.5 and 1.
    assert result["perplexity_change_error"] == pytest.approx(0.5 / math.sqrt(3))
    assert result["kl"] == pytest.approx(1 / 6)
    assert result["kl_max"] == 0.4
    assert result["top1_agreement"] == 0.5
    assert result["by_kind"]["code"]["kl"] == pytest.approx(0.2)
    assert math.isnan(result["by_kind"]["code"]["kl_error"])
    assert result["by_kind"]["prose"]["positions"] == 4


def test_selection_figures() -> None:
    """Of two parts; what others counted between them does not count."""
    names = ("selected_lists", "selected_blocks", "hot_cache_hits", "hot_cache_misses",
             "direct_host_reads")  # fmt: skip

    def reading(values: list[float], buckets: list[int]) -> dict[str, Any]:
        dropped = list(zip((0.01, 0.1, 1.0), buckets, strict=True))
        return {**dict(zip(names, values, strict=True)), "dropped_mass": dropped}

    parts = [
        (reading([100] * 5, [7, 7, 7]), reading([104, 120, 110, 105, 100], [9, 9, 7])),
        (reading([500] * 5, [9, 9, 9]), reading([506, 530, 520, 505, 500], [13, 11, 9])),
    ]
    result = selection_figures(parts, 16)
    assert result["selected_tokens"] == 5 * 16
    assert result["dropped_mass"] == pytest.approx([4 * 0.01 / 10, (6 * 0.01 + 4 * 0.1) / 10])
    assert result["hot_cache_hit_rate"] == 0.75
