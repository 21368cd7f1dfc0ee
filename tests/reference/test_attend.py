# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass, replace

import pytest
import torch

from tests.conftest import TOLERANCES, assert_close
from tests.reference import brute_force
from tests.reference.test_fetch import some_blocks
from tests.shapes import ODD_SHAPES, Case, Shape, build_case
from vllm_kcache.reference import paging
from vllm_kcache.reference.attend import attend_blocks
from vllm_kcache.reference.fetch import fetch_blocks
from vllm_kcache.reference.score import score_blocks
from vllm_kcache.reference.select import select_blocks
from vllm_kcache.types import Fetched, Selected, Selection

TAILS = ["renormalize", "clip"]
CLIP = 0.01


@dataclass
class Step:
    """A case with its selection, scored and fetched."""

    case: Case
    selected: Selected
    block_lse: torch.Tensor
    fetched: Fetched

    @classmethod
    def of(cls, case: Case, selected: Selected) -> "Step":
        shape = case.shape
        lse = score_blocks(
            case.query, case.k_pages, case.block_table, case.seq_lens, case.scale,
            shape.v_block_tokens, shape.max_blocks,
        )  # fmt: skip
        table, pool = case.block_table, case.v_pool
        fetched = fetch_blocks(selected, table, pool, shape.v_block_tokens)
        exists = torch.arange(shape.max_blocks) * shape.v_block_tokens < case.seq_lens[:, None]
        all_lse = lse.masked_fill(~exists[:, None], -torch.inf).logsumexp(-1)
        return cls(case, replace(selected, lse=all_lse), lse, fetched)

    def attend(self, tail: str, fetched: Fetched | None = None, out=None) -> torch.Tensor:
        case = self.case
        return attend_blocks(
            case.query, case.k_pages, case.v_pool, fetched or self.fetched, self.selected,
            case.block_table, case.seq_lens, case.scale, case.shape.v_block_tokens, tail, out, CLIP,
        )  # fmt: skip

    def assert_result(self, result: torch.Tensor, tail: str) -> None:
        assert result.dtype == self.case.query.dtype
        for request, tokens in enumerate(self.case.shape.seq_lens):
            if not tokens:
                assert not result[request].any()
                continue
            lists = [[b for b in row if b >= 0] for row in self.selected.blocks[request].tolist()]
            expected = brute_force.attend(self.case, request, lists, tail, CLIP)
            assert_close(result[request], expected)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_odd_shapes(shape, tail, strided):
    step = Step.of(build_case(shape, strided=strided), some_blocks(shape))
    out = torch.full_like(step.case.query, torch.nan)
    step.assert_result(step.attend(tail), tail)
    assert step.attend(tail, out=out) is out
    step.assert_result(out, tail)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_dtypes(dtype, tail):
    shape = Shape((70, 9, 0), 2, 3, 64, 32, 8)
    step = Step.of(build_case(shape, dtype), some_blocks(shape))
    step.assert_result(step.attend(tail), tail)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_everything_selected_is_full_attention(shape, tail):
    case = build_case(shape)
    lse = score_blocks(
        case.query, case.k_pages, case.block_table, case.seq_lens, case.scale,
        shape.v_block_tokens, shape.max_blocks,
    )  # fmt: skip
    rule = Selection(None, None, 1, 32, "sum")
    selected = select_blocks(lse, case.seq_lens, shape.num_kv_heads, shape.v_block_tokens, rule)
    result = Step.of(case, selected).attend(tail)
    for request, tokens in enumerate(shape.seq_lens):
        if tokens:
            assert_close(result[request], brute_force.full_attention(case, request))


@pytest.mark.parametrize("every", [1, 2], ids=["all-rows", "every-other-row"])
def test_rows_read_straight_from_the_host_pool(every):
    shape = Shape((300, 129, 0), 3, 3, 64, 128, 16)
    step = Step.of(build_case(shape), some_blocks(shape))
    physical = paging.physical_v_blocks(step.selected.blocks, step.case.block_table, 3, 8)
    rows = step.fetched.rows
    rows = torch.where((rows >= 0) & (rows % every == 0), -2 - physical.to(torch.int32), rows)
    v_rows = step.fetched.v_rows.clone()
    v_rows[::every] = torch.nan
    mixed = Fetched(rows, v_rows if every > 1 else v_rows[:0])
    step.assert_result(step.attend("renormalize", mixed), "renormalize")


@pytest.mark.parametrize("tail", ["renormalize", "clip"])
def test_error_bound(tail):
    shape = Shape((300,), 2, 4, 64, 32, 8)
    case = build_case(shape, torch.float64)
    step = Step.of(case, some_blocks(shape))
    result = step.attend(tail)
    masses = step.block_lse.softmax(-1)
    largest = case.values[0].norm(dim=-1).amax(0).repeat_interleave(4)
    full = brute_force.full_attention(case, 0)
    for head in range(8):
        row = step.selected.blocks[0, head // 4]
        dropped = 1 - masses[0, head, row[row >= 0].long()].sum()
        assert float((result[0, head] - full[head]).norm()) <= float(2 * dropped * largest[head])


def test_requests_worked_on_in_several_groups(monkeypatch):
    shape = Shape((70, 9, 0, 130, 16, 1), 2, 3, 64, 32, 8)
    step = Step.of(build_case(shape), some_blocks(shape))
    monkeypatch.setattr(paging, "GROUP_ELEMENTS", 2 * 2 * 8 * 64)
    for tail in TAILS:
        step.assert_result(step.attend(tail), tail)
