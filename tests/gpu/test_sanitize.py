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
from tests.csrc import code_checks
from tests.kernels import code_steps
from tests.kernels.checks import check_prefill_copies
from tests.kernels.layers import Layer, layer_of
from tests.reference import coded
from tests.shapes import Case, Shape, build_case
from vllm_kcache.kernels.decode import decode_step
from vllm_kcache.kernels.workspace import Followers
from vllm_kcache.kernels.write import WriteParts, write_kv
from vllm_kcache.reference import attend, fetch, write
from vllm_kcache.types import Selected, Selection

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPE = torch.bfloat16
# Partial pages and blocks, a padded row, length 1, and lists long enough to be split.
SHAPE = Shape((150, 1, 0, 37), 3, 2, 64, 16, 8)
# The same with K codes, whose chunks are of 256 tokens.
CODED = Shape((300, 1, 0, 37), 2, 4, 128, 16, 8)
# A search with sums, one without, and the rule that needs no search.
RULES = {
    "coverage": Selection(None, 0.8, 1, 8, "sum"),
    "fixed": Selection(6, None, 1, 8, "max"),
    "mass": Selection(None, None, 1, 8, "max", 0.02),
}
# Enough for all, fewer than one step needs (so that some are read straight from the host), few
# enough that slots change their owner from step to step, and none.
SLOTS = (256, 5, 40, 0)


def a_case() -> Case:
    return build_case(SHAPE, DTYPE, sharpness=4.0)


def check_step(case: Case, layer: Layer, followers: Followers | None) -> None:
    """One decode step, against the reference over the blocks that the step chose itself."""
    out = torch.full_like(layer.batch.query, torch.nan)
    decode_step(layer.view, layer.workspace, layer.batch, out, followers=followers)
    torch.cuda.synchronize()
    chosen = layer.workspace.views(layer.view, layer.batch).selected
    assert chosen.lse is not None
    counts = chosen.counts.cpu()
    beyond = torch.arange(chosen.blocks.shape[2]) >= counts[..., None]
    selected = Selected(
        chosen.blocks.cpu().masked_fill(beyond, -1), counts, chosen.mass.cpu(), chosen.lse.cpu()
    )
    assert (counts[0] > 1).all()
    tokens = SHAPE.v_block_tokens
    expected = attend.attend_blocks(
        case.query, case.k_pages, case.v_pool,
        fetch.fetch_blocks(selected, case.block_table, case.v_pool, tokens), selected,
        case.block_table, case.seq_lens, case.scale, tokens, layer.view.tail,
        clip=layer.view.selection.clips(case.seq_lens),
    )  # fmt: skip
    assert_close(out.cpu(), expected)


@pytest.mark.parametrize("followers", [None, Followers(4, 2)], ids=["alone", "followers"])
@pytest.mark.parametrize("rule", RULES)
def test_decode_steps(rule: str, followers: Followers | None) -> None:
    """Score, select, fetch and attend; the second step finds what the first brought."""
    case, selection = a_case(), RULES[rule]
    for num_slots in SLOTS:
        tail = "renormalize" if selection.clip is None else "clip"
        layer = layer_of(case, selection, tail, num_slots, DEVICE)
        for _ in range(3):
            check_step(case, layer, followers)
        counted = layer.cache.read_counters()
        assert counted.selected == counted.hits + counted.misses + counted.direct
        # With 40 slots a claim may meet none that is free.
        if num_slots != 40:
            assert (counted.direct > 0) == (num_slots < 40)


def test_writes_and_steps() -> None:
    """A prompt's tokens in two parts, decode tokens that claim slots, and steps that read both."""
    case = a_case()
    layer = layer_of(case, RULES["mass"], "clip", 40, DEVICE)
    table, lengths = case.block_table, SHAPE.seq_lens

    def slots_of(row: int, tokens: range) -> list[int]:
        page = SHAPE.page_tokens
        return [int(table[row, token // page]) * page + token % page for token in tokens]

    prompt = torch.tensor([*slots_of(0, range(16, 40)), -1], device=DEVICE)
    newest = torch.tensor([slots_of(row, range(n - 1, n))[0] if n else -1
                           for row, n in enumerate(lengths)], device=DEVICE)  # fmt: skip
    k_pages, v_pool = case.k_pages.clone(), case.v_pool.clone()
    for step in range(2):
        for slots, parts, claims in (
            (prompt, WriteParts.K | WriteParts.ROW_SLOT, 0),
            (prompt, WriteParts.ROW_HOST, 0),
            (newest, WriteParts.ALL, len(newest)),
        ):
            size = (len(slots), 2, SHAPE.num_kv_heads, SHAPE.head_size)
            generator = torch.Generator().manual_seed(len(slots) + step)
            tokens = torch.randn(size, generator=generator).to(case.query.dtype)
            key, value = tokens.to(DEVICE).unbind(1)  # strided over tokens
            write_kv(layer.view, key, value, slots, parts=parts, allocate_tokens=claims)
            write.write_kv(key.cpu(), value.cpu(), slots.cpu(), k_pages, v_pool)
        torch.cuda.synchronize()
        for got, expected in ((layer.view.k_pages.cpu(), k_pages), (layer.view.v_pages, v_pool)):
            assert ((got == expected) | (got.isnan() & expected.isnan())).all()
        check_step(replace(case, k_pages=k_pages, v_pool=v_pool), layer, None)


def test_prefill_copies() -> None:
    """Context gathered and patched, new V stored."""
    check_prefill_copies(SHAPE, DEVICE)


@pytest.mark.parametrize("host_dtype", code_checks.HOST_DTYPES)
def test_codes_and_rows(host_dtype: str) -> None:
    """Rows whole and in parts, written, claimed, and gathered: each size of a head."""
    for shape in coded.SHAPES:
        code_checks.check_write(shape, DTYPE, host_dtype, device=DEVICE)
        code_checks.check_gather(shape, DTYPE, host_dtype, DEVICE)
    code_checks.check_slots(host_dtype, DEVICE)
    code_checks.check_fills(host_dtype, DEVICE)


def test_scores_from_codes() -> None:
    """Each size of the score kernel; thread blocks with several chunks, with one and with none."""
    for shape in code_checks.SCORED:
        code_checks.check_scores(shape, 2, device=DEVICE)
    for shape in code_checks.SOME_SCORED:
        code_checks.check_joint_scores(shape, 2, 0, DEVICE)


@pytest.mark.parametrize("host_dtype", code_checks.HOST_DTYPES)
def test_steps_with_codes(host_dtype: str) -> None:
    """Scores from codes, select, fetch and attend from rows."""
    mass, dtype = code_steps.RULES[1], torch.float16
    for num_slots in (256, 5, 0):
        code_steps.check_step(CODED, host_dtype, mass, num_slots, DEVICE, dtype)
    code_steps.check_write(CODED, host_dtype, DEVICE)
