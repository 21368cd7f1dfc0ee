# SPDX-License-Identifier: Apache-2.0
"""Decode steps on a GPU against the reference: odd shapes, both kernels, waves, graphs, reuse."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import assert_close
from tests.kernels.checks import (
    SELECTIONS,
    SHAPES,
    THRESHOLDS,
    check_decode,
    check_prefill_copies,
    on,
)
from tests.shapes import Shape, build_case
from vllm_kcache.cache.hot_cache import WANTED, HotCache
from vllm_kcache.kernels import extension
from vllm_kcache.kernels.decode import DecodeWorkspace, decode_step
from vllm_kcache.kernels.decode_plan import DecodePlan
from vllm_kcache.kernels.score_plan import chunk_blocks
from vllm_kcache.kernels.write import write_kv
from vllm_kcache.types import Selection

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
MORE_SHAPES = (
    *SHAPES,
    Shape((257, 1, 0, 1024, 31), 8, 4, 128, 16, 8),
    Shape((513, 700), 2, 16, 256, 16, 4),
    Shape((300, 299, 17), 4, 8, 128, 32, 32),
    Shape((1000,) * 5, 32, 1, 128, 16, 8),
    Shape((2049,), 3, 3, 64, 16, 16),
)


@pytest.mark.parametrize("shape", MORE_SHAPES, ids=str)
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("tail", ["renormalize", "drop"])
def test_step_equals_reference(shape: Shape, selection: Selection, tail: str) -> None:
    check_decode(build_case(shape), selection, 1 << 14, tail, "cuda")


@pytest.mark.parametrize("shape", MORE_SHAPES, ids=str)
@pytest.mark.parametrize("selection", THRESHOLDS, ids=str)
def test_step_with_a_mass_threshold(shape: Shape, selection: Selection) -> None:
    check_decode(build_case(shape), selection, 1 << 14, "clip", "cuda")


@pytest.mark.parametrize("shape", MORE_SHAPES, ids=str)
def test_step_without_room_in_the_cache(shape: Shape) -> None:
    check_decode(build_case(shape), SELECTIONS[0], 3, "renormalize", "cuda")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_copies(shape: Shape) -> None:
    check_prefill_copies(shape, "cuda")


def test_triton_kernels_alone() -> None:
    """The same cases with the extension switched off, in a process of its own."""
    code = (
        "from tests.kernels.checks import *\n"
        "for shape in SHAPES:\n"
        "    for selection in SELECTIONS:\n"
        "        check_decode(build_case(shape), selection, 64, 'renormalize', 'cuda')\n"
        "    for selection in THRESHOLDS:\n"
        "        check_decode(build_case(shape), selection, 64, 'clip', 'cuda')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, extension.SWITCH: "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _attended(case, workspace, selection, cache, out, plan=None, after_write=False) -> torch.Tensor:
    shape, tail = case.shape, "renormalize" if selection.clip is None else "clip"
    decode_step(
        workspace, case.query, case.k_pages, case.v_pool, case.block_table, case.seq_lens,
        case.scale, shape.v_block_tokens, shape.max_blocks, selection, tail, cache, 0, out, plan,
        after_write,
    )  # fmt: skip
    return out


def _cache(case, num_slots: int) -> HotCache:
    shape = case.shape
    rows = case.v_pool[..., 0].numel() // shape.v_block_tokens
    return HotCache.make(
        num_slots, 1, rows, shape.v_block_tokens, shape.head_size, case.query.dtype, "cuda"
    )


def _workspace(case, selection) -> DecodeWorkspace:
    shape = case.shape
    return DecodeWorkspace.make(
        len(shape.seq_lens), shape.num_heads, shape.num_kv_heads, shape.head_size,
        shape.max_blocks, selection, "cuda", with_miss_list=True,
        chunk_blocks=chunk_blocks(shape.head_size, 4, shape.v_block_tokens),
    )  # fmt: skip


@pytest.mark.parametrize(
    "plan",
    [
        DecodePlan(),
        DecodePlan(2),
        DecodePlan(4),
        DecodePlan(3, 16),
        DecodePlan(4, 16, True),
        DecodePlan(followers=3),
        DecodePlan(followers=64),
        DecodePlan(followers=64, least_followers=2),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "selection", [Selection(None, 0.8, 1, 8, "sum"), Selection(None, None, 1, 8, "max", 0.01)],
    ids=["coverage", "threshold"],
)  # fmt: skip
def test_waves_and_graph_replay_agree(plan: DecodePlan, selection: Selection) -> None:
    """A captured step in waves, replayed on changed lengths, equals an eager one in one wave."""
    case = on(build_case(MORE_SHAPES[6]), "cuda")
    workspace, cache = _workspace(case, selection), _cache(case, 256)
    out = torch.empty_like(case.query)
    _attended(case, workspace, selection, cache, out, plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _attended(case, workspace, selection, cache, out, plan)
    plain = _workspace(case, selection)
    for shorter in (0, 1, 13, 500, 999, 1000):
        case.seq_lens[1] = 1000 - shorter
        out.fill_(float("nan"))
        graph.replay()
        expected = _attended(
            case, plain, selection, _cache(case, 1 << 14), torch.empty_like(case.query),
            DecodePlan(),
        )  # fmt: skip
        assert_close(out, expected)


@pytest.mark.parametrize(
    "plan",
    [DecodePlan(), DecodePlan(2), DecodePlan(followers=5), DecodePlan(followers=64)],
    ids=str,
)
@pytest.mark.parametrize("selection", [*SELECTIONS[:2], *THRESHOLDS[:1]], ids=str)
def test_dependent_launches_wait_for_what_they_read(plan: DecodePlan, selection: Selection) -> None:
    """Captured as in the engine: a step right after the write of the tokens that it needs.

    Until the write, K of these tokens is not a number.
    """
    torch.manual_seed(0)
    shape = Shape((1000, 37, 1, 513, 16), 8, 4, 128, 16, 8)
    case = on(build_case(shape), "cuda")
    case.k_pages.nan_to_num_()
    case.v_pool.nan_to_num_()
    last = case.seq_lens.long() - 1
    pages = case.block_table.gather(1, (last // shape.page_tokens)[:, None])[:, 0].long()
    slots = pages * shape.page_tokens + last % shape.page_tokens
    in_page = last % shape.page_tokens
    # Of the host's memory, so that the write takes its time: who does not wait comes too early.
    key = torch.randn(len(slots), shape.num_kv_heads, shape.head_size, pin_memory=True)
    value = torch.randn_like(key, device="cuda")
    unwritten = torch.full_like(value, float("nan"))
    workspace, cache = _workspace(case, selection), _cache(case, 1 << 12)
    assert workspace.dependent == (torch.cuda.get_device_capability() >= (9, 0))
    out = torch.empty((8, *case.query.shape), device="cuda")

    def steps() -> None:
        for step in range(len(out)):
            case.k_pages[pages, :, in_page] = unwritten
            write_kv(
                key, value, slots, case.k_pages, case.v_pool, cache, 0,
                allocate_tokens=len(slots), dependent=workspace.dependent,
            )  # fmt: skip
            _attended(case, workspace, selection, cache, out[step], plan, after_write=True)

    steps()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    plain = replace(_workspace(case, selection), dependent=False)
    for _ in range(20):
        key.normal_()
        value.normal_()
        case.query.normal_()
        out.fill_(float("nan"))
        graph.replay()
        expected = _attended(
            case, plain, selection, _cache(case, 1 << 12), torch.empty_like(case.query),
            DecodePlan(),
        )  # fmt: skip
        for step in out:
            assert_close(step, expected)


def test_fewer_follow_where_less_is_missing() -> None:
    """All of them where fetching takes as long as scoring, and after a step without a miss few."""
    case = on(build_case(MORE_SHAPES[6]), "cuda")
    selection, plan = Selection(64, None, 1, 8, "sum"), DecodePlan(followers=40, least_followers=4)
    workspace, cache = _workspace(case, selection), _cache(case, 1 << 16)
    out = torch.empty_like(case.query)
    wanted = []
    for _ in range(2):
        _attended(case, workspace, selection, cache, out, plan)
        wanted.append(int(cache.state[WANTED]))
    most = min(40, case.query.shape[0] * case.k_pages.shape[1])
    assert wanted == [most, 4]


@pytest.mark.parametrize("plan", [DecodePlan(), DecodePlan(followers=5)], ids=str)
@pytest.mark.parametrize("update", [True, False], ids=["coherent", "update-switched-off"])
def test_reused_pages_never_serve_stale_v(update: bool, plan: DecodePlan) -> None:
    """Random writes over few pages with a small cache: copies follow every write.

    With the cache's write update switched off the same rounds must go wrong, or the test is blind.
    """
    torch.manual_seed(0)
    shape = Shape((120, 64, 90, 33), 4, 2, 64, 16, 8)
    case = on(build_case(shape), "cuda")
    selection = Selection(6, None, 1, 8, "sum")
    cache, workspace = _cache(case, 48), _workspace(case, selection)
    cache.write_update = update
    num_slots = case.v_pool.shape[0] * shape.page_tokens
    case.k_pages.nan_to_num_()
    case.v_pool.nan_to_num_()
    stale = 0
    for round_number in range(60):
        slots = torch.randperm(num_slots, device="cuda")[: 1 + round_number % 23]
        key = torch.randn(len(slots), shape.num_kv_heads, shape.head_size, device="cuda")
        # No slot is allocated: these tokens lie in the midst of V blocks, they do not begin them.
        write_kv(key, torch.randn_like(key), slots, case.k_pages, case.v_pool, cache, 0)
        case.query.normal_()
        got = _attended(case, workspace, selection, cache, torch.empty_like(case.query), plan)
        expected = _attended(
            case, workspace, selection, _cache(case, 1 << 12), torch.empty_like(case.query)
        )
        stale += int(not torch.allclose(got, expected, rtol=1e-4, atol=1e-5))
    assert (stale == 0) == update, f"{stale} rounds of 60 attended to stale V"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", MORE_SHAPES[3:], ids=str)
def test_half_precision(shape: Shape, dtype: torch.dtype) -> None:
    """Everything selected: the choice cannot differ, so the output is compared."""
    check_decode(build_case(shape, dtype=dtype), SELECTIONS[0], 1 << 14, "renormalize", "cuda")


def test_pools_beyond_two_gibi_elements() -> None:
    """Offsets past 2^31 elements, in K pages and in the host pool."""
    num_pages, heads, page_tokens, head_size = 70_000, 16, 16, 128
    k_pages = torch.zeros(
        (num_pages, heads, page_tokens, head_size), dtype=torch.bfloat16, device="cuda"
    )
    v_pool = torch.empty(k_pages.shape, dtype=torch.bfloat16, pin_memory=True)
    assert v_pool.numel() > 2**31
    table = torch.tensor([[num_pages - 1, 3, num_pages - 2]], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([40], dtype=torch.int32, device="cuda")
    for number, page in enumerate((num_pages - 1, 3, num_pages - 2)):
        v_pool[page] = number + 1
    query = torch.randn(1, heads, head_size, dtype=torch.bfloat16, device="cuda")
    selection = Selection(None, None, 1, 8, "sum")
    cache = HotCache.make(4096, 1, num_pages * heads * 2, 8, head_size, torch.bfloat16, "cuda")
    workspace = DecodeWorkspace.make(1, heads, heads, head_size, 5, selection, "cuda")
    out = torch.full_like(query, float("nan"))
    decode_step(
        workspace, query, k_pages, v_pool, table, lengths, 1.0, 8, 5, selection, "renormalize",
        cache, 0, out,
    )  # fmt: skip
    # All keys are zero, so every token has the same weight: 16 ones, 16 twos, 8 threes.
    expected = torch.full_like(out, (16 * 1 + 16 * 2 + 8 * 3) / 40)
    assert_close(out, expected)
