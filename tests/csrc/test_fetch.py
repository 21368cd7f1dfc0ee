# SPDX-License-Identifier: Apache-2.0
"""Look-ups and copies of csrc/fetch.cuh against their definition, without a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.csrc.batch import DEFAULT, EVERYTHING, POISON, Batch, Sizes
from vllm_kcache.cache.hot_cache import EMPTY_SLOT, EPOCH
from vllm_kcache.kernels.fetch import fetch_blocks
from vllm_kcache.kernels.select import select_and_fetch
from vllm_kcache.reference.paging import physical_v_blocks
from vllm_kcache.types import Selection

pytestmark = pytest.mark.usefixtures("emulated")

SIZES = Sizes((700, 0, 1, 5000, 37), 2, 4)
COVERAGE = Selection(None, 0.9, 1, 8, "sum")


def run(batch: Batch) -> None:
    """Fetch alone, as an epoch of its own; rows are padded."""
    lists = batch.lists
    lists.rows.fill_(POISON)
    fetch_blocks(batch.view, lists.selected, lists.block_table, lists.rows)
    past = torch.arange(lists.rows.shape[2]) >= lists.selected.counts[..., None]
    assert (lists.rows[past] == -1).all()
    batch.check_rows()
    batch.cache.advance_epoch()


def selected_batch(rule: Selection, num_slots: int, sizes: Sizes = SIZES) -> Batch:
    """Lists are there, and nothing is resident."""
    batch = Batch.make(sizes, rule, num_slots)
    select_and_fetch(batch.view, batch.lists)
    batch.check_step()
    batch.cache.advance_epoch()
    batch.cache.flush()
    batch.cache.read_counters(reset=True)
    return batch


@pytest.mark.parametrize("rule", [DEFAULT, COVERAGE, EVERYTHING], ids=str)
@pytest.mark.parametrize("num_slots", [0, 5, 1 << 14])
def test_lists_are_found(rule: Selection, num_slots: int) -> None:
    """Twice over one cache: missing first and found after, where there is room."""
    batch = selected_batch(rule, num_slots)
    total = int(batch.lists.selected.counts.sum())
    for epoch in range(2):
        run(batch)
        counted = batch.cache.read_counters(reset=True)
        assert counted.hits + counted.misses + counted.direct == total
        if num_slots == 0:
            assert counted.direct == total
        elif num_slots > total:
            assert (counted.hits, counted.misses) == ((total, 0) if epoch else (0, total))
        else:
            # Each slot is found once or taken once; all may be found before any is taken.
            assert 1 <= counted.hits + counted.misses <= num_slots
            assert epoch or counted.hits == 0


def test_lists_of_many_segments() -> None:
    batch = selected_batch(EVERYTHING, 1 << 15, Sizes((9001, 4096), 1, 1, 1))
    run(batch)
    assert batch.cache.read_counters().misses == 9001 + 4096


@pytest.mark.parametrize("num_slots", [7, 1 << 14])
def test_what_several_lists_miss_is_copied_once(num_slots: int) -> None:
    """Lists of one request's tokens, or of requests that share pages: all find one slot."""
    for _ in range(5):
        batch = selected_batch(COVERAGE, num_slots, Sizes((700,) * 6, 2, 4))
        batch.lists.block_table[1:] = batch.lists.block_table[:1]
        run(batch)
        counted, selected = batch.cache.read_counters(), batch.lists.selected
        total = int(selected.counts.sum())
        listed = torch.arange(selected.blocks.shape[2]) < selected.counts[..., None]
        physical = physical_v_blocks(
            selected.blocks.where(listed, -1), batch.lists.block_table, 2, 4
        )[listed]
        assert len(physical.unique()) < 0.6 * total
        assert counted.hits + counted.misses + counted.direct == total
        if num_slots < 8:
            assert counted.misses <= num_slots
            continue
        assert counted.misses == len(physical.unique())
        assert counted.direct == 0


def test_a_slot_that_an_old_entry_names_is_not_taken() -> None:
    """Another list might take it for filled by that entry, while its owner gives it up."""
    batch = selected_batch(COVERAGE, 64)
    batch.cache.table.fill_(3)
    run(batch)
    assert batch.cache.read_counters().misses > 30
    assert int(batch.cache.slot_word[3]) == EMPTY_SLOT


def test_a_slot_that_another_block_owns_is_no_hit() -> None:
    """The table still sends a block to a slot that has just been taken: its bytes are not its."""
    batch = selected_batch(COVERAGE, 1 << 14)
    total = int(batch.lists.selected.counts.sum())
    for expected_hits in (0, total - 1):
        run(batch)
        assert batch.cache.read_counters(reset=True).hits == expected_hits
        slot = int(batch.lists.rows[0, 0, 0])
        batch.cache.slots[slot] = 0
        batch.cache.slot_word[slot] += 7 << 32


def test_what_is_invalidated_is_fetched_again() -> None:
    """And nothing else: the rest stays resident, and the old slots are taken again in time."""
    batch = selected_batch(DEFAULT, 1 << 14)
    cache, total = batch.cache, int(batch.lists.selected.counts.sum())
    run(batch)
    forgotten = (cache.table.view(-1) >= 0).nonzero().flatten()[::3]
    old_slots = cache.table.view(-1)[forgotten].long()
    cache.invalidate(torch.cat((forgotten, forgotten[:2])))
    cache.slots[old_slots] = 0
    cache.read_counters(reset=True)
    run(batch)
    counted = cache.read_counters()
    assert (counted.hits, counted.misses) == (total - len(forgotten), len(forgotten))
    cache.slot_word[cache.slot_word == EMPTY_SLOT] = (1 << 62) + int(cache.state[EPOCH]) + 1
    cache.invalidate(torch.arange(cache.table.numel()))
    run(batch)
    assert cache.read_counters().misses > len(forgotten)
