# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.conftest import assert_close
from tests.reference import brute_force
from tests.shapes import ODD_SHAPES, build_case
from vllm_kcache.reference.score import score_blocks
from vllm_kcache.reference.select import select_blocks
from vllm_kcache.types import Selected, Selection

RULES = {
    "everything": Selection(None, None, 1, 4, "sum"),
    "coverage-sum": Selection(None, 0.7, 1, 4, "sum"),
    "coverage-max": Selection(None, 0.7, 1, 4, "max"),
    "coverage-one": Selection(None, 1.0, 0, 1, "sum"),
    "capped": Selection(6, 0.95, 1, 4, "sum"),
    "threshold-sum": Selection(None, None, 1, 4, "sum", 0.02),
    "threshold-max": Selection(None, None, 1, 4, "max", 0.05),
    "threshold-capped": Selection(6, None, 1, 4, "max", 0.01),
    "fixed-sum": Selection(6, None, 1, 4, "sum"),
    "fixed-max": Selection(6, None, 1, 4, "max"),
    "more-than-there-are": Selection(10_000, None, 2, 40, "max"),
}


def scored(shape, seed=0):
    case = build_case(shape, torch.float64, seed=seed)
    lse = score_blocks(
        case.query, case.k_pages, case.block_table, case.seq_lens, case.scale,
        shape.v_block_tokens, shape.max_blocks,
    )  # fmt: skip
    return case, lse


def buffers(shape, columns):
    rows = (len(shape.seq_lens), shape.num_kv_heads)
    return Selected(
        torch.full((*rows, columns), 77, dtype=torch.int32),
        torch.full(rows, 77, dtype=torch.int32),
        torch.full(rows, torch.nan),
        torch.full((len(shape.seq_lens), shape.num_heads), torch.nan),
    )


@pytest.mark.parametrize("extra_columns", [None, 0, 3], ids=["made", "out", "wide-out"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_odd_shapes(shape, rule, extra_columns):
    selection = RULES[rule]
    case, lse = scored(shape)
    out = None
    if extra_columns is not None:
        out = buffers(
            shape, min(selection.top_n or shape.max_blocks, shape.max_blocks) + extra_columns
        )
    selected = select_blocks(
        lse, case.seq_lens, shape.num_kv_heads, shape.v_block_tokens, selection, out
    )
    assert out is None or selected is out
    assert (selected.blocks.dtype, selected.counts.dtype) == (torch.int32, torch.int32)
    assert selected.mass.dtype == torch.float32
    if out is None:
        longest = max(selected.counts.flatten().tolist(), default=0)
        assert selected.blocks.shape[2] == longest
    assert (selected.lse is None) == (out is None and selection.mass_threshold is None)
    for request, tokens in enumerate(shape.seq_lens):
        masses = brute_force.block_lse(case, request).softmax(-1)
        if tokens and selected.lse is not None:
            expected_lse = brute_force.token_scores(case, request).logsumexp(-1)
            assert_close(selected.lse[request].float(), expected_lse.float())
        for head in range(shape.num_kv_heads):
            row = selected.blocks[request, head].tolist()
            count = int(selected.counts[request, head])
            if not tokens:
                assert (count, float(selected.mass[request, head])) == (0, 1.0)
                assert set(row) <= {-1}
                continue
            group = masses[head * shape.group_size : (head + 1) * shape.group_size]
            expected = brute_force.select(group, tokens, shape.v_block_tokens, selection)
            assert row == sorted(expected) + [-1] * (len(row) - len(expected))
            assert count == len(expected)
            covered = brute_force.covered_mass(group, expected, selection.combine)
            assert_close(selected.mass[request, head], torch.tensor(covered))


def test_what_lies_past_the_length_is_not_looked_at():
    lse = torch.zeros(1, 2, 6)
    lse[..., 3:] = torch.nan
    selected = select_blocks(lse, torch.tensor([9]), 1, 4, Selection(None, 0.5, 0, 1, "sum"))
    assert selected.blocks.tolist() == [[[0, 2]]]
    assert_close(selected.mass, torch.tensor([[2 / 3]]))


def test_ties_go_to_the_lower_block():
    lse = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]).repeat(1, 2, 1)
    for top_n, expected in (
        (2, [1, 7]),
        (3, [1, 3, 7]),
        (5, [0, 1, 3, 5, 7]),
        (6, [0, 1, 2, 3, 5, 7]),
    ):
        selected = select_blocks(lse, torch.tensor([8]), 1, 1, Selection(top_n, None, 0, 1, "max"))
        assert selected.blocks.tolist() == [[expected]]


def test_the_two_ways_to_combine_disagree_where_they_should():
    # Head 0 sees only block 0, head 1 spreads: the mean is content early, the least is not.
    lse = torch.tensor([[[9.0, 0.0, 0.0, 0.0, -9.0], [0.0, 2.0, 2.0, 2.0, 0.0]]])
    counts = {
        combine: int(
            select_blocks(lse, torch.tensor([5]), 1, 1, Selection(None, 0.6, 0, 1, combine)).counts
        )
        for combine in ("sum", "max")
    }
    assert counts == {"sum": 3, "max": 4}


def test_recent_covers_the_last_tokens_of_a_partial_block():
    # 35 tokens in blocks of 8: the last 32 tokens begin at token 3, in block 0.
    lse = torch.zeros(1, 1, 5)
    rule = Selection(5, None, 0, 32, "sum")
    selected = select_blocks(lse, torch.tensor([35]), 1, 8, rule)
    assert selected.blocks.tolist() == [[[0, 1, 2, 3, 4]]]
    assert rule.most_recent_blocks(8) == 5
    assert rule.most_recent_blocks(1) == 32
