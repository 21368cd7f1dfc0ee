# SPDX-License-Identifier: Apache-2.0
"""Selection and fetch by csrc/ on a GPU, against their definition; tests/csrc has more cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.csrc.batch import DEFAULT, POISON, RULES, Batch, Sizes
from tests.csrc.joint_checks import RAGGED, check_joint_lists, check_passed_over
from vllm_kcache.cache.hot_cache import ENDED, REST_UNTIL, SCORED, WANTED
from vllm_kcache.kernels.select import follow_scores, select_and_fetch, select_blocks
from vllm_kcache.reference.paging import physical_v_blocks
from vllm_kcache.types import Selection

pytestmark = pytest.mark.gpu

SPLITS, FOLLOWERS = 3, 32
# Empty, one token, one segment and a little more or less, and ten segments.
LENGTHS = (0, 1, 37, 4095 * 8, 4096 * 8, 4096 * 8 + 1, 40_000 * 8 - 5)


@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_lists_of_a_step(rule: Selection, group: int) -> None:
    """Every kernel there is: alone, followed, and what comes after; twice over one cache."""
    batch = Batch.make(Sizes(LENGTHS, 2, group, 8, 16), rule, 1 << 18, "ties", device="cuda")
    lists = batch.lists
    select_blocks(
        batch.view, lists.seq_lens, lists.block_lse, lists.chunk_lse, lists.chunk_blocks,
        lists.selected,
    )  # fmt: skip
    batch.check_lists()
    # Sums of so many equal masses, which are rounded alike, are those of the definition nearly.
    if rule.coverage is None and (group == 1 or rule.combine == "max"):
        batch.check_equal()
    batch.cache.read_counters(reset=True)
    for followed in (False, True):
        batch = batch.again()
        if followed:
            batch.lists.signals.copy_(batch.parts(SPLITS))
            follow_scores(batch.view, batch.lists, SPLITS, FOLLOWERS, 1)
            assert (batch.lists.signals == -1).all()
        select_and_fetch(batch.view, batch.lists)
        batch.check_step()
        batch.cache.advance_epoch()
        counted = batch.cache.read_counters(reset=True)
        assert counted.lists == 12
        assert (counted.hits > 0) == followed


@pytest.mark.parametrize(("group", "together"), [(4, 4), (1, 8), (8, 2), (5, 3)])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_tokens_of_a_request_with_one_list(rule: Selection, group: int, together: int) -> None:
    """Ragged, beside rows of another batch; more rows than are looked at at once; long lists."""
    lengths = (9, 4000, 8, 0, 203, 33, 777, 17, 8192 * 8 + 2)
    sizes = Sizes(lengths, 2, group, 8, 16)
    check_joint_lists(sizes, rule, RAGGED, together, 1 << 18, device="cuda")
    check_joint_lists(sizes, rule, RAGGED, together, 30, device="cuda")
    many = replace(sizes, seq_lens=(400, *range(100, 160)))
    check_joint_lists(many, rule, (5, *[4] * 60), together, 0, device="cuda", before=2)


def test_chunks_without_a_block_are_passed_over() -> None:
    check_passed_over(device="cuda")


@pytest.mark.parametrize("num_slots", [500, 1 << 16])
def test_what_several_lists_miss_is_copied_once(num_slots: int) -> None:
    """Many lists over the same pages, also where slots are taken from one another all the time."""
    sizes = Sizes((4000,) * 32, 2, 4)
    batch = Batch.make(sizes, DEFAULT, num_slots, device="cuda")
    batch.lists.block_table[1:] = batch.lists.block_table[:1]
    for _ in range(20):
        batch = batch.again()
        if num_slots == 1 << 16:
            batch.cache.flush()
        batch.cache.read_counters(reset=True)
        select_and_fetch(batch.view, batch.lists)
        batch.check_step()
        batch.cache.advance_epoch()
        counted, (lists, selected) = batch.cache.read_counters(), batch.on_host()
        listed = torch.arange(selected.blocks.shape[2]) < selected.counts[..., None]
        blocks = selected.blocks.where(listed, -1)
        different = physical_v_blocks(blocks, lists.block_table, sizes.kv_heads, 4)[listed].unique()
        assert len(different) < 0.2 * int(selected.counts.sum())
        # Where nothing is flushed all slots may be of blocks that are selected again.
        assert counted.misses <= len(different)
        assert counted.misses > 0 or num_slots == 500
        if num_slots == 1 << 16:
            assert counted.misses == len(different)


@pytest.mark.parametrize("scored", [0, 5])
def test_followers_give_up_and_rest(scored: int) -> None:
    """Where scoring stands still: what is left, the launch after them does, once."""
    batch = Batch.make(Sizes(LENGTHS, 2, 4, 8, 16), DEFAULT, 1 << 16, device="cuda")
    parts = batch.parts(SPLITS)
    batch.lists.signals[:scored] = parts[:scored]
    for rests in (False, True):
        follow_scores(batch.view, batch.lists, SPLITS, 4, 2)
        done = batch.lists.signals == -1
        # Empty lists have no parts to wait for.
        assert bool(done.any()) == (not rests)
        assert (batch.lists.selected.counts.flatten()[~done] == POISON).all()
        assert int(batch.cache.state[REST_UNTIL]) == 4097
        batch.lists.signals[~done] = parts[~done]
        select_and_fetch(batch.view, batch.lists)
        batch.check_step()
        batch.cache.advance_epoch()
        assert batch.cache.read_counters(reset=True).lists == 12
        batch = batch.again()
        batch.lists.signals.copy_(parts)  # in the second round all are scored


def test_demand_falls_and_rises() -> None:
    """Over and over; each list exactly once, whatever the number of those who work."""
    batch = Batch.make(Sizes((20_000,) * 16, 8, 4), DEFAULT, 1 << 20, device="cuda")
    for step in range(200):
        if step % 2:
            batch.cache.flush()
        batch.lists.signals.copy_(batch.parts(SPLITS))
        follow_scores(batch.view, batch.lists, SPLITS, 48, 2)
        assert int((batch.lists.signals == -1).sum()) == 128
        select_and_fetch(batch.view, batch.lists)
        batch.cache.advance_epoch()
        assert batch.cache.read_counters(reset=True).lists == 128
        assert int(batch.cache.state[ENDED]) == 0
        if step:
            assert (int(batch.cache.state[WANTED]) > 2) == bool(step % 2)
    batch.check_step()


def test_scores_that_come_late() -> None:
    """A list is taken only when the last of its parts is there, and sees all of its scores."""
    batch = Batch.make(Sizes((20_000,) * 4, 4, 4), DEFAULT, 1 << 18, device="cuda")
    scores, sums = batch.lists.block_lse.clone(), batch.lists.chunk_lse.clone()
    parts = batch.parts(SPLITS)
    batch.lists.block_lse.fill_(torch.nan)
    batch.lists.chunk_lse.fill_(torch.nan)
    beside = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(beside):
        follow_scores(batch.view, batch.lists, SPLITS, 8, 8)
    for index in range(len(parts)):
        request, head = divmod(index, 4)
        its = slice(4 * head, 4 * head + 4)
        batch.lists.block_lse[request, its] = scores[request, its]
        batch.lists.chunk_lse[request, its] = sums[request, its]
        batch.lists.signals[index] = parts[index]
        batch.cache.state[SCORED] += 1
    torch.cuda.synchronize()
    select_and_fetch(batch.view, batch.lists)
    batch.check_step()
    assert batch.cache.read_counters().lists == len(parts)
