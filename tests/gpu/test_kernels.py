# SPDX-License-Identifier: Apache-2.0
"""Score, attend and write on a GPU against their definitions: odd shapes, every dtype, poison.

Selection and fetch: tests/gpu/test_lists.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.conftest import assert_close
from tests.kernels.checks import CLIPPED_SHAPES, THRESHOLDS, check_clip, rows_on_host
from tests.kernels.layers import layer_of
from tests.shapes import ODD_SHAPES, Case, Shape, build_case
from vllm_kcache.cache.hot_cache import SCORED
from vllm_kcache.kernels.attend import attend_blocks
from vllm_kcache.kernels.score import score_blocks
from vllm_kcache.kernels.write import write_kv
from vllm_kcache.reference import attend, fetch, score, select, write
from vllm_kcache.types import Selected, Selection

pytestmark = pytest.mark.gpu

RULE = Selection(None, 0.9, 1, 3, "sum")
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


def scored(case: Case) -> torch.Tensor:
    """block_lse of the definition, on the host."""
    return score.score_blocks(
        case.query, case.k_pages, case.block_table, case.seq_lens, case.scale,
        case.shape.v_block_tokens, case.shape.max_blocks,
    )  # fmt: skip


def chosen(case: Case) -> Selected:
    """Lists of the definition, on the host."""
    shape = case.shape
    return select.select_blocks(
        scored(case), case.seq_lens, shape.num_kv_heads, shape.v_block_tokens, RULE
    )


def moved(selected: Selected) -> Selected:
    return Selected(selected.blocks.cuda(), selected.counts.cuda(), selected.mass.cuda())


def test_score(case: Case) -> None:
    layer = layer_of(case, RULE, device="cuda")
    lists = layer.workspace.views(layer.view, layer.batch)
    if layer.batch.num_requests:
        score_blocks(layer.view, layer.batch, lists)
    expected = scored(case)
    exists = torch.isfinite(expected)
    assert_close(lists.block_lse.cpu()[exists], expected[exists])


@pytest.mark.parametrize("longer", [1, 40])
def test_score_counts_the_programs_of_each_list(longer: int) -> None:
    """What a kernel that follows the scoring waits for: programs with nothing to score do not
    count, and the last of a list says that scoring goes on."""
    case = build_case(ODD_SHAPES[3], torch.bfloat16)
    layer = layer_of(case, RULE, device="cuda")
    batch = replace(layer.batch, max_blocks=longer * case.shape.max_blocks)
    workspace = type(layer.workspace).make(layer.view.shape, RULE, 2, batch.max_blocks, "cuda")
    lists = workspace.views(layer.view, batch)
    splits = score_blocks(layer.view, batch, lists, signal=True)
    chunk = lists.chunk_blocks * case.shape.v_block_tokens
    parts = [min(splits, -(-length // chunk)) for length in case.shape.seq_lens]
    heads = case.shape.num_kv_heads
    assert lists.signals.view(-1, heads).tolist() == [[part] * heads for part in parts]
    assert int(layer.cache.state[SCORED]) == len(parts) * heads


def test_attend(case: Case) -> None:
    """Every third row is read straight from the host, the others from slots in random order."""
    shape = case.shape
    selected = chosen(case)
    tokens = shape.v_block_tokens
    by_definition = fetch.fetch_blocks(selected, case.block_table, case.v_pool, tokens)
    expected = attend.attend_blocks(
        case.query, case.k_pages, case.v_pool, by_definition, selected, case.block_table,
        case.seq_lens, case.scale, tokens, "renormalize",
    )  # fmt: skip
    there = len(by_definition.v_rows)
    layer = layer_of(case, RULE, num_slots=max(1, there), device="cuda")
    order = torch.randperm(max(1, there))
    slots = layer.view.hot_values
    slots.fill_(torch.nan)
    slots[order[:there].cuda()] = by_definition.v_rows.cuda()
    rows = order[by_definition.rows.clamp_min(0).long()].int()
    on_host = by_definition.rows % 3 == 2
    rows = torch.where(on_host, rows_on_host(layer, selected), rows)
    rows = rows.masked_fill(by_definition.rows < 0, -1)
    out = torch.full_like(layer.batch.query, torch.nan)
    attend_blocks(layer.view, layer.batch, moved(selected), rows.cuda(), layer.workspace, out)
    assert_close(out.cpu(), expected)


def test_rows_eight_gib_away() -> None:
    """Rows that are read past the slots: their distance, times the bytes of a value, needs 64 bits.

    GPU memory stands in for the host's, so that the distance is known.
    """
    case = build_case(ODD_SHAPES[6], torch.bfloat16)
    layer = layer_of(case, RULE, num_slots=1, device="cuda")
    selected = chosen(case)
    rows = rows_on_host(layer, selected)
    host = layer.view.host_rows
    far = torch.empty((8 << 30) + host.nbytes, dtype=torch.uint8, device="cuda")
    host_there = far[8 << 30 :].view(host.shape)
    host_there.copy_(host)
    cache = replace(layer.cache, slots=far[: host.shape[1]].view(1, -1).fill_(255))
    view = replace(layer.view, host_rows=host_there, hot_cache=cache)
    out = torch.full_like(layer.batch.query, torch.nan)
    attend_blocks(view, layer.batch, moved(selected), rows.cuda(), layer.workspace, out)
    tokens = case.shape.v_block_tokens
    by_definition = fetch.fetch_blocks(selected, case.block_table, case.v_pool, tokens)
    expected = attend.attend_blocks(
        case.query, case.k_pages, case.v_pool, by_definition, selected, case.block_table,
        case.seq_lens, case.scale, tokens, "renormalize",
    )  # fmt: skip
    assert_close(out.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=identity)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", [*CLIPPED_SHAPES, *ODD_SHAPES[5:9]], ids=str)
def test_attend_with_the_clipped_tail(shape: Shape, splits: int, dtype: torch.dtype) -> None:
    for rule in THRESHOLDS:
        check_clip(shape, rule, splits, "cuda", dtype)


def test_write(case: Case) -> None:
    """Random slots, padding and strided input."""
    shape = case.shape
    layer = layer_of(case, RULE, device="cuda")
    dtype, num_pages = case.query.dtype, case.k_pages.shape[0]
    num_tokens = min(33, num_pages * shape.page_tokens)
    slots = torch.randperm(num_pages * shape.page_tokens)[:num_tokens]
    slots[::5] = -1
    size = (num_tokens, 3, shape.num_kv_heads, shape.head_size)
    key, _, value = torch.randn(size, dtype=dtype, device="cuda").unbind(1)  # strided
    keys_before, values_before = case.k_pages.clone(), case.v_pool.clone()
    write_kv(layer.view, key, value, slots.cuda())
    torch.cuda.synchronize()
    write.write_kv(key.cpu(), value.cpu(), slots, keys_before, values_before)
    there = (layer.view.k_pages.cpu(), layer.view.v_pages)
    for got, expected in zip(there, (keys_before, values_before), strict=True):
        same = (got == expected) | (got.isnan() & expected.isnan())
        assert same.all()
