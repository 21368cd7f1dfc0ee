# SPDX-License-Identifier: Apache-2.0
"""Followers and the launch that does the rest, without a GPU: each list exactly once, whatever the
score kernel does; and the state that they leave."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest
import torch

from tests.csrc.batch import DEFAULT, EVERYTHING, POISON, RULES, Batch, Sizes
from vllm_kcache.cache.hot_cache import (
    ENDED,
    EPOCH,
    EXISTING,
    MISSED,
    REST_UNTIL,
    SCORED,
    WANTED,
)
from vllm_kcache.kernels.select import follow_scores, select_and_fetch
from vllm_kcache.types import Selection

pytestmark = pytest.mark.usefixtures("emulated")

SPLITS = 3
SIZES = Sizes((700, 5000, 0, 37, 900), 2, 4)
LISTS = 8  # that are not empty
COVERAGE = Selection(None, 0.9, 1, 8, "sum")
SetClock = Callable[[int], None]


def follow(batch: Batch, most: int = 4, least: int | None = None) -> None:
    follow_scores(batch.view, batch.lists, SPLITS, most, most if least is None else least)


def finish(batch: Batch) -> None:
    """What comes after, and the end of the step."""
    select_and_fetch(batch.view, batch.lists)
    batch.check_step()
    batch.cache.advance_epoch()


def run(batch: Batch, most: int = 4, least: int | None = None) -> None:
    """A step whose scores are all there: the followers do all of it."""
    batch.lists.signals.copy_(batch.parts(SPLITS))
    follow(batch, most, least)
    assert (batch.lists.signals == -1).all()
    selected = batch.lists.selected
    before = [tensor.clone() for tensor in (selected.blocks, selected.counts, batch.lists.rows)]
    finish(batch)
    after = (selected.blocks, selected.counts, batch.lists.rows)
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("followers", [1, 4, 100], ids=lambda count: f"{count} followers")
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_lists_of_a_step(rule: Selection, followers: int) -> None:
    """Twice over one cache: all is missing first, and found after."""
    batch = Batch.make(SIZES, rule)
    run(batch, followers)
    batch = batch.again()
    run(batch, followers)
    counted = batch.cache.read_counters()
    assert counted.lists == 2 * LISTS
    assert counted.hits == counted.misses == int(batch.lists.selected.counts.sum())


@pytest.mark.parametrize("group", [1, 3, 4, 8, 12, 16])
@pytest.mark.parametrize("num_slots", [0, 3, 1 << 17])
def test_lists_of_several_segments(group: int, num_slots: int) -> None:
    """Some rows, or all, are read straight from the host."""
    batch = Batch.make(Sizes((33_000, 16_384, 16_385, 1), 1, group, 1, 32), DEFAULT, num_slots)
    run(batch, 3)
    assert batch.cache.read_counters().lists == 4


def test_demand_falls_and_rises() -> None:
    """The last one out sets how many work in the next step. Those without work end while it does;
    none of their threads may take the new number for its own."""
    batch = Batch.make(SIZES, COVERAGE)
    for step in range(40):
        if step % 2:
            batch.cache.flush()
        batch = batch.again()
        run(batch, 8, 2)
        assert batch.cache.read_counters(reset=True).lists == LISTS
        assert int(batch.cache.state[WANTED]) == (2 if step % 2 == 0 and step else 8)


def give_up(batch: Batch) -> None:
    """Follow with few signals; the followers rest afterwards, and the rest is done."""
    signalled = batch.lists.signals == batch.parts(SPLITS)
    epoch = int(batch.cache.state[EPOCH]) + 1
    follow(batch)
    done = batch.lists.signals == -1
    assert (signalled | ~done).all()
    assert int(batch.cache.state[REST_UNTIL]) == epoch + 4096
    assert batch.cache.state[[ENDED, MISSED, EXISTING]].tolist() == [0, 0, 0]
    left = batch.lists.selected.counts.flatten()[~done]
    assert (left == POISON).all()
    assert (batch.lists.selected.blocks.flatten(0, 1)[~done] == POISON).all()
    batch.lists.signals[~done] = batch.parts(SPLITS)[~done]  # scoring goes on after them
    finish(batch)
    assert batch.cache.read_counters(reset=True).lists == LISTS


def test_scoring_that_does_not_run_beside() -> None:
    """Followers give up, and rest for 4096 epochs: they end although no clock runs."""
    batch = Batch.make(SIZES, DEFAULT)
    batch.cache.state[EPOCH] = -100  # it wraps
    batch.cache.state[REST_UNTIL] = -200  # they have rested before
    give_up(batch)
    batch = batch.again()
    until = int(batch.cache.state[REST_UNTIL])
    for epoch in (-99, 0, until - 1):
        batch.cache.state[EPOCH] = epoch - 1
        batch.lists.signals.copy_(batch.parts(SPLITS))
        follow(batch)
        assert torch.equal(batch.lists.signals, batch.parts(SPLITS))
    assert (batch.lists.selected.counts == POISON).all()
    batch.cache.state[EPOCH] = until - 1
    run(batch)
    # Long after, half of all epochs away, they do not rest again.
    batch = batch.again()
    batch.cache.state[EPOCH] = until - 2**31 + 5000 if until >= 0 else until + 2**31 - 5000
    run(batch)


@pytest.mark.parametrize("which", ["first", "last", "every second"])
def test_half_of_the_lists_are_scored(which: str) -> None:
    batch = Batch.make(SIZES, DEFAULT)
    parts = batch.parts(SPLITS)
    taken = {"first": slice(0, 5), "last": slice(5, 10), "every second": slice(0, 10, 2)}[which]
    batch.lists.signals[taken] = parts[taken]
    give_up(batch)


def test_parts_of_lists_are_not_enough() -> None:
    batch = Batch.make(SIZES, DEFAULT)
    batch.lists.signals.copy_((batch.parts(SPLITS) - 1).clamp_min(0))
    give_up(batch)


@pytest.mark.parametrize("stale", ["done", "more", "far more"])
def test_stale_signals(stale: str) -> None:
    """Of a step that broke off: nothing is taken for scored or done, and the next step is right."""
    batch = Batch.make(SIZES, DEFAULT)
    parts = batch.parts(SPLITS)
    left = {"done": -1, "more": 1, "far more": 70}[stale]
    batch.lists.signals.copy_(parts + left)
    follow(batch)
    assert torch.equal(batch.lists.signals[parts > 0], (parts + left)[parts > 0])
    # An empty list has no parts: what is left there may be the mark of being done.
    batch.lists.signals[parts == 0] = 0
    finish(batch)
    assert batch.cache.read_counters(reset=True).lists == LISTS
    batch = batch.again()
    batch.cache.state[REST_UNTIL] = 0
    run(batch)
    assert batch.cache.read_counters().lists == LISTS


@pytest.mark.parametrize("rule", [DEFAULT, COVERAGE, EVERYTHING], ids=str)
def test_a_list_waits_for_its_scores(rule: Selection, clock_step: SetClock) -> None:
    """Scores come list by list while the kernel runs, the last list first, and no time passes."""
    clock_step(0)
    batch = Batch.make(SIZES, rule)
    lists, group, heads = batch.lists, SIZES.group, SIZES.kv_heads
    scores, sums = lists.block_lse.clone(), lists.chunk_lse.clone()
    lists.block_lse.fill_(torch.nan)
    lists.chunk_lse.fill_(torch.nan)
    kernel = threading.Thread(target=follow, args=(batch,))
    kernel.start()
    parts = batch.parts(SPLITS)
    for index in reversed(range(len(parts))):
        time.sleep(0.003)
        request, head = divmod(index, heads)
        its = slice(head * group, (head + 1) * group)
        lists.block_lse[request, its] = scores[request, its]
        lists.chunk_lse[request, its] = sums[request, its]
        for _ in range(int(parts[index])):
            assert kernel.is_alive(), "the kernel did not wait"
            lists.signals[index] += 1
    kernel.join(timeout=60)
    assert not kernel.is_alive()
    assert (lists.signals == -1).all()
    finish(batch)
    assert batch.cache.read_counters().lists == LISTS


def test_scoring_that_goes_on_keeps_followers_waiting(clock_step: SetClock) -> None:
    """Far longer than their patience, as long as some list is scored now and then."""
    clock_step(10)
    batch = Batch.make(SIZES, DEFAULT)
    kernel = threading.Thread(target=follow, args=(batch,))
    kernel.start()
    end = time.monotonic() + 5
    while time.monotonic() < end:
        batch.cache.state[SCORED] += 1
        time.sleep(0.001)
    assert kernel.is_alive()
    assert int(batch.cache.state[REST_UNTIL]) == 0
    batch.lists.signals.copy_(batch.parts(SPLITS))
    kernel.join(timeout=60)
    assert not kernel.is_alive()
    assert (batch.lists.signals == -1).all()
    finish(batch)


@pytest.mark.parametrize(
    ("splits", "most", "least", "text"),
    [
        (0, 1, 1, "splits=0"),
        (1, 0, 0, "most_thread_blocks=0"),
        (1, 129, 1, "most_thread_blocks=129"),
        (1, 4, 5, "must be 1 to 4"),
    ],
)
def test_numbers_are_checked(splits: int, most: int, least: int, text: str) -> None:
    batch = Batch.make(SIZES, DEFAULT)
    with pytest.raises(RuntimeError, match=text):
        follow_scores(batch.view, batch.lists, splits, most, least)


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_scores_and_any_patience(seed: int, clock_step: SetClock) -> None:
    """Lists come in any order and at any time, before followers give up or after: over one cache,
    each is selected once, and the next step finds nothing of this one."""
    draw = random.Random(seed)
    batch = Batch.make(SIZES, RULES[seed % len(RULES)], draw.choice((0, 5, 1 << 14)))
    parts, gave_up = batch.parts(SPLITS), 0
    for _ in range(12):
        clock_step(draw.choice((0, 200, 20_000)))
        order = [index for index in range(len(parts)) for _ in range(int(parts[index]))]
        draw.shuffle(order)
        early = draw.randrange(len(order) + 1)
        for index in order[:early]:
            batch.lists.signals[index] += 1
        most = draw.randrange(1, 9)
        kernel = threading.Thread(target=follow, args=(batch, most, draw.randrange(1, most + 1)))
        kernel.start()
        for index in order[early:]:
            if draw.random() < 0.3:
                time.sleep(0.001)
            batch.lists.signals[index] += 1
            batch.cache.state[SCORED] += 1
        kernel.join(timeout=60)
        assert not kernel.is_alive()
        gave_up += int(batch.cache.state[REST_UNTIL]) != 0
        assert batch.cache.state[[ENDED, MISSED, EXISTING]].tolist() == [0, 0, 0]
        finish(batch)
        assert not batch.lists.signals.any()
        assert batch.cache.read_counters(reset=True).lists == LISTS
        batch.cache.state[REST_UNTIL] = 0
        batch = batch.again()
    assert gave_up < 12


def test_a_step_without_followers_looks_at_no_signal() -> None:
    batch = Batch.make(SIZES, DEFAULT)
    batch.lists.signals.fill_(-1)
    select_and_fetch(batch.view, batch.lists, followed=False)
    batch.check_lists()
    batch.check_rows()
    assert (batch.lists.signals == -1).all()
