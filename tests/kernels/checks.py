# SPDX-License-Identifier: Apache-2.0
"""Whole decode steps and prefill copies against the reference, on the CPU or on a GPU.

`python -m tests.kernels.checks` runs the small cases under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from tests.conftest import assert_close
from tests.shapes import Case, Shape, build_case
from vllm_kcache.cache.hot_cache import HotCache
from vllm_kcache.kernels.attend import attend_blocks as attend_kernel_blocks
from vllm_kcache.kernels.attend_plan import AttendBuffers, AttendConfig
from vllm_kcache.kernels.context import gather_context, patch_context, store_value
from vllm_kcache.kernels.decode import DecodeWorkspace, decode_step
from vllm_kcache.kernels.score_plan import chunk_blocks
from vllm_kcache.kernels.select import launch_select
from vllm_kcache.kernels.write import write_kv
from vllm_kcache.reference.attend import attend_blocks
from vllm_kcache.reference.fetch import fetch_blocks
from vllm_kcache.reference.score import score_blocks
from vllm_kcache.reference.select import select_blocks
from vllm_kcache.types import Fetched, Selected, Selection

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


def on(case: Case, device: str) -> Case:
    """The same case with what a step takes on the device, and V in mapped host memory."""
    if device == "cpu":
        return case
    moved = {
        name: getattr(case, name).to(device)
        for name in ("query", "k_pages", "block_table", "seq_lens")
    }
    return replace(case, v_pool=case.v_pool.pin_memory(), **moved)


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


def check_decode(
    case: Case, selection: Selection, num_slots: int, tail: str, device: str = "cpu"
) -> None:
    """A step twice over one hot cache: misses first, hits after, the same answer.

    The reference runs in float32 on the CPU on the same values.
    """
    shape = case.shape
    tokens = shape.v_block_tokens
    block_lse = score_blocks(
        case.query, case.k_pages, case.block_table, case.seq_lens, case.scale, tokens,
        shape.max_blocks,
    )  # fmt: skip
    chosen = select_blocks(block_lse, case.seq_lens, shape.num_kv_heads, tokens, selection)
    expected = attend_blocks(
        case.query, case.k_pages, case.v_pool, fetch_blocks(
            chosen, case.block_table, case.v_pool, tokens
        ), chosen, case.block_table, case.seq_lens, case.scale, tokens, tail, block_lse,
        clip=selection.clip,
    )  # fmt: skip
    rows = case.v_pool[..., 0].numel() // tokens
    cache = HotCache.make(num_slots, 2, rows, tokens, shape.head_size, case.query.dtype, device)
    workspace = DecodeWorkspace.make(
        len(shape.seq_lens), shape.num_heads, shape.num_kv_heads, shape.head_size,
        shape.max_blocks, selection, device,
        chunk_blocks=chunk_blocks(shape.head_size, case.query.element_size(), tokens),
    )  # fmt: skip
    workspace.chunk_lse.fill_(float("nan"))
    case = on(case, device)
    for _ in range(2):
        out = torch.full_like(case.query, float("nan"))
        decode_step(
            workspace, case.query, case.k_pages, case.v_pool, case.block_table, case.seq_lens,
            case.scale, tokens, shape.max_blocks, selection, tail, cache, 1, out,
        )  # fmt: skip
        _, selected, _ = workspace.views(len(shape.seq_lens), shape.max_blocks, selection)
        assert torch.equal(selected.counts.cpu(), chosen.counts)
        # Past its count a list in the workspace holds anything: the kernels stop there.
        columns = torch.arange(chosen.blocks.shape[2])
        listed = columns < chosen.counts[..., None]
        ours = selected.blocks[..., : chosen.blocks.shape[2]].cpu()
        assert torch.equal(ours[listed], chosen.blocks[listed]), "another selection"
        assert_close(out.cpu(), expected)
        chunks = workspace.chunk_view(len(shape.seq_lens), shape.max_blocks)
        assert chunks is not None
        lengths = [-(-seq_len // tokens) for seq_len in shape.seq_lens]
        sums = sums_of_chunks(block_lse, lengths, workspace.chunk_blocks)
        assert_close(chunks.cpu()[~sums.isnan()], sums[~sums.isnan()])
        if chosen.lse is not None:
            full = case.seq_lens.cpu() > 0
            assert_close(selected.lse.cpu()[full], chosen.lse[full])
    counted = cache.read_counters()
    total = int(chosen.counts.sum())
    assert counted.selected == counted.hits + counted.misses + counted.direct == 2 * total
    if num_slots >= 2 * total:
        assert counted.hits == total


def check_select(selection: Selection, device: str = "cpu") -> None:
    """Lists by a threshold, many masses equal, and the log-sum-exp, also where a list is capped."""
    torch.manual_seed(0)
    lengths = torch.tensor((300, 0, 5, 121), dtype=torch.int32)
    block_lse = (2 * torch.randn(4, 6, 38)).round()
    chosen = select_blocks(block_lse, lengths, 2, 8, selection)
    columns = 38 if selection.top_n is None else selection.top_n
    out = Selected(
        torch.full((4, 2, columns), -99, dtype=torch.int32, device=device),
        torch.full((4, 2), -99, dtype=torch.int32, device=device),
        torch.full((4, 2), torch.nan, device=device),
        torch.full((4, 6), torch.nan, device=device),
    )
    launch_select(block_lse.to(device), lengths.to(device), 8, selection, out)
    assert torch.equal(out.counts.cpu(), chosen.counts)
    width = chosen.blocks.shape[2]
    assert torch.equal(out.blocks[..., :width].cpu(), chosen.blocks)
    assert (out.blocks[..., width:] == -1).all()
    assert_close(out.mass, chosen.mass)
    assert out.lse is not None
    blocks = torch.arange(38) * 8 < lengths[:, None]
    expected = block_lse.masked_fill(~blocks[:, None], -torch.inf).logsumexp(-1)
    assert_close(out.lse[lengths > 0], expected[lengths > 0])


def check_clip(
    shape: Shape, selection: Selection, splits: int, device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """The clipped tail over lists in `splits` parts of 16 tokens or more, poison in the buffers."""
    case = build_case(shape, dtype, sharpness=3.0)
    tokens, heads = shape.v_block_tokens, shape.num_kv_heads
    block_lse = score_blocks(
        case.query, case.k_pages, case.block_table, case.seq_lens, case.scale, tokens,
        shape.max_blocks,
    )  # fmt: skip
    chosen = select_blocks(block_lse, case.seq_lens, heads, tokens, selection)
    fetched = fetch_blocks(chosen, case.block_table, case.v_pool, tokens)
    expected = attend_blocks(
        case.query, case.k_pages, case.v_pool, fetched, chosen, case.block_table, case.seq_lens,
        case.scale, tokens, "clip", block_lse, clip=selection.clip,
    )  # fmt: skip
    assert chosen.lse is not None
    # A padded row's log-sum-exp may be anything.
    lse = chosen.lse.masked_fill(case.seq_lens[:, None] == 0, torch.nan)
    there = on(case, device)
    selected = Selected(*(part.to(device) for part in (chosen.blocks, chosen.counts, chosen.mass)),
                        lse.to(device))  # fmt: skip
    lists = len(shape.seq_lens) * heads
    buffers = AttendBuffers.make(lists, shape.group_size, shape.head_size, device, clipped=True)
    buffers.sums.fill_(torch.nan)
    buffers.weights.fill_(torch.nan)
    config = AttendConfig(max(1, 16 // tokens), splits, 4, 2)
    for _ in range(2):
        out = torch.full_like(there.query, torch.nan)
        attend_kernel_blocks(
            there.query, there.k_pages, there.v_pool,
            Fetched(fetched.rows.to(device), fetched.v_rows.to(device)), selected,
            there.block_table, there.seq_lens, case.scale, tokens, "clip", block_lse.to(device),
            out=out, clip=selection.clip, buffers=buffers, config=config,
        )  # fmt: skip
        assert_close(out.cpu(), expected)


def check_prefill_copies(shape: Shape, device: str = "cpu") -> None:
    """What is stored comes back; rows that the step itself writes are patched."""
    case = on(build_case(shape), device)
    table, num_heads = case.block_table, shape.num_kv_heads
    lengths = torch.tensor(shape.seq_lens, dtype=torch.int32, device=device)
    starts = torch.zeros_like(lengths)
    first_rows = torch.cat([starts[:1], lengths.cumsum(0).int()])
    out = torch.full((int(first_rows[-1]), num_heads, shape.head_size), float("nan"), device=device)
    gather_context(case.v_pool, table, starts, lengths, first_rows, int(lengths.max()), out, 3)
    expected = torch.cat(case.values).to(device)
    assert torch.equal(out, expected)

    request = max(range(len(shape.seq_lens)), key=lambda index: shape.seq_lens[index])
    page = int(table[request, 0])
    first_slot = page * shape.page_tokens
    slots = torch.tensor([first_slot + 2, -1, first_slot + 3], device=device)
    value = torch.randn(3, num_heads, shape.head_size, device=device)
    num_slots = case.v_pool.shape[0] * shape.page_tokens
    step_rows = torch.full((num_slots,), -1, dtype=torch.int32, device=device)
    step_rows[first_slot + 2], step_rows[first_slot + 3] = 0, 2
    patch_context(
        out, value, step_rows, table, starts, lengths, first_rows, int(lengths.max()),
        shape.page_tokens,
    )  # fmt: skip
    at = int(first_rows[request])
    expected[at + 2], expected[at + 3] = value[0], value[2]
    assert torch.equal(out, expected)

    pool = torch.zeros_like(case.v_pool)
    if device != "cpu":
        pool = pool.pin_memory()
    store_value(value, slots, pool)
    if device != "cpu":
        torch.cuda.synchronize()
    assert torch.equal(pool[page, :, 2], value[0].cpu())
    assert torch.equal(pool[page, :, 3], value[2].cpu())
    assert int((pool != 0).any(-1).sum()) == 2 * num_heads


def check_write_keeps_copies_fresh() -> None:
    """A copy in the hot cache follows every write, and is stale when the update is switched off."""
    for update in (True, False):
        case = build_case(SHAPES[0])
        shape, tokens = case.shape, case.shape.v_block_tokens
        rows = case.v_pool[..., 0].numel() // tokens
        cache = HotCache.make(64, 1, rows, tokens, shape.head_size, torch.float32, "cpu")
        cache.write_update = update
        selection = SELECTIONS[0]
        workspace = DecodeWorkspace.make(
            len(shape.seq_lens), shape.num_heads, shape.num_kv_heads, shape.head_size,
            shape.max_blocks, selection, "cpu",
        )  # fmt: skip
        out = torch.empty_like(case.query)
        arguments = (
            case.k_pages, case.v_pool, case.block_table, case.seq_lens, case.scale, tokens,
            shape.max_blocks, selection, "renormalize", cache, 0, out,
        )  # fmt: skip
        decode_step(workspace, case.query, *arguments)
        slot = case.block_table[0, 0].long() * shape.page_tokens + 1
        key = torch.randn(1, shape.num_kv_heads, shape.head_size)
        write_kv(key, 9 + key, slot[None], case.k_pages, case.v_pool, cache, 0)
        decode_step(workspace, case.query, *arguments)
        fresh = HotCache.make(64, 1, rows, tokens, shape.head_size, torch.float32, "cpu")
        expected = torch.empty_like(case.query)
        decode_step(workspace, case.query, *arguments[:-3], fresh, 0, expected)
        assert torch.equal(out, expected) == update, f"write_update={update}"


def main() -> None:
    """Every combination; any difference raises."""
    cases = 0
    for shape in SHAPES:
        for selection, tail in itertools.product(SELECTIONS, ("renormalize", "drop")):
            check_decode(build_case(shape), selection, 64, tail)
            cases += 1
        check_decode(build_case(shape), SELECTIONS[0], 2, "renormalize")
        check_prefill_copies(shape)
        cases += 2
    for selection in THRESHOLDS:
        check_select(selection)
        for shape, splits in itertools.product(CLIPPED_SHAPES, (1, 3)):
            check_clip(shape, selection, splits)
        cases += 5
    check_decode(build_case(SHAPES[0]), THRESHOLDS[0], 64, "clip")
    check_decode(build_case(SHAPES[2]), THRESHOLDS[1], 2, "clip")
    check_decode(build_case(SHAPES[0]), THRESHOLDS[2], 64, "renormalize")
    for selection in (SELECTIONS[2], Selection(None, None, 1, 1, "max", 0.02)):
        check_decode(build_case(SEVERAL_CHUNKS), selection, 256, "drop")
    cases += 5
    check_write_keeps_copies_fresh()
    print(f"{cases + 1} cases equal the reference")


if __name__ == "__main__":
    main()
