# SPDX-License-Identifier: Apache-2.0
"""Scores with a soft cap, in every step that has scores, against the definition in float64."""

import pytest
import torch

from tests.conftest import TOLERANCES, assert_close
from tests.reference import brute_force
from tests.reference.coded import Coded
from tests.reference.test_fetch import some_blocks
from tests.reference.test_full import chunk_scores
from tests.shapes import Case, Shape, build_case
from vllm_kcache.reference import full
from vllm_kcache.reference.attend import attend_blocks, attend_rows
from vllm_kcache.reference.fetch import fetch_blocks, fetch_rows
from vllm_kcache.reference.full import attend_full
from vllm_kcache.reference.score import score_blocks, score_codes
from vllm_kcache.types import Selected

SHAPE, CAP = Shape((70, 9, 0), 2, 3, 64, 32, 8), 1.5


def capped(scores: torch.Tensor) -> torch.Tensor:
    """The cap bites: without it most scores are another by more than a tenth."""
    found = CAP * torch.tanh(scores / CAP)
    assert float(((found - scores).abs() > 0.1).float().mean()) > 0.3
    return found


def by_block(scores: torch.Tensor) -> torch.Tensor:
    return torch.stack([x.logsumexp(-1) for x in scores.split(SHAPE.v_block_tokens, -1)], -1)


def attended(case: Case, request: int, scores: torch.Tensor, selected: Selected) -> torch.Tensor:
    """[Hq, D] float64: softmax over the selected tokens."""
    _, values = brute_force.dense_kv(case, request)
    blocks = selected.blocks[request].repeat_interleave(SHAPE.group_size, 0)
    tokens = torch.arange(scores.shape[1]) // SHAPE.v_block_tokens
    kept = torch.stack([torch.isin(tokens, row) for row in blocks])
    weights = scores.masked_fill(~kept, -torch.inf).softmax(-1)
    return torch.einsum("ht,htd->hd", weights, values)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_score_and_attend(dtype: torch.dtype) -> None:
    case, selected = build_case(SHAPE, dtype), some_blocks(SHAPE)
    batch = (case.block_table, case.seq_lens, case.scale, SHAPE.v_block_tokens)
    lse = score_blocks(case.query, case.k_pages, *batch, SHAPE.max_blocks, soft_cap=CAP)
    fetched = fetch_blocks(selected, case.block_table, case.v_pool, SHAPE.v_block_tokens)
    out = attend_blocks(
        case.query, case.k_pages, case.v_pool, fetched, selected, *batch, "renormalize",
        soft_cap=CAP,
    )  # fmt: skip
    for request in range(2):
        scores = capped(brute_force.token_scores(case, request))
        blocks = by_block(scores)
        # Scores are rounded once, as results of order 1 are.
        assert_close(lse[request, :, : blocks.shape[1]].to(torch.float32), blocks, torch.float32)
        assert_close(out[request], attended(case, request, scores, selected))
    assert bool(torch.isneginf(lse[2]).all())


def test_estimates_and_rows() -> None:
    """An estimate is capped as a whole, with what its head adds to each."""
    coded, selected = Coded.of(build_case(SHAPE), "model"), some_blocks(SHAPE)
    case = coded.case
    batch = (case.block_table, case.seq_lens, case.scale)
    lse = score_codes(
        case.query, coded.code_pages, coded.stats, *batch, SHAPE.v_block_tokens, SHAPE.max_blocks,
        soft_cap=CAP,
    )  # fmt: skip
    fetched = fetch_rows(selected, case.block_table, coded.host_rows, 2, 4)
    refined = torch.full((*lse.shape[:2], selected.blocks.shape[2]), torch.nan)
    out = attend_rows(
        case.query, coded.host_rows, coded.row, coded.stats, fetched, selected, case.seq_lens,
        case.scale, "renormalize", refined=refined, soft_cap=CAP,
    )  # fmt: skip
    for request in range(2):
        estimates = by_block(capped(coded.estimates(request)))
        assert_close(lse[request, :, : estimates.shape[1]], estimates)
        scores = capped(brute_force.token_scores(case, request))
        assert_close(out[request], attended(case, request, scores, selected))
        for head in range(SHAPE.num_heads):
            row = selected.blocks[request, head // SHAPE.group_size]
            row = row[row >= 0].long()
            assert_close(refined[request, head, : len(row)], by_block(scores)[head, row])


@pytest.mark.parametrize("values", [1 << 24, 200])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_prefill(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, values: int) -> None:
    """Chunks behind contexts of several pieces, all queries at once or some."""
    monkeypatch.setattr(full, "CONTEXT_PIECE_TOKENS", 32)
    monkeypatch.setattr(full, "_SCORE_VALUES", values)
    case, starts = build_case(SHAPE, dtype), torch.tensor([0, 20, 29, 29], dtype=torch.int32)
    query = torch.randn((29, 6, 64), generator=torch.Generator().manual_seed(7)).to(dtype)
    result = attend_full(
        query, case.k_pages, case.v_pool, case.block_table, starts, case.seq_lens, case.scale,
        soft_cap=CAP,
    )  # fmt: skip
    for request, chunk in enumerate((slice(0, 20), slice(20, 29))):
        scores = chunk_scores(case, request, query[chunk])
        ahead = torch.isneginf(scores)
        weights = (CAP * (scores / CAP).tanh()).masked_fill(ahead, -torch.inf).softmax(-1)
        _, dense = brute_force.dense_kv(case, request)
        assert_close(result[chunk], torch.einsum("hnt,htd->nhd", weights, dense))
