# SPDX-License-Identifier: Apache-2.0
"""Every kernel once, tiny, in few compiled variants: what compute-sanitizer is run on.

`tools/gpu_kernels.sh --sanitize` runs this file under memcheck and racecheck. Under memcheck with
PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is an allocation of its own and reading past
its end is seen; so nothing here captures a graph. The results are compared with the reference, too.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.conftest import assert_close
from tests.kernels.checks import check_prefill_copies, on
from tests.shapes import Case, Shape, build_case
from vllm_kcache import ops
from vllm_kcache.cache.hot_cache import HotCache
from vllm_kcache.kernels import extension
from vllm_kcache.kernels.decode import DecodeWorkspace, decode_step
from vllm_kcache.kernels.decode_plan import DecodePlan
from vllm_kcache.kernels.score_plan import chunk_blocks
from vllm_kcache.kernels.write import WriteParts, write_kv
from vllm_kcache.reference import attend, fetch, score, write
from vllm_kcache.types import Selected, Selection

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPE = torch.bfloat16
# Partial pages and blocks, a padded row, length 1, and lists long enough to be split.
SHAPE = Shape((150, 1, 0, 37), 3, 2, 64, 16, 8)
RULE = Selection(None, 0.8, 1, 8, "sum")
# Enough for all, fewer than one step needs (so that some are read straight from the host), and few
# enough that slots change their owner from step to step.
SLOTS = (256, 5, 40)
WAVES = DecodePlan(2, 4, True)
# Taken in one pass by kernels of their own (csrc/threshold.cuh).
BY_MASS = Selection(None, None, 1, 8, "max", 0.02)


@pytest.fixture(params=["best", "triton"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the extension where it is built, and without."""
    if request.param == "triton":
        monkeypatch.setattr(extension, "available", lambda: False)
    return request.param


def a_case() -> Case:
    return build_case(SHAPE, DTYPE, sharpness=4.0)


def a_cache(case: Case, num_slots: int) -> HotCache:
    rows = case.v_pool[..., 0].numel() // SHAPE.v_block_tokens
    return HotCache.make(num_slots, 2, rows, SHAPE.v_block_tokens, SHAPE.head_size,
                         case.query.dtype, DEVICE)  # fmt: skip


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def check_step(
    case: Case,
    there: Case,
    cache: HotCache,
    plan: DecodePlan,
    tail: str,
    layer: int,
    rule: Selection = RULE,
) -> None:
    """One decode step, against the reference over the blocks that the step chose itself."""
    tokens, max_blocks, requests = SHAPE.v_block_tokens, SHAPE.max_blocks, len(SHAPE.seq_lens)
    workspace = DecodeWorkspace.make(
        requests, SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.head_size, max_blocks, rule, DEVICE,
        with_miss_list=True,
        chunk_blocks=chunk_blocks(SHAPE.head_size, DTYPE.itemsize, tokens),
    )  # fmt: skip
    out = torch.full_like(there.query, torch.nan)
    decode_step(
        workspace, there.query, there.k_pages, there.v_pool, there.block_table, there.seq_lens,
        case.scale, tokens, max_blocks, rule, tail, cache, layer, out, plan,
    )  # fmt: skip
    synchronize()
    _, chosen, _ = workspace.views(requests, max_blocks, rule)
    counts = chosen.counts.cpu()
    beyond = torch.arange(chosen.blocks.shape[2]) >= counts[..., None]
    selected = Selected(chosen.blocks.cpu().masked_fill(beyond, -1), counts, chosen.mass.cpu())
    assert (counts[0] > 1).all()
    block_lse = score.score_blocks(
        case.query, case.k_pages, case.block_table, case.seq_lens, case.scale, tokens, max_blocks
    )
    expected = attend.attend_blocks(
        case.query, case.k_pages, case.v_pool,
        fetch.fetch_blocks(selected, case.block_table, case.v_pool, tokens), selected,
        case.block_table, case.seq_lens, case.scale, tokens, tail, block_lse,
    )  # fmt: skip
    assert_close(out.cpu(), expected)


@pytest.mark.parametrize("plan", [DecodePlan(), WAVES], ids=["one wave", "two waves"])
def test_decode_steps(kernels: str, plan: DecodePlan) -> None:
    """Score, select, fetch and attend; the second step finds what the first brought."""
    case = a_case()
    there = on(case, DEVICE)
    for num_slots in SLOTS:
        cache = a_cache(case, num_slots)
        for step in range(3):
            check_step(case, there, cache, plan, "drop" if step == 2 else "renormalize", step % 2)
        counted = cache.read_counters()
        assert counted.selected == counted.hits + counted.misses + counted.direct
        # With 40 slots a claim may meet none that is free.
        if num_slots != SLOTS[2]:
            assert (counted.direct > 0) == (num_slots == SLOTS[1])


@pytest.mark.skipif(
    torch.cuda.is_available() and not extension.available(), reason="the extension is not built"
)
@pytest.mark.parametrize("rule", [RULE, BY_MASS], ids=["coverage", "mass threshold"])
@pytest.mark.parametrize(
    "plan", [DecodePlan(), DecodePlan(followers=2)], ids=["one wave", "followers"]
)
def test_rules_and_followers(rule: Selection, plan: DecodePlan) -> None:
    """What the extension has for each rule, in a launch of its own and beside scoring."""
    case = a_case()
    there, cache = on(case, DEVICE), a_cache(case, SLOTS[0])
    for layer in (0, 1, 0):
        check_step(case, there, cache, plan, "renormalize", layer, rule)


def test_steps_apart(kernels: str) -> None:
    """The operations one by one, as `vllm_kcache.ops` offers them; with staging, no hot cache."""
    case = a_case()
    there = on(case, DEVICE)
    tokens, max_blocks = SHAPE.v_block_tokens, SHAPE.max_blocks
    where = (there.block_table, there.seq_lens)
    block_lse = ops.score_blocks(there.query, there.k_pages, *where, case.scale, tokens, max_blocks)
    chosen = ops.select_blocks(block_lse, there.seq_lens, SHAPE.num_kv_heads, tokens, RULE)
    fetched = ops.fetch_blocks(chosen, there.block_table, there.v_pool, tokens)
    out = ops.attend_blocks(
        there.query, there.k_pages, there.v_pool, fetched, chosen, *where, case.scale, tokens,
        "renormalize", block_lse,
    )  # fmt: skip
    synchronize()
    assert out.isfinite().all()
    assert int(chosen.counts.min()) == 0 < int(chosen.counts.max())


def test_writes_and_steps() -> None:
    """A prompt's tokens in two parts, decode tokens that claim slots, and steps that read both."""
    case = a_case()
    there = on(case, DEVICE)
    cache = a_cache(case, 40)
    table, lengths = case.block_table, SHAPE.seq_lens

    def slots_of(row: int, tokens: range) -> list[int]:
        page = SHAPE.page_tokens
        return [int(table[row, token // page]) * page + token % page for token in tokens]

    prompt = torch.tensor([*slots_of(0, range(16, 40)), -1], device=DEVICE)
    newest = torch.tensor([slots_of(row, range(n - 1, n))[0] if n else -1
                           for row, n in enumerate(lengths)], device=DEVICE)  # fmt: skip
    k_pages, v_pool = case.k_pages.clone(), case.v_pool.clone()
    for layer in (0, 1):
        for slots, parts, claims in (
            (prompt, WriteParts.K | WriteParts.V_SLOT, 0),
            (prompt, WriteParts.V_HOST, 0),
            (newest, WriteParts.ALL, len(newest)),
        ):
            size = (len(slots), 2, SHAPE.num_kv_heads, SHAPE.head_size)
            generator = torch.Generator().manual_seed(len(slots))
            tokens = torch.randn(size, generator=generator).to(case.query.dtype)
            key, value = tokens.to(DEVICE).unbind(1)  # strided over tokens
            write_kv(
                key, value, slots, there.k_pages, there.v_pool, cache, layer, parts=parts,
                allocate_tokens=claims,
            )  # fmt: skip
            write.write_kv(*tokens.unbind(1), slots.cpu(), k_pages, v_pool)
        synchronize()
        for got, expected in ((there.k_pages.cpu(), k_pages), (there.v_pool, v_pool)):
            assert ((got == expected) | (got.isnan() & expected.isnan())).all()
        written = replace(case, k_pages=k_pages, v_pool=v_pool)
        check_step(written, there, cache, DecodePlan(), "renormalize", layer)


def test_prefill_copies() -> None:
    """Context gathered and patched, new V stored."""
    check_prefill_copies(SHAPE, DEVICE)
