# SPDX-License-Identifier: Apache-2.0
"""The five ops one after the other, as a decode step calls them."""

import pytest
import torch

from tests.conftest import TOLERANCES, assert_close
from tests.reference import brute_force
from tests.shapes import ODD_SHAPES, Shape, build_case
from vllm_kcache import ops
from vllm_kcache.types import Fetched, Selected, Selection


def decode(case, selection: Selection, tail: str, into_buffers: bool):
    """One step; with `into_buffers`, everything is written into poisoned buffers made before."""
    shape = case.shape
    requests, tokens, width = len(shape.seq_lens), shape.v_block_tokens, shape.max_blocks
    lists = (requests, shape.num_kv_heads)
    accumulated = torch.float64 if case.query.dtype == torch.float64 else torch.float32
    lse_out = selected_out = fetched_out = out = None
    if into_buffers:
        lse_out = torch.full((requests, shape.num_heads, width), torch.nan, dtype=accumulated)
        columns = torch.full((*lists, width), 77, dtype=torch.int32)
        mass = torch.full(lists, torch.nan)
        all_lse = torch.full((requests, shape.num_heads), torch.nan, dtype=accumulated)
        selected_out = Selected(columns, columns[..., 0].clone(), mass, all_lse)
        rows = torch.full(
            (requests * shape.num_kv_heads * width, tokens, shape.head_size), torch.nan
        )
        fetched_out = Fetched(columns.clone(), rows.to(case.query.dtype))
        out = torch.full_like(case.query, torch.nan)
    query, pages, pool, scale = case.query, case.k_pages, case.v_pool, case.scale
    table, seq_lens = case.block_table, case.seq_lens
    lse = ops.score_blocks(query, pages, table, seq_lens, scale, tokens, width, lse_out)
    selected = ops.select_blocks(lse, seq_lens, shape.num_kv_heads, tokens, selection, selected_out)
    fetched = ops.fetch_blocks(selected, table, pool, tokens, out=fetched_out)
    means = case.v_page_means if tail == "mean" else None
    result = ops.attend_blocks(
        query, pages, pool, fetched, selected, table, seq_lens, scale, tokens, tail, lse, means,
        out, selection.clip,
    )  # fmt: skip
    if into_buffers:
        assert lse is lse_out
        assert selected is selected_out
        assert fetched is fetched_out
        assert result is out
    return selected, result


@pytest.mark.parametrize("into_buffers", [False, True], ids=["made", "buffers"])
@pytest.mark.parametrize("tail", ["renormalize", "drop", "mean"])
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_everything_selected_is_full_attention(shape, tail, into_buffers):
    case = build_case(shape)
    rule = Selection(None, None, 1, 32, "sum")
    selected, result = decode(case, rule, tail, into_buffers)
    assert bool((selected.mass == 1.0).all())
    for request, tokens in enumerate(shape.seq_lens):
        expected = brute_force.full_attention(case, request) if tokens else torch.zeros(1)
        assert_close(result[request], expected.expand_as(result[request]))


@pytest.mark.parametrize("into_buffers", [False, True], ids=["made", "buffers"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("tail", ["renormalize", "drop", "mean"])
def test_what_is_selected_is_attended(tail, dtype, into_buffers):
    case = build_case(Shape((300, 17, 0, 129), 2, 3, 64, 32, 8), dtype)
    selected, result = decode(case, Selection(20, 0.8, 1, 16, "max"), tail, into_buffers)
    assert result.dtype == dtype
    for request, tokens in enumerate(case.shape.seq_lens):
        lists = [[b for b in row if b >= 0] for row in selected.blocks[request].tolist()]
        assert bool(tokens) == bool(lists[0])
        if tokens:
            assert_close(result[request], brute_force.attend(case, request, lists, tail))
        else:
            assert not result[request].any()


@pytest.mark.parametrize("into_buffers", [False, True], ids=["made", "buffers"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_what_is_left_out_goes_to_the_weak_of_what_is_kept(dtype, into_buffers):
    case = build_case(Shape((300, 17, 0, 129), 2, 3, 64, 32, 8), dtype)
    rule = Selection(None, None, 1, 16, "max", 0.05)
    selected, result = decode(case, rule, "clip", into_buffers)
    assert int(selected.counts[0].max()) < 38
    for request, tokens in enumerate(case.shape.seq_lens):
        lists = [[b for b in row if b >= 0] for row in selected.blocks[request].tolist()]
        if tokens:
            expected = brute_force.attend(case, request, lists, "clip", rule.clip)
            assert_close(result[request], expected)
        else:
            assert not result[request].any()


def test_steps_after_writes_follow_the_growing_request():
    shape = Shape((40,), 2, 2, 64, 16, 8)
    case = build_case(shape, torch.float64)
    k_pages, v_pool = (
        torch.full_like(case.k_pages, torch.nan),
        torch.full_like(case.v_pool, torch.nan),
    )
    rule = Selection(None, None, 0, 1, "sum")
    for token in range(40):
        page, offset = int(case.block_table[0, token // 16]), token % 16
        ops.write_kv(
            case.keys[0][token, None], case.values[0][token, None],
            torch.tensor([page * 16 + offset]), k_pages, v_pool,
        )  # fmt: skip
        seq_lens = torch.tensor([token + 1], dtype=torch.int32)
        lse = ops.score_blocks(case.query, k_pages, case.block_table, seq_lens, case.scale, 8, 5)
        selected = ops.select_blocks(lse, seq_lens, 2, 8, rule)
        fetched = ops.fetch_blocks(selected, case.block_table, v_pool, 8)
        result = ops.attend_blocks(
            case.query, k_pages, v_pool, fetched, selected, case.block_table, seq_lens, case.scale,
            8, "renormalize", lse,
        )  # fmt: skip
        keys = case.keys[0][: token + 1].repeat_interleave(2, 1)
        values = case.values[0][: token + 1].repeat_interleave(2, 1)
        weights = (torch.einsum("hd,thd->ht", case.query[0], keys) * case.scale).softmax(1)
        assert_close(result[0], torch.einsum("ht,thd->hd", weights, values))
