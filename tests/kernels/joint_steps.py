# SPDX-License-Identifier: Apache-2.0
"""Decode steps of several tokens a request, which have one list together, against the definition,
by which each has its own.

`python -m tests.csrc.interpreted LIBRARY tests.kernels.joint_steps` runs them without a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch

from tests.conftest import assert_close
from tests.csrc.joint_checks import RAGGED, rows_of
from tests.kernels.code_steps import attended_query, check_counted
from tests.kernels.layers import Layer, code_layer_of, poisoned_workspace
from tests.reference.coded import Coded
from tests.shapes import Shape, build_case
from vllm_kcache.cache.hot_cache import EPOCH, ESTIMATE_ERROR_EDGES
from vllm_kcache.kernels import attend
from vllm_kcache.kernels.attend_plan import RowsConfig
from vllm_kcache.kernels.decode import decode_step
from vllm_kcache.kernels.select import BLOCK_BITS, MOST_BLOCKS, own_lists
from vllm_kcache.reference.attend import attend_rows
from vllm_kcache.reference.fetch import fetch_rows
from vllm_kcache.reference.select import request_lse, select_blocks
from vllm_kcache.reference.sinks import refine_lse, share_of_tokens
from vllm_kcache.types import Selected, Selection

# Requests of the tokens of `RAGGED`; one, two and four tiles of query heads in a list, and requests
# of more tokens than have one list; all sizes of a head, blocks of 1 to 32 tokens.
SHAPES = (
    Shape((9, 200, 8, 0, 203, 33, 77, 17, 41), 2, 4, 128, 16, 8),
    Shape((1, 90, 3, 0, 64, 65, 31, 7, 4), 1, 1, 64, 32, 4),
    Shape((20, 65, 31, 0, 130, 12, 9, 33, 64), 2, 2, 80, 32, 1),
    Shape((50, 64, 33, 0, 70, 5, 40, 96, 31), 1, 5, 96, 32, 32),
    Shape((21, 5, 3, 0, 60, 2, 16, 30, 90), 1, 8, 256, 16, 2),
)
# Lists of several parts beside some of one.
LONG = Shape((1500, 33, 900, 0, 1100), 1, 4, 64, 16, 8)
# More lists than the threads of a thread block look at at once, when they share out the tiles.
MANY = Shape(tuple(8 + 7 * i % 40 for i in range(90)), 4, 1, 64, 16, 8)
# Fewer tokens, so that one and two tiles have a head of usual size, and groups that leave a tile in
# part; and more than have one list, which are scored together, with more KV heads than a thread
# looks at at once when tiles are shared out, and rows that begin in the next chunk of scores.
FEW = (
    (Shape((9, 200, 8, 0, 203, 33), 2, 1, 128, 16, 8), 4),
    (SHAPES[0], 2),
    (Shape((260, 16, 7, 0, 130, 33), 1, 7, 128, 48, 16), 2),
    (Shape((9, 70, 3, 0, 259, 33), 9, 1, 64, 16, 4), 12),
    (Shape((64, 33, 20, 0, 257), 1, 3, 96, 32, 8), 5),
)
RULES = (
    Selection(None, None, 1, 1, "sum"),
    Selection(None, None, 1, 8, "max", 0.05),
    Selection(3, None, 1, 1, "sum"),
    Selection(None, None, 1, 8, "max", 0.05, 20),
    Selection(None, 0.7, 0, 1, "max"),
)
DTYPES = (torch.bfloat16, torch.float16)
# With each tail, and one, two and four tiles of query heads.
WITH_SINKS = ((LONG, RULES[0]), (LONG, RULES[1]), (SHAPES[1], RULES[3]), (SHAPES[4], RULES[4]))
# Of a query, and the row that has it: one amid, the first and the last of a list in SHAPES[0].
NO_NUMBERS = ((torch.nan, 2), (torch.inf, 1), (-torch.inf, 4))
Step = Callable[[], object]
MOST_TOKENS = max(RAGGED)


def joint_layer(
    shape: Shape, rule: Selection, dtype: torch.dtype, num_slots: int, device: str,
    most_tokens: int = MOST_TOKENS, before: int = 0,
) -> tuple[Coded, Layer]:  # fmt: skip
    """A row for each token of the requests of a case; in `Coded` a request each.

    Args:
        before: Rows of the first request that belong to another batch.
    """
    coded = Coded.of(build_case(shape, dtype), "int8")
    case = coded.case
    ragged = zip(itertools.cycle(RAGGED), shape.seq_lens, strict=False)
    tokens = tuple(
        most_tokens if count == MOST_TOKENS else min(count, most_tokens) for count, _ in ragged
    )
    lengths, spans = rows_of(shape.seq_lens, tokens)
    for row in range(tokens[0]):
        spans[row][0] += before
    request = torch.arange(len(tokens)).repeat_interleave(torch.tensor(tokens).clamp_min(1))
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(len(lengths), *case.query.shape[1:], generator=generator)
    case = replace(
        case, query=(3 * query).to(dtype), block_table=case.block_table[request],
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        shape=replace(shape, seq_lens=tuple(lengths)),
    )  # fmt: skip
    coded = replace(coded, case=case)
    tail = "renormalize" if rule.clip is None else "clip"
    layer = code_layer_of(coded, rule, tail, num_slots, device)
    batch = replace(
        layer.batch, spans=torch.tensor(spans, dtype=torch.int32, device=device),
        most_tokens=most_tokens,
    )  # fmt: skip
    assert batch.listed_together(layer.view.shape) > 1
    return coded, replace(layer, batch=batch, workspace=poisoned_workspace(layer.view, batch))


def lists_of_rows(layer: Layer) -> tuple[Selected, Selected]:
    """The lists that a step has left, on the host: as they are, and of each row."""
    lists, spans = layer.workspace.views(layer.view, layer.batch), layer.batch.spans
    assert spans is not None
    assert lists.selected.lse is not None
    assert lists.selected.dropped is not None
    there = Selected(
        lists.selected.blocks.cpu(), lists.selected.counts.cpu(), lists.selected.mass.cpu(),
        lists.selected.lse.cpu(), lists.selected.dropped.cpu(),
    )  # fmt: skip
    return there, own_lists(there, spans.cpu(), layer.batch.listed_together(layer.view.shape))


def expected_of(
    coded: Coded, layer: Layer, own: Selected
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output of the definition over these lists, the refined sums of their blocks, and the scores
    that they were chosen by. The lists are checked first."""
    case, view = coded.case, layer.view
    shape, rule, tokens = case.shape, view.selection, case.shape.v_block_tokens
    block_lse = layer.workspace.views(view, layer.batch).block_lse.cpu()
    exists = torch.arange(shape.max_blocks) < -(-case.seq_lens[:, None] // tokens)
    block_lse = block_lse.masked_fill(~exists[:, None], -torch.inf)
    chosen = select_blocks(
        block_lse, case.seq_lens, shape.num_kv_heads, tokens, rule, estimated=True
    )
    assert torch.equal(own.counts, chosen.counts)
    fetched = fetch_rows(
        own, case.block_table, coded.host_rows, shape.num_kv_heads, shape.page_tokens // tokens
    )
    refined = torch.zeros(*case.query.shape[:2], own.blocks.shape[2])
    expected = attend_rows(
        attended_query(coded, case.query.dtype), coded.host_rows, coded.row, coded.stats, fetched,
        own, case.seq_lens, case.scale, view.tail, clip=rule.clips(case.seq_lens), refined=refined,
    )  # fmt: skip
    return expected, refined, block_lse


def are_cut(shared: Selected, block_tokens: int, splits: int, least_tiles: int) -> bool:
    """Whether some list has several parts: of all lengths the shortest is taken with which there
    are no more parts than thread blocks."""
    tiles = -(-shared.counts[shared.counts > 0] * block_tokens // 16)
    for units in (3, 4, 6, 8, 16, 32, 64, 128, 256, 512):
        parts = -(-tiles // (units * least_tiles))
        if int(parts.sum()) <= splits:
            return bool((parts > 1).any())
    return False


def check_step(
    shape: Shape, rule: Selection, dtype: torch.dtype, num_slots: int = 256, device: str = "cpu",
    most_tokens: int = MOST_TOKENS, before: int = 0,
) -> None:  # fmt: skip
    """Misses first, hits after, the same answer, in one part of a list and in some."""
    coded, layer = joint_layer(shape, rule, dtype, num_slots, device, most_tokens, before)
    view, batch, workspace = layer.view, layer.batch, layer.workspace
    for number in (1, 2):
        out = torch.full_like(batch.query, torch.nan)
        decode_step(view, workspace, batch, out)
        shared, own = lists_of_rows(layer)
        expected, _, _ = expected_of(coded, layer, own)
        assert_close(out.cpu(), expected)
        assert int(layer.cache.state[EPOCH]) == number
    counted = layer.cache.read_counters()
    assert counted.selected == 2 * int(own.counts.sum())
    read = counted.hits + counted.misses + counted.direct
    assert read == 2 * int(shared.counts.sum()) <= counted.selected
    lists = workspace.views(view, batch)
    # Lists that have parts in several thread blocks, and thread blocks that have several lists.
    for splits, least_tiles in ((50, 1), (7, 1), (2, 2)):
        out.fill_(torch.nan)
        workspace.weights.fill_(torch.nan)
        attend.attend_blocks(
            view, batch, lists.selected, lists.rows, workspace, out,
            config=RowsConfig(splits, least_tiles),
        )  # fmt: skip
        assert_close(out.cpu(), expected)
        parts = are_cut(shared, shape.v_block_tokens, splits, least_tiles)
        assert bool(workspace.weights.isnan().all()) == (not parts), "whole lists, or parts"
    assert not workspace.arrivals.any()


def check_changing_lengths(
    device: str = "cpu", captured: Callable[[Step], Step] = lambda step: step
) -> None:
    """One step, run again on other lengths: how lists are cut, and of which chunks there is a
    largest score, is of the lengths that it finds.

    Args:
        captured: What runs the step again, as a graph that it is captured in.
    """
    coded, layer = joint_layer(LONG, RULES[1], torch.bfloat16, 256, device)
    view, batch, workspace = layer.view, layer.batch, layer.workspace
    assert batch.spans is not None
    out = torch.empty_like(batch.query)
    step = captured(lambda: decode_step(view, workspace, batch, out))
    lengths, spans = batch.seq_lens.clone(), batch.spans.clone()
    # Rows of the requests of LONG, of one, four, three and eight tokens, the fourth pads.
    for first, last, length in ((0, 0, 1500), (9, 16, 257), (1, 4, 0), (0, 0, 5), (5, 7, 514)):
        batch.seq_lens.copy_(lengths)
        batch.spans.copy_(spans)
        rows = slice(first, last + 1)
        if length == 0:
            batch.seq_lens[rows] = 0
            batch.spans[rows] = 0
        else:
            batch.seq_lens[rows] += length - int(lengths[last])
        out.fill_(torch.nan)
        step()
        found = replace(coded, case=replace(coded.case, seq_lens=batch.seq_lens.cpu()))
        expected, _, _ = expected_of(found, layer, lists_of_rows(layer)[1])
        assert_close(out.cpu(), expected)
        assert not workspace.arrivals.any()


def check_sinks(shape: Shape, rule: Selection, dtype: torch.dtype, device: str = "cpu") -> None:
    """Learned sinks, which have from nearly nothing to nearly all of the mass, beside lists in one
    part and in some."""
    coded, layer = joint_layer(shape, rule, dtype, 256, device)
    view, workspace = layer.view, layer.workspace
    sinks = torch.linspace(-6, 9, shape.num_heads).to(dtype)
    batch = replace(layer.batch, sinks=sinks.to(device))
    out = torch.full_like(batch.query, torch.nan)
    decode_step(view, workspace, batch, out)
    _, own = lists_of_rows(layer)
    expected, refined, block_lse = expected_of(coded, layer, own)
    tokens = shape.v_block_tokens
    lse = request_lse(refine_lse(block_lse, refined, own), coded.case.seq_lens, tokens)
    expected = expected.float() * share_of_tokens(lse, sinks)[..., None]
    assert_close(out.cpu().float(), expected, dtype)
    lists = workspace.views(view, batch)
    for config in (RowsConfig(50, 1), RowsConfig(2, 2)):
        out.fill_(torch.nan)
        attend.attend_blocks(view, batch, lists.selected, lists.rows, workspace, out, config=config)
        assert_close(out.cpu().float(), expected, dtype)


def check_no_number(
    shape: Shape, rule: Selection, value: float, row: int, device: str = "cpu"
) -> None:
    """A token whose query is no number, or without a bound, changes nothing for the tokens that
    have a list with it; it gets no number."""
    coded, layer = joint_layer(shape, rule, torch.bfloat16, 256, device)
    batch, out = layer.batch, torch.empty_like(layer.batch.query)
    there = coded.case.seq_lens > 0
    others = there.clone()
    others[row] = False
    decode_step(layer.view, layer.workspace, batch, out)
    before, alone = out.cpu().clone(), lists_of_rows(layer)[1]
    batch.query[row] = value
    decode_step(layer.view, layer.workspace, batch, out)
    own = lists_of_rows(layer)[1]
    assert torch.equal(own.counts[others], alone.counts[others])
    columns = torch.arange(own.blocks.shape[2])
    listed = others[:, None, None] & (columns < own.counts[..., None])
    assert torch.equal(own.blocks[listed], alone.blocks[listed])
    assert_close(out.cpu()[others], before[others])
    assert bool(out[row].isnan().all())


def check_estimate_errors(device: str = "cpu") -> None:
    """Each look counts the errors of a chunk of a list: of each row those of what it selected;
    in time each chunk of each list has its turn. Needs `attend.ESTIMATES_EVERY` 1."""
    shape, columns = Shape((100, 33, 60), 1, 2, 64, 16, 8), 32 // 8
    coded, layer = joint_layer(shape, RULES[1], torch.bfloat16, 256, device)
    out = torch.empty_like(layer.batch.query)
    decode_step(layer.view, layer.workspace, layer.batch, out)
    shared, own = lists_of_rows(layer)
    _, refined, block_lse = expected_of(coded, layer, own)
    # Roundings decide about errors within `slack` of an edge.
    edges, slack, expected = torch.tensor(ESTIMATE_ERROR_EDGES)[:, None], 2e-2, {}
    for row, count in enumerate(shared.counts[:, 0].tolist()):
        for first in range(0, count, columns):
            errors = []
            for entry in shared.blocks[row, 0, first : min(first + columns, count)].tolist():
                for later in range(MOST_TOKENS):
                    if entry >> BLOCK_BITS >> later & 1:
                        at = (own.blocks[row + later, 0] == entry % MOST_BLOCKS).nonzero()[0, 0]
                        found = block_lse[row + later, :, entry % MOST_BLOCKS]
                        errors.append((found - refined[row + later, :, at]).abs())
            all_errors = torch.cat(errors)
            expected[row, first] = [(all_errors <= edges + off).sum(1) for off in (-slack, slack)]
    check_counted(layer, layer.batch, out, expected, 20 * len(expected))


def main() -> None:
    """Every combination; any difference raises."""
    cases = 0
    for (number, shape), rule in itertools.product(enumerate(SHAPES), RULES):
        check_step(shape, rule, DTYPES[number % 2])
        cases += 1
    for num_slots, dtype in ((0, torch.bfloat16), (3, torch.float16)):
        check_step(SHAPES[0], RULES[1], dtype, num_slots)
        check_step(LONG, RULES[num_slots // 3], dtype, num_slots or 1 << 12)
        cases += 2
    for (shape, most_tokens), rule in itertools.product(FEW, RULES[:2]):
        before = 3 if rule is RULES[1] else 0
        check_step(shape, rule, torch.bfloat16, most_tokens=most_tokens, before=before)
        cases += 1
    for shape, rule in WITH_SINKS:
        check_sinks(shape, rule, torch.float16)
        cases += 1
    for rule, (value, row) in itertools.product(RULES, NO_NUMBERS):
        check_no_number(SHAPES[0], rule, value, row)
        cases += 1
    check_step(MANY, RULES[1], torch.bfloat16, 1 << 12)
    check_changing_lengths()
    attend.ESTIMATES_EVERY = 1
    check_estimate_errors()
    print(f"{cases + 2} steps of several tokens a request are as defined")


if __name__ == "__main__":
    main()
