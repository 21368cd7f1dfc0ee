# SPDX-License-Identifier: Apache-2.0
"""Each operation on a GPU against its definition: odd shapes, every dtype, poisoned outputs."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import assert_close
from tests.kernels.checks import CLIPPED_SHAPES, THRESHOLDS, check_clip, check_select, on
from tests.kernels.lists import (
    KINDS,
    RULES,
    check_errors,
    check_fetch,
    check_select_long,
    check_select_shapes,
    chosen,
    make_hot_cache,
    scored,
)
from tests.shapes import ODD_SHAPES, Case, Shape, build_case
from vllm_kcache import ops
from vllm_kcache.kernels import extension
from vllm_kcache.kernels.attend import attend_blocks as attend_kernel_blocks
from vllm_kcache.kernels.score import launch_score
from vllm_kcache.kernels.select import selection_arguments
from vllm_kcache.reference import attend, fetch, write
from vllm_kcache.types import Fetched, Selected, Selection

pytestmark = pytest.mark.gpu

# Every shape in one dtype, and the other dtypes at two head sizes: a kernel is compiled for each.
CASES = [(shape, torch.bfloat16) for shape in ODD_SHAPES] + [
    (shape, dtype) for shape in ODD_SHAPES[3:5] for dtype in (torch.float16, torch.float32)
]


def identity(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.fixture(params=CASES, ids=lambda pair: f"{pair[0]}-{identity(pair[1])}")
def case(request: pytest.FixtureRequest) -> Case:
    shape, dtype = request.param
    return build_case(shape, dtype, strided=shape.head_size == 80)


def moved(selected: Selected) -> Selected:
    return Selected(selected.blocks.cuda(), selected.counts.cuda(), selected.mass.cuda())


def test_score(case: Case) -> None:
    shape, there = case.shape, on(case, "cuda")
    size = (len(shape.seq_lens), shape.num_heads, shape.max_blocks + 3)
    out = torch.full(size, torch.nan, device="cuda")
    ops.score_blocks(
        there.query, there.k_pages, there.block_table, there.seq_lens, case.scale,
        shape.v_block_tokens, size[2], out,
    )  # fmt: skip
    expected = scored(case)
    assert torch.isneginf(out[..., shape.max_blocks :]).all()
    assert_close(out[..., : shape.max_blocks], expected)


def test_score_of_a_range_of_heads() -> None:
    case = build_case(ODD_SHAPES[3], torch.bfloat16)
    there, shape = on(case, "cuda"), case.shape
    out = torch.full(scored(case).shape, 7.0, device="cuda")
    launch_score(
        there.query, there.k_pages, there.block_table, there.seq_lens, case.scale,
        shape.v_block_tokens, out, first_head=1, num_heads=1, pad=True,
    )  # fmt: skip
    group = shape.group_size
    assert_close(out[:, group : 2 * group], scored(case)[:, group : 2 * group])
    assert (out[:, :group] == 7).all()
    assert (out[:, 2 * group :] == 7).all()


@pytest.mark.parametrize("longer", [1, 40])
def test_score_counts_the_programs_of_each_list(longer: int) -> None:
    """What a kernel that follows the scoring waits for: programs with nothing to score count."""
    case = build_case(ODD_SHAPES[3], torch.bfloat16)
    there, shape = on(case, "cuda"), case.shape
    expected = scored(case)
    size = (*expected.shape[:2], longer * shape.max_blocks)
    out = torch.full(size, torch.nan, device="cuda")
    lists = (len(shape.seq_lens), shape.num_kv_heads)
    parts_scored = torch.zeros(lists, dtype=torch.int32, device="cuda")
    programs = launch_score(
        there.query, there.k_pages, there.block_table, there.seq_lens, case.scale,
        shape.v_block_tokens, out, parts_scored=parts_scored,
    )  # fmt: skip
    assert programs >= longer
    assert (parts_scored == programs).all()
    exists = torch.isfinite(expected)
    assert_close(out[..., : shape.max_blocks].cpu()[exists], expected[exists])


@pytest.mark.parametrize("triton_only", [False, True], ids=["best", "triton"])
@pytest.mark.parametrize("rule", RULES, ids=identity)
def test_select(rule: Selection, triton_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if triton_only:
        monkeypatch.setattr(extension, "available", lambda: False)
    check_select_shapes(rule, "cuda")


@pytest.mark.parametrize("triton_only", [False, True], ids=["best", "triton"])
@pytest.mark.parametrize("rule", THRESHOLDS, ids=identity)
def test_select_by_threshold(
    rule: Selection, triton_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if triton_only:
        monkeypatch.setattr(extension, "available", lambda: False)
    check_select(rule, "cuda")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("triton_only", [False, True], ids=["best", "triton"])
def test_select_of_long_requests(
    kind: str, triton_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """128K tokens in V blocks of 8, with many equal masses: the lower block wins."""
    if triton_only:
        monkeypatch.setattr(extension, "available", lambda: False)
    check_select_long(kind, 131072, "cuda")


@pytest.mark.parametrize("num_slots", [None, 5, 4096], ids=["no cache", "small", "large"])
def test_fetch(case: Case, num_slots: int | None) -> None:
    check_fetch(case, num_slots, "cuda")


@pytest.mark.parametrize("tail", ["renormalize", "drop"])
def test_attend(case: Case, tail: str) -> None:
    """Every third row is read straight from the host, the others from slots in random order."""
    shape, there = case.shape, on(case, "cuda")
    tokens = shape.v_block_tokens
    selected = chosen(case)
    by_definition = fetch.fetch_blocks(selected, case.block_table, case.v_pool, tokens)
    arguments = (selected, case.block_table, case.seq_lens, case.scale, tokens, tail, scored(case))
    expected = attend.attend_blocks(
        case.query, case.k_pages, case.v_pool, by_definition, *arguments
    )
    host = fetch.physical_v_blocks(
        selected.blocks, case.block_table, shape.num_kv_heads, shape.page_tokens // tokens
    )
    order = torch.randperm(max(1, len(by_definition.v_rows)))
    v_rows = by_definition.v_rows.new_full((len(order), tokens, shape.head_size), torch.nan)
    v_rows[order[: len(by_definition.v_rows)]] = by_definition.v_rows
    rows = order[by_definition.rows.clamp_min(0).long()].int()
    rows = torch.where(by_definition.rows % 3 == 2, -2 - host, rows).int()
    rows = rows.masked_fill(by_definition.rows < 0, -1)
    out = torch.full_like(there.query, torch.nan)
    ops.attend_blocks(
        there.query, there.k_pages, there.v_pool, Fetched(rows.cuda(), v_rows.cuda()),
        moved(selected), there.block_table, there.seq_lens, case.scale, tokens, tail,
        scored(case).cuda(), None, out,
    )  # fmt: skip
    assert_close(out, expected)


def test_rows_eight_gib_away() -> None:
    """Rows that are read past the slots: their distance, times the bytes of a value, needs 64 bits.

    GPU memory stands in for the host's, so that the distance is known.
    """
    case = build_case(ODD_SHAPES[6], torch.bfloat16)
    shape, there = case.shape, on(case, "cuda")
    tokens, selected = shape.v_block_tokens, chosen(case)
    host = fetch.physical_v_blocks(
        selected.blocks, case.block_table, shape.num_kv_heads, shape.page_tokens // tokens
    )
    rows = (-2 - host).masked_fill(selected.blocks < 0, -1).int()
    far = torch.empty((8 << 30) + case.v_pool.nbytes, dtype=torch.uint8, device="cuda")
    v_pool = far[8 << 30 :].view(torch.bfloat16).view(case.v_pool.shape)
    v_pool.copy_(case.v_pool)
    v_rows = far[: tokens * shape.head_size * 2].view(torch.bfloat16)
    v_rows = v_rows.view(1, tokens, shape.head_size).fill_(torch.nan)
    out = torch.full_like(there.query, torch.nan)
    attend_kernel_blocks(
        there.query, there.k_pages, v_pool, Fetched(rows.cuda(), v_rows), moved(selected),
        there.block_table, there.seq_lens, case.scale, tokens, "renormalize", scored(case).cuda(),
        out=out,
    )  # fmt: skip
    by_definition = fetch.fetch_blocks(selected, case.block_table, case.v_pool, tokens)
    expected = attend.attend_blocks(
        case.query, case.k_pages, case.v_pool, by_definition, selected, case.block_table,
        case.seq_lens, case.scale, tokens, "renormalize", scored(case),
    )  # fmt: skip
    assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=identity)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", [*CLIPPED_SHAPES, *ODD_SHAPES[5:9]], ids=str)
def test_attend_with_the_clipped_tail(shape: Shape, splits: int, dtype: torch.dtype) -> None:
    for rule in THRESHOLDS:
        check_clip(shape, rule, splits, "cuda", dtype)


def test_write(case: Case) -> None:
    """Random slots, padding and strided input; a slot that is resident is written as well."""
    shape, there = case.shape, on(case, "cuda")
    dtype, num_pages = case.query.dtype, case.k_pages.shape[0]
    num_tokens = min(33, num_pages * shape.page_tokens)
    slots = torch.randperm(num_pages * shape.page_tokens)[:num_tokens]
    slots[::5] = -1
    size = (num_tokens, 3, shape.num_kv_heads, shape.head_size)
    key, _, value = torch.randn(size, dtype=dtype, device="cuda").unbind(1)  # strided
    cache = make_hot_cache(case, 64, "cuda")
    keys_before, values_before = case.k_pages.clone(), case.v_pool.clone()
    ops.write_kv(key, value, slots.cuda(), there.k_pages, there.v_pool, cache, 1)
    torch.cuda.synchronize()
    write.write_kv(key.cpu(), value.cpu(), slots, keys_before, values_before)
    for got, expected in ((there.k_pages.cpu(), keys_before), (there.v_pool, values_before)):
        same = (got == expected) | (got.isnan() & expected.isnan())
        assert same.all()


@pytest.mark.skipif(
    torch.cuda.is_available() and not extension.available(), reason="the extension is not built"
)
def test_schema_and_meta_of_the_extension() -> None:
    """Mutation marks and Meta functions hold."""
    shape = Shape((33, 0, 100), 3, 3, 64, 32, 8)
    block_lse = scored(build_case(shape)).cuda()
    lengths = torch.tensor(shape.seq_lens, dtype=torch.int32, device="cuda")
    blocks = torch.empty((3, 3, shape.max_blocks), dtype=torch.int32, device="cuda")
    counts = torch.empty((3, 3), dtype=torch.int32, device="cuda")
    mass = torch.empty((3, 3), device="cuda")
    arguments = (
        block_lse, lengths, 8, *selection_arguments(RULES[1]), 0, 3, blocks, counts, mass,
        torch.empty((3, 9), device="cuda"), None, None, 1,
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.kcache.select_blocks.default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.skipif(
    torch.cuda.is_available() and not extension.available(), reason="the extension is not built"
)
def test_extension_names_what_is_wrong() -> None:
    check_errors("cuda")
