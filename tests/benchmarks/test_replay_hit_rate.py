# SPDX-License-Identifier: Apache-2.0
"""The simulation of the hot cache's policy (replay/hit_rate.py)."""

from __future__ import annotations

import pytest
import torch

from benchmarks.replay.hit_rate import ExactLRU, Run, WindowLRU, simulate
from benchmarks.replay.record import Recording, decode_mass, selected_blocks
from vllm_kcache.types import Selection

SELECTION = Selection(None, 0.95, 1, 32, "sum")


@pytest.mark.parametrize("policy", [ExactLRU, WindowLRU])
def test_by_hand(policy: type) -> None:
    cache = policy(3)
    assert cache.use([1, 2], 1) == 0
    assert cache.use([2, 3], 2) == 1
    assert cache.use([4], 3) == 0  # for 1, the oldest
    assert cache.use([2, 3, 4], 4) == 3
    assert cache.use([1], 5) == 0
    assert cache.use([2, 3, 4], 6) == 2


def test_slots_in_use_are_not_taken() -> None:
    """More blocks in one epoch than there are slots: the rest is read from the host."""
    cache = WindowLRU(2)
    assert cache.use([1, 2, 3, 4], 1) == 0
    assert sorted(cache.slot_of) == [1, 2]
    assert cache.use([1, 2, 3], 2) == 2


@pytest.mark.parametrize("policy", [ExactLRU, WindowLRU])
def test_a_cache_of_everything_misses_each_block_once(policy: type) -> None:
    torch.manual_seed(0)
    chosen = torch.rand(2, 2, 9, 40) < 0.2
    total, distinct = int(chosen[:, :, :8].sum()), int(chosen[:, :, :8].any(2).sum())
    rate = simulate(chosen, policy(4 * 40), Run(0, 8, SELECTION))
    assert rate == pytest.approx(1 - distinct / total)


def test_rates_of_the_recorded_bible() -> None:
    """Measured apart from this, with lists of at most 1024 tokens: .84, .91, .98."""
    recording = Recording.load()
    codes = recording.codes[recording.texts.index("king-james-bible")]
    masses = decode_mass(codes).flatten(0, 1)
    chosen = selected_blocks(masses, recording.seq_lens, SELECTION, recording.v_block_tokens)
    selected_set = float(chosen.sum((0, 2)).float().mean())
    chosen = chosen.unflatten(0, codes.shape[:2])
    for multiple, expected in ((1.5, 0.84), (2, 0.91), (4, 0.98)):
        cache = WindowLRU(round(multiple * selected_set))
        rate = simulate(chosen, cache, Run(16, 48, SELECTION))
        assert rate == pytest.approx(expected, abs=0.03)
