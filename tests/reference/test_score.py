# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.conftest import TOLERANCES, assert_close
from tests.reference import brute_force
from tests.shapes import ODD_SHAPES, Shape, build_case
from vllm_kcache.reference import paging
from vllm_kcache.reference.score import score_blocks


def score(case, max_blocks=None, out=None):
    shape = case.shape
    return score_blocks(
        case.query,
        case.k_pages,
        case.block_table,
        case.seq_lens,
        case.scale,
        shape.v_block_tokens,
        shape.max_blocks if max_blocks is None else max_blocks,
        out,
    )


def assert_scores(case, block_lse):
    accumulated = torch.float64 if case.query.dtype == torch.float64 else torch.float32
    assert block_lse.dtype == accumulated
    for request, tokens in enumerate(case.shape.seq_lens):
        num_blocks = -(-tokens // case.shape.v_block_tokens)
        assert bool(torch.isneginf(block_lse[request, :, num_blocks:]).all())
        expected = brute_force.block_lse(case, request)
        assert_close(block_lse[request, :, :num_blocks], expected, accumulated)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_odd_shapes(shape, strided):
    case = build_case(shape, strided=strided)
    assert_scores(case, score(case))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_dtypes_accumulate_in_float32_or_more(dtype):
    case = build_case(Shape((70, 9), 2, 3, 64, 32, 8), dtype)
    assert_scores(case, score(case))


@pytest.mark.parametrize("extra_blocks", [0, 1, 5])
def test_out_is_written_whole(extra_blocks):
    case = build_case(Shape((33, 0, 100), 3, 3, 64, 32, 8))
    width = case.shape.max_blocks + extra_blocks
    out = torch.full((3, 9, width), torch.nan)
    assert score(case, width, out) is out
    assert_scores(case, out)


def test_requests_worked_on_in_several_groups(monkeypatch):
    case = build_case(Shape((70, 9, 0, 130, 16, 1), 2, 3, 64, 32, 8))
    whole = score(case)
    page_elements = 2 * 32 * 64
    monkeypatch.setattr(paging, "GROUP_ELEMENTS", 4 * page_elements)
    page_counts = [3, 1, 0, 5, 1, 1]
    groups = list(paging.request_groups(page_counts, page_elements))
    assert groups == [(0, 1, 3), (1, 3, 1), (3, 4, 5), (4, 6, 1)]
    assert_scores(case, score(case))
    assert_close(score(case).exp(), whole.exp())
