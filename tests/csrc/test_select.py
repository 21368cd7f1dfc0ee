# SPDX-License-Identifier: Apache-2.0
"""Selection by csrc/ against its definition, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.csrc.batch import DEFAULT, POISON, ROW_BYTES, RULES, Batch, Sizes, layer_view
from tests.csrc.joint_checks import (
    RAGGED,
    check_joint_lists,
    check_no_number,
    check_passed_over,
)
from vllm_kcache.cache.hot_cache import HotCache
from vllm_kcache.kernels.select import select_and_fetch, select_blocks
from vllm_kcache.types import Selection

pytestmark = pytest.mark.usefixtures("emulated")

# V blocks of a segment, and of a list whose masses a search keeps (csrc/select.cuh).
SEGMENT, MASSES = 16384, 4608
LONG_RULES = (
    DEFAULT,
    Selection(500, None, 1, 32, "sum"),
    Selection(300, None, 1, 32, "max"),
    Selection(None, 0.9, 1, 32, "max"),
    Selection(None, 0.9, 0, 32, "sum"),
    Selection(600, 0.95, 1, 32, "max"),
)


def run(batch: Batch) -> None:
    """Select alone; the lists are padded."""
    lists = batch.lists
    select_blocks(
        batch.view, lists.seq_lens, lists.block_lse, lists.chunk_lse, lists.chunk_blocks,
        lists.selected,
    )  # fmt: skip
    columns = torch.arange(lists.selected.blocks.shape[2])
    past = columns >= lists.selected.counts[..., None]
    assert (lists.selected.blocks[past] == -1).all()
    assert (lists.rows == POISON).all()
    batch.check_lists()


@pytest.mark.parametrize(
    ("group", "tokens"), [(1, 8), (2, 1), (3, 1), (4, 16), (5, 8), (8, 8), (12, 1), (16, 16)]
)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_odd_lengths(rule: Selection, group: int, tokens: int) -> None:
    """Empty, one token, part of a block, no more than the cap, and more than the threads."""
    lengths = (0, 1, tokens - 1, 29 * tokens, 41 * tokens + 1, 777 * tokens - tokens // 2)
    run(Batch.make(Sizes(lengths, 2, group, tokens, 13, spare=5), rule))


@pytest.mark.parametrize(
    "blocks", [MASSES, MASSES + 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 77]
)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_segments(rule: Selection, blocks: int) -> None:
    """Lists that end in the first segment, with it, just after it, and in the third; the most whose
    masses are kept, and one more."""
    sizes = Sizes((blocks * 8 - 3,), 1, 2, 8, 31)
    run(Batch.make(sizes, rule))
    batch = Batch.make(sizes, rule, kind="ties")
    run(batch)
    # Sums are integers of 2^-30: of many blocks a coverage may end one block sooner or later.
    if rule.coverage is None or blocks <= 2 * MASSES:
        batch.check_equal()


@pytest.mark.parametrize("kind", ["random", "equal", "ties", "one has all", "tiny"])
@pytest.mark.parametrize("rule", LONG_RULES, ids=str)
def test_long_requests(rule: Selection, kind: str) -> None:
    """Three or ten segments; one bin of ranks with few blocks, and with all of them."""
    batch = Batch.make(Sizes((40_000, 5_000), 1, 4, 1, 128), rule, kind=kind)
    run(batch)
    if kind == "equal" and rule.top_n is not None:
        # Of equal masses the lower blocks win, and the newest are forced.
        count = int(batch.lists.selected.counts[0, 0])
        expected = [*range(count - 32), *range(40_000 - 32, 40_000)]
        assert batch.lists.selected.blocks[0, 0, :count].tolist() == expected


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_scores_may_begin_anywhere(rule: Selection, group: int) -> None:
    """Rows of a multiple of four, in a tensor that does not begin where four are loaded at once."""
    batch = Batch.make(Sizes((509, 512), 2, group, 8, 16), rule)
    scores = batch.lists.block_lse
    assert scores.shape[2] % 4 == 0
    moved = torch.empty(scores.numel() + 1)[1:].view(scores.shape)
    batch.lists = replace(batch.lists, block_lse=moved.copy_(scores))
    run(batch)


@pytest.mark.parametrize("group", [4, 16])
def test_nothing_is_kept(group: int) -> None:
    """Longer than its scores, a request has no recent block; nor has it what other lists cover."""
    rule = Selection(None, None, 0, 1, "max", 0.5)
    run(Batch.make(Sizes((64, 64), 2, group, 8, 16), rule, kind="one has all"))
    batch = Batch.make(Sizes((800,), 1, group, 8, 16), rule, kind="equal")
    lists = batch.lists
    longer = lists.seq_lens + 8 * lists.block_lse.shape[2] + 4096
    select_blocks(
        batch.view, longer, lists.block_lse, lists.chunk_lse, lists.chunk_blocks, lists.selected
    )
    assert not lists.selected.counts.any()
    assert not lists.selected.mass.any()


@pytest.mark.parametrize("rule", [DEFAULT, Selection(300, None, 1, 32, "max")], ids=str)
def test_the_longest_request(rule: Selection) -> None:
    run(Batch.make(Sizes((1 << 20,), 1, 1, 1, 256), rule, num_slots=0, kind="ties"))


@pytest.mark.parametrize("group", [1, 3, 8, 16])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_ties_are_those_of_the_definition(rule: Selection, group: int) -> None:
    """Heads that agree: then masses that are equal in one order of summing are in every order."""
    batch = Batch.make(Sizes((5000, 700), 2, group, 8, 16), rule, kind="ties")
    for tensor in (batch.lists.block_lse, batch.lists.chunk_lse):
        tensor.copy_(tensor[:, :1].expand_as(tensor).clone())
    run(batch)
    batch.check_equal()


def test_capped_lists_hold_what_is_forced_first() -> None:
    """More blocks are forced than there is room for: the lower ones win."""
    batch = Batch.make(Sizes((800,), 1, 2), Selection(5, None, 3, 64, "sum"))
    run(batch)
    assert batch.lists.selected.blocks[0, 0].tolist() == [0, 1, 2, 92, 93]


def test_layer_views_are_checked() -> None:
    rows = torch.zeros((24, ROW_BYTES), dtype=torch.uint8)
    cache = HotCache.make(4, 2, 24, ROW_BYTES, "cpu")
    good = (rows, cache, 1, 2, 4, 16, 4, DEFAULT)
    layer_view(*good)
    odd = replace(cache, slots=torch.zeros((4, 40), dtype=torch.uint8))
    short = replace(cache, state=cache.state[:4])
    for place, value, text in (
        (0, torch.zeros((24, 40), dtype=torch.uint8), "a row has 40 bytes"),
        (0, rows[:16], "table: has size 24 in dimension 1; must be 16"),
        (0, rows[:, ::2], "host_rows: must be contiguous"),
        (1, odd, "slots: has size 40 in dimension 1; must be 48"),
        (1, short, "state: has size 4 in dimension 0; must be 8"),
        (2, 2, "layer=2: must be 0 to 1"),
        (3, 5, "must be a multiple of the 20 of a page"),
        (4, 17, "group=17: must be 1 to 16"),
        (6, 3, "block_tokens=3: must divide the 16"),
        (7, Selection(0, None, 1, 1, "max"), "top_n=0: must be at least 1, or -1"),
        (7, Selection(None, None, 1, 0, "max"), "recent_tokens=0: must be at least 1"),
        (7, Selection(None, 0.5, 1, 1, "max", 0.1), "not together with coverage"),
    ):
        arguments = list(good)
        arguments[place] = value
        with pytest.raises(RuntimeError, match=text):
            layer_view(*arguments)  # type: ignore[arg-type]


def test_steps_are_checked() -> None:
    """Errors name the tensor that does not fit."""
    batch = Batch.make(Sizes((80, 30)), Selection(30, None, 1, 8, "sum"))
    lists, selected = batch.lists, batch.lists.selected
    assert selected.lse is not None
    for name, value, text in (
        ("seq_lens", lists.seq_lens.long(), "seq_lens: has the wrong dtype"),
        ("block_lse", lists.block_lse[:, :4], "block_lse: must be contiguous"),
        ("block_lse", torch.zeros((2, 8, 12)), "blocks: has N=10 columns; must have at least 12"),
        ("block_lse", torch.empty((2, 8, (1 << 20) + 1)), "P=1048577"),
        ("chunk_lse", lists.chunk_lse[..., :0], "chunk_lse: has C=0 chunks of 16"),
        ("chunk_blocks", 0, "chunk_blocks=0: must be 1 to"),
        ("signals", lists.signals[:3], "lists: has 3 entries; must have at least 4"),
        ("rows", lists.rows[:1], "rows: has size 1 in dimension 0; must be 2"),
        ("selected", replace(selected, lse=selected.lse[:, :3].clone()), "lse: has size 3"),
        ("block_table", lists.block_table.t(), "block_table: must be"),
    ):
        with pytest.raises(RuntimeError, match=text):
            select_and_fetch(batch.view, replace(lists, **{name: value}))
    with pytest.raises(RuntimeError, match="layer: must be what layer_view returned"):
        select_and_fetch(torch.zeros_like(batch.view), lists)
    spans = torch.zeros((2, 2), dtype=torch.int32)
    askew = torch.zeros(5, dtype=torch.int32)[1:].view(2, 2)
    for how, text in (
        ({"spans": spans, "together": 5, "followed": False}, "together=5: needs spans"),
        ({"spans": None, "together": 2, "followed": False}, "together=2: needs spans"),
        ({"spans": spans[:1], "together": 2, "followed": False}, "spans: has size 1 in dimension"),
        ({"spans": askew, "together": 2, "followed": False}, "spans: must begin at a"),
        ({"spans": spans, "together": 2}, "lists: none where tokens of a request have one"),
    ):
        with pytest.raises(RuntimeError, match=text):
            select_and_fetch(batch.view, lists, **how)  # type: ignore[arg-type]
    capped = Batch.make(Sizes((80, 30)), Selection(3, None, 1, 8, "sum"))
    with pytest.raises(RuntimeError, match="N=3 columns; must have those of 2 tokens"):
        select_and_fetch(capped.view, capped.lists, followed=False, spans=spans, together=2)


def test_an_empty_batch_is_no_launch() -> None:
    batch = Batch.make(Sizes((5,)), DEFAULT)
    lists, selected = batch.lists, batch.lists.selected
    assert selected.lse is not None
    select_and_fetch(
        batch.view,
        replace(
            lists,
            seq_lens=lists.seq_lens[:0],
            block_table=lists.block_table[:0],
            block_lse=lists.block_lse[:0],
            chunk_lse=lists.chunk_lse[:0],
            selected=replace(
                selected, blocks=selected.blocks[:0], counts=selected.counts[:0],
                mass=selected.mass[:0], lse=selected.lse[:0], dropped=None,
            ),
            rows=lists.rows[:0],
            chunk_max=None,
        ),
    )  # fmt: skip
    assert batch.cache.read_counters().lists == 0


@pytest.mark.parametrize(
    ("rule", "group", "together"),
    # Each rule with one of the pairs in every run, with the others in the full one.
    [
        pytest.param(rule, *pair, marks=() if of_rule % 4 == of_pair else pytest.mark.full)
        for of_rule, rule in enumerate(RULES)
        for of_pair, pair in enumerate([(4, 4), (1, 8), (8, 2), (5, 3)])
    ],
    ids=str,
)
def test_tokens_of_a_request_with_one_list(rule: Selection, group: int, together: int) -> None:
    """Ragged, at the ends of blocks, and beside rows that belong to another batch."""
    lengths = (9, 400, 8, 0, 203, 33, 777, 17, 41)
    sizes = Sizes(lengths, 2, group, 8, 13, spare=3)
    check_joint_lists(sizes, rule, RAGGED, together)
    check_joint_lists(sizes, rule, (1, 6, *RAGGED[2:]), together, num_slots=30, kind="ties")
    # With scores that begin where a vector may, and chunks that may be passed over.
    check_joint_lists(replace(sizes, chunk=8, spare=2), rule, RAGGED, together)
    check_joint_lists(
        replace(sizes, seq_lens=(400, 16)), rule, (5, 4), together, num_slots=0, before=2
    )


@pytest.mark.parametrize("rule", LONG_RULES, ids=str)
def test_segments_of_one_list(rule: Selection) -> None:
    """Rows that end in one segment and in the next."""
    for blocks in (4096, 8192, 2 * 8192 + 77):
        sizes = Sizes((blocks * 8 + 2, 5), 1, 2, 8, 64)
        check_joint_lists(sizes, rule, (4, 1), 4, num_slots=1 << 16)
        vectors = replace(sizes, spare=-(blocks + 1) % 4)
        check_joint_lists(vectors, rule, (4, 1), 4, num_slots=1 << 16)


def test_chunks_without_enough_are_passed_over() -> None:
    check_passed_over()


def test_a_score_that_is_no_number_hides_no_other() -> None:
    check_no_number()
