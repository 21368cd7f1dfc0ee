# SPDX-License-Identifier: Apache-2.0
"""Whole decode steps and prefill copies against the reference, on the CPU or on a GPU.

`python -m tests.kernels.checks` runs the small cases under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.conftest import assert_close
from tests.kernels.layers import Layer, layer_of
from tests.shapes import Case, Shape, build_case
from vllm_kcache.cache.hot_cache import HotCache
from vllm_kcache.kernels import decode, write
from vllm_kcache.kernels.attend import attend_blocks as attend_kernel_blocks
from vllm_kcache.kernels.attend_plan import AttendConfig
from vllm_kcache.kernels.context import gather_context, patch_context, store_value
from vllm_kcache.kernels.decode import decode_step
from vllm_kcache.kernels.workspace import Followers
from vllm_kcache.kernels.write import write_kv
from vllm_kcache.reference.attend import attend_blocks
from vllm_kcache.reference.fetch import fetch_blocks
from vllm_kcache.reference.score import score_blocks
from vllm_kcache.reference.select import select_blocks
from vllm_kcache.types import Selected, Selection, Tail

SHAPES = (
    Shape(seq_lens=(37, 1, 0, 64), num_kv_heads=2, group_size=2, head_size=64, page_tokens=16,
          v_block_tokens=8),
    Shape(seq_lens=(50,), num_kv_heads=1, group_size=5, head_size=80, page_tokens=32,
          v_block_tokens=16),
    Shape(seq_lens=(19, 33), num_kv_heads=3, group_size=1, head_size=96, page_tokens=16,
          v_block_tokens=4),
)  # fmt: skip
SELECTIONS = (
    Selection(None, None, 1, 1, "sum"),
    Selection(3, None, 1, 1, "sum"),
    Selection(None, 0.6, 1, 1, "sum"),
    Selection(4, 0.9, 0, 1, "max"),
)
# The longest list of the first is long, the second ends at its cap, the last keeps everything.
THRESHOLDS = (
    Selection(None, None, 1, 1, "max", 0.08),
    Selection(3, None, 0, 1, "max", 0.08),
    Selection(None, None, 1, 1, "max", 0.08, 20),
    Selection(None, None, 0, 9, "sum", 0.15),
    Selection(None, None, 1, 1, "sum", 1e-9),
)
# Four chunks of the score kernel, the last of them begun.
SEVERAL_CHUNKS = Shape(seq_lens=(7, 200), num_kv_heads=2, group_size=1, head_size=96,
                       page_tokens=16, v_block_tokens=4)  # fmt: skip
# Group sizes 1 and 3, a padded row, one token, a last V block that is partly filled.
CLIPPED_SHAPES = (
    Shape(seq_lens=(75, 0, 1), num_kv_heads=2, group_size=3, head_size=64, page_tokens=16,
          v_block_tokens=4),
    Shape(seq_lens=(131,), num_kv_heads=2, group_size=1, head_size=80, page_tokens=32,
          v_block_tokens=8),
)  # fmt: skip


def sums_of_chunks(block_lse: torch.Tensor, lengths: list[int], chunk: int) -> torch.Tensor:
    """[B, Hq, C] log-sum-exp of runs of `chunk` blocks, as scoring leaves them; NaN past the end.

    Args:
        block_lse: [B, Hq, P] float32, host.
        lengths: V blocks of each request.
    """
    chunks = -(-block_lse.shape[2] // chunk)
    out = torch.full((*block_lse.shape[:2], chunks), torch.nan)
    for row, num_blocks in enumerate(lengths):
        for first in range(0, num_blocks, chunk):
            there = block_lse[row, :, first : min(first + chunk, num_blocks)]
            out[row, :, first // chunk] = there.logsumexp(-1)
    return out


def expected_step(case: Case, selection: Selection, tail: Tail) -> tuple[torch.Tensor, Selected]:
    """Result and lists of the definition, in float32 on the host."""
    tokens = case.shape.v_block_tokens
    paged = (case.block_table, case.seq_lens, case.scale, tokens)
    block_lse = score_blocks(case.query, case.k_pages, *paged, case.shape.max_blocks)
    chosen = select_blocks(block_lse, case.seq_lens, case.shape.num_kv_heads, tokens, selection)
    fetched = fetch_blocks(chosen, case.block_table, case.v_pool, tokens)
    result = attend_blocks(
        case.query, case.k_pages, case.v_pool, fetched, chosen, *paged, tail,
        clip=selection.clips(case.seq_lens),
    )  # fmt: skip
    return result, chosen


def check_decode(
    case: Case,
    selection: Selection,
    num_slots: int,
    tail: Tail,
    device: str = "cpu",
    followers: Followers | None = None,
) -> None:
    """A step twice over one hot cache: misses first, hits after, the same answer."""
    shape, tokens = case.shape, case.shape.v_block_tokens
    expected, chosen = expected_step(case, selection, tail)
    layer = layer_of(case, selection, tail, num_slots, device)
    epoch = int(layer.cache.state[1])
    for number in (1, 2):
        out = torch.full_like(layer.batch.query, float("nan"))
        decode_step(layer.view, layer.workspace, layer.batch, out, followers=followers)
        lists = layer.workspace.views(layer.view, layer.batch)
        selected = lists.selected
        assert torch.equal(selected.counts.cpu(), chosen.counts)
        # Past its count a list in the workspace holds anything: the kernels stop there.
        columns = torch.arange(chosen.blocks.shape[2])
        listed = columns < chosen.counts[..., None]
        ours = selected.blocks[..., : chosen.blocks.shape[2]].cpu()
        assert torch.equal(ours[listed], chosen.blocks[listed]), "another selection"
        assert_close(out.cpu(), expected)
        lengths = [-(-seq_len // tokens) for seq_len in shape.seq_lens]
        block_lse = score_blocks(
            case.query, case.k_pages, case.block_table, case.seq_lens, case.scale, tokens,
            shape.max_blocks,
        )  # fmt: skip
        sums = sums_of_chunks(block_lse, lengths, lists.chunk_blocks)
        assert_close(lists.chunk_lse.cpu()[~sums.isnan()], sums[~sums.isnan()])
        if chosen.lse is not None:
            full = case.seq_lens.cpu() > 0
            assert selected.lse is not None
            assert_close(selected.lse.cpu()[full], chosen.lse[full])
        assert not layer.workspace.signals.any(), "lists are left for the next step"
        assert int(layer.cache.state[1]) == epoch + number, "one epoch a step"
    counted = layer.cache.read_counters()
    total = int(chosen.counts.sum())
    assert counted.selected == counted.hits + counted.misses + counted.direct == 2 * total
    if num_slots >= 2 * total:
        assert counted.hits == total
    if num_slots == 0:
        assert counted.direct == 2 * total


def check_clip(
    shape: Shape, selection: Selection, splits: int, device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """The clipped tail over lists in `splits` parts of 16 tokens or more, poison in the lists."""
    case = build_case(shape, dtype, sharpness=3.0)
    expected, chosen = expected_step(case, selection, "clip")
    layer = layer_of(case, selection, "clip", 0, device)
    assert chosen.lse is not None
    # A padded row's log-sum-exp may be anything.
    lse = chosen.lse.masked_fill(case.seq_lens[:, None] == 0, torch.nan)
    selected = Selected(
        *(part.to(device) for part in (chosen.blocks, chosen.counts, chosen.mass, lse))
    )
    config = AttendConfig(max(1, 16 // shape.v_block_tokens), splits, 4, 2)
    for _ in range(2):
        out = torch.full_like(layer.batch.query, torch.nan)
        attend_kernel_blocks(
            layer.view, layer.batch, selected, rows_on_host(layer, chosen).to(device),
            layer.workspace, out, config=config,
        )  # fmt: skip
        assert_close(out.cpu(), expected)


def rows_on_host(layer: Layer, chosen: Selected) -> torch.Tensor:
    """[B, Hkv, N] int32: every listed block at its row of the host pool, as `Fetched.rows`."""
    shape, table = layer.view.shape, layer.batch.block_table.cpu()
    per_page = shape.page_tokens // shape.block_tokens
    rows = torch.full_like(chosen.blocks, -1)
    for request, head, column in (chosen.blocks >= 0).nonzero().tolist():
        block = int(chosen.blocks[request, head, column])
        page = int(table[request, block // per_page])
        physical = (page * shape.num_kv_heads + head) * per_page + block % per_page
        rows[request, head, column] = -2 - physical
    return rows


def check_prefill_copies(shape: Shape, device: str = "cpu") -> None:
    """What is stored comes back; rows that the step itself writes are patched."""
    case = build_case(shape)
    table, num_heads = case.block_table.to(device), shape.num_kv_heads
    v_pool = case.v_pool if device == "cpu" else case.v_pool.pin_memory()
    lengths = torch.tensor(shape.seq_lens, dtype=torch.int32, device=device)
    starts = torch.zeros_like(lengths)
    first_rows = torch.cat([starts[:1], lengths.cumsum(0).int()])
    out = torch.full((int(first_rows[-1]), num_heads, shape.head_size), float("nan"), device=device)
    gather_context(v_pool, table, starts, lengths, first_rows, int(lengths.max()), out, 3)
    expected = torch.cat(case.values).to(device)
    assert torch.equal(out, expected)

    request = max(range(len(shape.seq_lens)), key=lambda index: shape.seq_lens[index])
    page = int(table[request, 0])
    first_slot = page * shape.page_tokens
    slots = torch.tensor([first_slot + 2, -1, first_slot + 3], device=device)
    value = torch.randn(3, num_heads, shape.head_size, device=device)
    num_slots = v_pool.shape[0] * shape.page_tokens
    step_rows = torch.full((num_slots,), -1, dtype=torch.int32, device=device)
    step_rows[first_slot + 2], step_rows[first_slot + 3] = 0, 2
    patch_context(
        out, value, step_rows, table, starts, lengths, first_rows, int(lengths.max()),
        shape.page_tokens,
    )  # fmt: skip
    at = int(first_rows[request])
    expected[at + 2], expected[at + 3] = value[0], value[2]
    assert torch.equal(out, expected)

    pool = torch.zeros_like(v_pool)
    if device != "cpu":
        pool = pool.pin_memory()
    store_value(value, slots, pool)
    if device != "cpu":
        torch.cuda.synchronize()
    assert torch.equal(pool[page, :, 2], value[0].cpu())
    assert torch.equal(pool[page, :, 3], value[2].cpu())
    assert int((pool != 0).any(-1).sum()) == 2 * num_heads


def check_write_keeps_copies_fresh() -> None:
    """A copy in the hot cache follows every write, and is stale when the update is taken out."""
    for parts in (write.WriteParts.ALL, write.WriteParts.K | write.WriteParts.ROW_HOST):
        case = build_case(SHAPES[0])
        shape = case.shape
        layer = layer_of(case, SELECTIONS[0])
        out = torch.empty_like(case.query)
        decode_step(layer.view, layer.workspace, layer.batch, out)
        slot = case.block_table[0, 0].long() * shape.page_tokens + 1
        key = torch.randn(1, shape.num_kv_heads, shape.head_size)
        write_kv(layer.view, key, 9 + key, slot[None], parts=parts)
        decode_step(layer.view, layer.workspace, layer.batch, out)
        table = layer.cache.table.shape[1]
        fresh = layer.with_cache(HotCache.make(64, 2, table, layer.view.shape.row.bytes, "cpu"))
        expected = torch.empty_like(case.query)
        decode_step(fresh.view, fresh.workspace, fresh.batch, expected)
        assert torch.equal(out, expected) == (write.WriteParts.ROW_SLOT in parts), parts


def check_failed_launch(device: str = "cpu") -> None:
    """A launch that raises leaves nothing that the next step would take for its own, whichever it
    is (D6)."""
    case = build_case(SEVERAL_CHUNKS)
    expected, chosen = expected_step(case, SELECTIONS[2], "renormalize")
    layer = layer_of(case, SELECTIONS[2], device=device)

    def fails(*_arguments: object, **_named: object) -> None:
        raise RuntimeError("out of everything")

    for launch in ("score_blocks", "follow_scores", "select_and_fetch", "attend_blocks"):
        sound = getattr(decode, launch)
        setattr(decode, launch, fails)
        out = torch.full_like(layer.batch.query, float("nan"))
        for _ in range(2):
            with pytest.raises(RuntimeError, match="out of everything"):
                decode_step(
                    layer.view, layer.workspace, layer.batch, out, followers=Followers(2, 2)
                )
            assert not layer.workspace.signals.any()
            assert not layer.workspace.arrivals.any()
            assert out.isnan().all()
        setattr(decode, launch, sound)
        layer.cache.read_counters(reset=True)
        decode_step(layer.view, layer.workspace, layer.batch, out, followers=Followers(2, 2))
        assert_close(out.cpu(), expected)
        assert layer.cache.read_counters().selected == int(chosen.counts.sum())


def main() -> None:
    """Every combination; any difference raises."""
    cases = 0
    for shape in SHAPES:
        for selection in SELECTIONS:
            check_decode(build_case(shape), selection, 64, "renormalize")
            cases += 1
        for num_slots in (0, 2):
            check_decode(build_case(shape), SELECTIONS[0], num_slots, "renormalize")
        check_decode(build_case(shape), SELECTIONS[1], 64, "renormalize", followers=Followers(3, 1))
        check_prefill_copies(shape)
        cases += 4
    for selection, shape, splits in itertools.product(THRESHOLDS, CLIPPED_SHAPES, (1, 3)):
        check_clip(shape, selection, splits)
        cases += 1
    for followers in (None, Followers(2, 1)):
        check_decode(build_case(SHAPES[0]), THRESHOLDS[0], 64, "clip", followers=followers)
        check_decode(build_case(SHAPES[2]), THRESHOLDS[1], 2, "clip", followers=followers)
        check_decode(build_case(SHAPES[0]), THRESHOLDS[2], 64, "renormalize", followers=followers)
        several = build_case(SEVERAL_CHUNKS)
        for selection in (SELECTIONS[2], Selection(None, None, 1, 1, "max", 0.02)):
            check_decode(several, selection, 256, "renormalize", followers=followers)
        cases += 5
    check_write_keeps_copies_fresh()
    check_failed_launch()
    print(f"{cases + 2} cases equal the reference")


if __name__ == "__main__":
    main()
