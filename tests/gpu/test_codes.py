# SPDX-License-Identifier: Apache-2.0
"""Codes and rows on a GPU: the cases of tests/csrc/test_codes.py, long requests, dependent launches
and capture."""

from __future__ import annotations

import pytest
import torch

from tests.csrc import code_checks as checks
from tests.csrc.coded_layer import CodedLayer
from tests.reference.coded import SHAPES, Coded, slots_of
from tests.shapes import Shape, build_case
from vllm_kcache.kernels.rows import write_rows
from vllm_kcache.kernels.score_codes import score_codes
from vllm_kcache.kernels.select import select_and_fetch

pytestmark = pytest.mark.gpu

LONG = Shape((40_000, 5, 9_001), 1, 4, 128, 16, 8)


@pytest.mark.parametrize("dependent", [False, True], ids=["", "dependent"])
@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("shape", [*checks.SCORED, LONG], ids=str)
def test_scores(shape: Shape, splits: int | None, dependent: bool) -> None:
    checks.check_scores(shape, splits, device="cuda", dependent=dependent)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("shape", [*checks.SOME_SCORED, LONG], ids=str)
def test_scores_of_several_tokens(shape: Shape, first: int) -> None:
    checks.check_joint_scores(shape, None, first, "cuda", dependent=True)


@pytest.mark.parametrize("shape", [*checks.SOME_SCORED, LONG], ids=str)
def test_scores_with_a_soft_cap(shape: Shape) -> None:
    for soft_cap in checks.SOFT_CAPS:
        checks.check_scores(shape, None, device="cuda", soft_cap=soft_cap)
        checks.check_joint_scores(shape, None, 2, "cuda", dependent=True, soft_cap=soft_cap)


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
def test_scores_of_each_dtype(dtype: torch.dtype) -> None:
    checks.check_scores(checks.SCORED[0], None, dtype, "cuda")


@pytest.mark.parametrize("host_dtype", checks.HOST_DTYPES)
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("shape", checks.WRITTEN, ids=str)
def test_writes_are_those_of_the_definition(
    shape: Shape, dtype: torch.dtype, host_dtype: str
) -> None:
    checks.check_write(shape, dtype, host_dtype, device="cuda")


@pytest.mark.parametrize("value", [0.0, 3.0, 1e30])
def test_writes_of_extremes(value: float) -> None:
    checks.check_write(SHAPES[1], torch.float32, "int8", value, "cuda")


@pytest.mark.parametrize("host_dtype", checks.HOST_DTYPES)
def test_parts(host_dtype: str) -> None:
    checks.check_parts(host_dtype, "cuda")


@pytest.mark.parametrize("host_dtype", checks.HOST_DTYPES)
def test_slots(host_dtype: str) -> None:
    checks.check_slots(host_dtype, "cuda")


@pytest.mark.parametrize("dependent", [False, True], ids=["", "dependent"])
@pytest.mark.parametrize("host_dtype", checks.HOST_DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:-2], ids=str)
def test_slots_of_several_tokens(shape: Shape, host_dtype: str, dependent: bool) -> None:
    checks.check_drafts(shape, host_dtype, "cuda", dependent)


@pytest.mark.parametrize("host_dtype", checks.HOST_DTYPES)
def test_prompts_fill_slots(host_dtype: str) -> None:
    checks.check_fills(host_dtype, "cuda")


def test_rows_of_several_pieces_fill_none() -> None:
    checks.check_no_fills("cuda")


@pytest.mark.parametrize("host_dtype", checks.HOST_DTYPES)
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gathers(shape: Shape, dtype: torch.dtype, host_dtype: str) -> None:
    checks.check_gather(shape, dtype, host_dtype, "cuda")


def test_a_step_of_codes() -> None:
    checks.check_step("cuda")


def test_views_and_calls_are_checked() -> None:
    coded = Coded.of(build_case(SHAPES[0]), "model")
    checks.check_errors(CodedLayer.of(coded, "cuda"))


class LastTokens:
    """Steps that write the last token of each request, score, select and fetch, dependent where the
    GPU can; what they leave must be what the definition leaves of the whole case."""

    def __init__(self) -> None:
        self.coded = Coded.of(build_case(LONG, torch.bfloat16, sharpness=0.1), "int8")
        self.layer = CodedLayer.of(self.coded, "cuda", 1 << 13)
        case, lengths = self.coded.case, torch.tensor(LONG.seq_lens)
        last = lengths.cumsum(0) - 1
        self.slots = slots_of(case)[last].cuda()
        self.key, self.value = (torch.cat(x)[last].cuda() for x in (case.keys, case.values))
        self.dependent = torch.cuda.get_device_capability() >= (9, 0)
        self.expected = self.layer.check_scores()
        heads = (len(lengths), LONG.num_heads)
        self.transformed = torch.zeros((*heads, LONG.head_size), device="cuda")
        self.bias = torch.zeros(heads, device="cuda")
        self.lists = self.layer.lists()

    def poison(self) -> None:
        """Last tokens' codes, and all outputs."""
        pages = self.layer.view.code_pages
        page, offset = self.slots // LONG.page_tokens, self.slots % LONG.page_tokens
        codes = pages[..., : LONG.page_tokens * 64].unflatten(-1, (LONG.page_tokens, -1))
        scales = pages[..., LONG.page_tokens * 64 :].unflatten(-1, (LONG.page_tokens, -1))
        codes[page, :, offset] = 0xFF
        scales[page, :, offset] = 0xFF
        self.lists.block_lse.fill_(torch.nan)
        self.lists.chunk_lse.fill_(torch.nan)
        self.lists.selected.counts.fill_(-1)

    def step(self) -> None:
        view, batch, lists = self.layer.view, self.layer.batch, self.lists
        assert view.packed is not None
        tokens = len(LONG.seq_lens)
        write_rows(
            view, self.key, self.value, self.slots, allocate_tokens=tokens,
            dependent=self.dependent,
        )  # fmt: skip
        score_codes(
            view, batch, lists, self.transformed, self.bias, dependent=self.dependent,
            after_write=True,
        )  # fmt: skip
        select_and_fetch(view.packed, lists, self.dependent)

    def check(self) -> None:
        torch.cuda.synchronize()
        for found, expected in (
            (self.lists.block_lse, self.expected.block_lse),
            (self.lists.chunk_lse, self.expected.chunk_lse),
        ):
            there = ~expected.isnan()
            assert torch.equal(found[there], expected[there])
            assert bool(found[~there].isnan().all())
        assert int(self.lists.selected.counts.min()) > 0


def test_scoring_waits_for_what_was_just_written() -> None:
    steps = LastTokens()
    for _ in range(50):
        steps.poison()
        steps.step()
        steps.check()


def test_steps_are_captured() -> None:
    steps = LastTokens()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        steps.step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps.step()
    for _ in range(20):
        steps.poison()
        graph.replay()
        steps.check()
