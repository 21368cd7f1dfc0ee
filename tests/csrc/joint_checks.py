# SPDX-License-Identifier: Apache-2.0
"""Tokens of a request that have one list, by csrc/ on a GPU or emulated: each selects as alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.conftest import assert_close
from tests.csrc.batch import Batch, Sizes, integers
from vllm_kcache.kernels.select import BLOCK_BITS, MOST_BLOCKS, own_lists, select_and_fetch
from vllm_kcache.reference.paging import physical_v_blocks
from vllm_kcache.types import Selected, Selection

# Tokens of each request of a batch: all numbers from 1 on, a row that pads the batch.
RAGGED = (1, 4, 3, 0, 8, 2, 5, 4, 4)


def rows_of(lengths: tuple[int, ...], tokens: tuple[int, ...]) -> tuple[list[int], list[list[int]]]:
    """Length and span of each row of requests so long, which bring so many tokens; none pads."""
    rows: list[int] = []
    spans: list[list[int]] = []
    for length, count in zip(lengths, tokens, strict=True):
        rows += range(length - count + 1, length + 1) if count else [0]
        spans += [[at, max(count, 1) - 1 - at] for at in range(max(count, 1))]
    return rows, spans


def check_joint_lists(
    sizes: Sizes,
    rule: Selection,
    tokens: tuple[int, ...],
    together: int,
    num_slots: int = 1 << 14,
    kind: str = "random",
    device: str = "cpu",
    before: int = 0,
) -> None:
    """The list of each token is what it is where each has its own, and a row is fetched once.

    Args:
        sizes: `seq_lens` of requests.
        tokens: Of each request in the batch, the last of its length; 0: a row that pads.
        together: Most rows of a list.
        before: Rows of the first request that belong to another batch.
    """
    lengths, of_rows = rows_of(sizes.seq_lens, tokens)
    of_rows = [[at, after] for at, after in of_rows]
    for row in range(tokens[0]):
        of_rows[row][0] += before
    spans = torch.tensor(of_rows, dtype=torch.int32, device=device)
    batch = Batch.make(
        replace(sizes, seq_lens=tuple(lengths)), rule, num_slots, kind, device=device
    )
    for row, (_, after) in enumerate(of_rows):
        batch.lists.block_table[row] = batch.lists.block_table[row + after]
    select_and_fetch(batch.view, batch.lists)
    alone = batch.on_host()[1]
    batch.check_lists()
    batch.cache.flush()
    batch.cache.read_counters(reset=True)

    joint = batch.again()
    width = joint.lists.block_lse.shape[2]
    if rule.top_n is not None:
        columns = min(rule.top_n * together, width)
        places = (len(lengths), sizes.kv_heads, columns)
        selected = replace(joint.lists.selected, blocks=integers(*places).to(device))
        joint.lists = replace(joint.lists, selected=selected, rows=integers(*places).to(device))
    select_and_fetch(joint.view, joint.lists, followed=False, spans=spans, together=together)
    lists, selected = joint.on_host()
    _check_own(own_lists(selected, spans.cpu(), together), alone, lengths)
    different = _check_shared(joint, selected, of_rows, together)
    counted = joint.cache.read_counters()
    assert counted.lists == sizes.kv_heads * sum(length > 0 for length in lengths)
    assert counted.selected == int(alone.counts.sum())
    assert counted.hits + counted.misses + counted.direct == int(selected.counts.sum())
    if num_slots > 4 * different:
        assert counted.misses == different
    assert bool((lists.signals == 0).all())


def check_passed_over(device: str = "cpu") -> None:
    """Of a chunk that is said to score less than the rule asks for, no score is looked at: nothing
    of it is selected but the first and the recent blocks."""
    rule = Selection(None, None, 1, 16, "max", 1e-3)
    lengths, spans = rows_of((1000, 700), (2, 2))
    batch = Batch.make(Sizes(tuple(lengths), spare=3), rule, device=device)
    batch.lists.block_table[1::2] = batch.lists.block_table[::2]
    lists, chunk = batch.lists, 2
    assert lists.chunk_max is not None
    of_spans = torch.tensor(spans, dtype=torch.int32, device=device)
    for most in (lists.chunk_max, lists.chunk_max.clone()):
        if most is not lists.chunk_max:
            most[:, :, chunk] = -1e30
        joint = batch.again()
        joint.lists = replace(joint.lists, chunk_max=most)
        select_and_fetch(joint.view, joint.lists, followed=False, spans=of_spans, together=2)
        _, selected = joint.on_host()
        own = own_lists(selected, torch.tensor(spans), 2)
        of_chunk = (own.blocks >= 0) & (own.blocks // batch.sizes.chunk == chunk)
        assert bool(of_chunk.any()) == (most is lists.chunk_max)
        assert bool((own.blocks[..., 0] == 0).all())


def check_no_number(device: str = "cpu") -> None:
    """A block that scores no number, and so its chunk: the others are selected as where each row
    has its list."""
    rule, chunk = Selection(None, None, 1, 16, "max", 1e-3), 2
    lengths, spans = rows_of((1000, 700), (2, 2))
    batch = Batch.make(Sizes(tuple(lengths), spare=3), rule, device=device)
    batch.lists.block_table[1::2] = batch.lists.block_table[::2]
    lists = batch.lists
    assert lists.chunk_max is not None
    lists.block_lse[:, :, chunk * batch.sizes.chunk + 5] = torch.nan
    for of_chunks in (lists.chunk_lse, lists.chunk_max):
        of_chunks[:, :, chunk] = torch.nan
    select_and_fetch(batch.view, lists)
    alone = batch.on_host()[1]
    in_chunk = (alone.blocks >= 0) & (alone.blocks // batch.sizes.chunk == chunk)
    assert bool(in_chunk.any())
    joint, of_spans = batch.again(), torch.tensor(spans, dtype=torch.int32, device=device)
    select_and_fetch(joint.view, joint.lists, followed=False, spans=of_spans, together=2)
    _check_own(own_lists(joint.on_host()[1], torch.tensor(spans), 2), alone, lengths)


def _check_own(own: Selected, alone: Selected, lengths: list[int]) -> None:
    assert torch.equal(own.counts, alone.counts)
    columns = min(own.blocks.shape[2], alone.blocks.shape[2])
    listed = torch.arange(columns) < alone.counts[..., None]
    assert torch.equal(own.blocks[..., :columns][listed], alone.blocks[..., :columns][listed])
    there = torch.tensor(lengths) > 0
    for one, other in ((own.mass, alone.mass), (own.lse, alone.lse), (own.dropped, alone.dropped)):
        assert one is not None
        assert other is not None
        assert_close(one[there], other[there], torch.float32)
    assert bool((own.mass[~there] == 1).all())


def _check_shared(joint: Batch, selected: Selected, spans: list[list[int]], together: int) -> int:
    """One list of ascending blocks for each `together` rows, all of them selected by some row, and
    each where its row says. Returns how many different rows there are."""
    leads = torch.tensor([min(at, row) % together == 0 for row, (at, _) in enumerate(spans)])
    assert not selected.counts[~leads].any()
    listed = torch.arange(selected.blocks.shape[2]) < selected.counts[..., None]
    blocks = (selected.blocks % MOST_BLOCKS).where(listed, -1)
    assert bool((selected.blocks >> BLOCK_BITS)[listed].gt(0).all())
    follow = listed[..., 1:]
    assert bool((blocks.diff(dim=-1) > 0)[follow].all())
    lists = joint.on_host()[0]
    physical = physical_v_blocks(blocks, lists.block_table, joint.sizes.kv_heads, 4)[listed]
    rows = lists.rows[listed].long()
    there = rows >= 0
    assert torch.equal(rows[~there], -2 - physical[~there])
    assert torch.equal(joint.cache.slots.cpu()[rows[there]], joint.host_rows[physical[there]])
    return len(physical.unique())
