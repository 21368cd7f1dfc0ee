# SPDX-License-Identifier: Apache-2.0
"""Move V between the host pool and contiguous GPU memory for prefill (Triton).

A prefill reads all V before it and leaves all V of its own: whole pages, in order, over a stream of
its own beside the computation. Few persistent programs fill the link and leave the multiprocessors
to the matrix products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Enough to fill PCIe 5 x16 with rows of 2 KiB and more, few enough to leave the GPU to others.
LINK_PROGRAMS = 32
GPU_PROGRAMS = 528
# Bytes that a program has in flight: with one head of a page (4 KiB) the link ran at half speed.
RUN_BYTES = 16384


@triton.jit(do_not_specialize=["num_requests", "max_length"])
def gather_kernel(
    pages,
    page_table,
    starts,
    lengths,
    first_rows,
    out,
    page_stride,
    table_stride,
    num_requests,
    max_length,
    NUM_HEADS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    RUN_TOKENS: tl.constexpr,
):
    # One item is one head of RUN_TOKENS tokens: all of its loads are in flight at once, and few
    # programs must keep the link busy.
    runs = tl.cdiv(max_length, RUN_TOKENS)
    total = num_requests * runs * NUM_HEADS
    in_head = tl.arange(0, HEAD_PADDED)
    offsets = tl.arange(0, RUN_TOKENS)
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        head = item % NUM_HEADS
        token = (item // NUM_HEADS) % runs * RUN_TOKENS + offsets
        request = item // (NUM_HEADS * runs)
        length = tl.load(lengths + request)
        if (item // NUM_HEADS) % runs * RUN_TOKENS < length:
            exists = token < length
            page = (tl.load(starts + request) + token) // PAGE_TOKENS
            page_ids = tl.load(page_table + request * table_stride + page, mask=exists, other=0)
            source = (
                page_ids.to(tl.int64) * page_stride
                + (head * PAGE_TOKENS + token % PAGE_TOKENS) * HEAD_SIZE
            )
            row = tl.load(first_rows + request).to(tl.int64) + token
            mask = exists[:, None] & (in_head < HEAD_SIZE)[None, :]
            values = tl.load(pages + source[:, None] + in_head[None, :], mask=mask)
            target = (row * NUM_HEADS + head) * HEAD_SIZE
            tl.store(out + target[:, None] + in_head[None, :], values, mask=mask)


@triton.jit
def patch_kernel(
    out,
    value,
    step_rows,
    page_table,
    starts,
    lengths,
    first_rows,
    table_stride,
    value_stride,
    NUM_HEADS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
):
    page = tl.program_id(0)
    request = tl.program_id(1)
    length = tl.load(lengths + request)
    if page * PAGE_TOKENS >= length:
        return
    first_page = tl.load(starts + request) // PAGE_TOKENS
    page_id = tl.load(page_table + request * table_stride + first_page + page).to(tl.int64)
    first_row = tl.load(first_rows + request).to(tl.int64) + page * PAGE_TOKENS
    in_head = tl.arange(0, HEAD_PADDED)
    for offset in range(PAGE_TOKENS):
        token = tl.load(step_rows + page_id * PAGE_TOKENS + offset)
        if (token >= 0) & (page * PAGE_TOKENS + offset < length):
            for head in range(NUM_HEADS):
                values = tl.load(
                    value + token.to(tl.int64) * value_stride + head * HEAD_SIZE + in_head,
                    mask=in_head < HEAD_SIZE,
                )
                target = ((first_row + offset) * NUM_HEADS + head) * HEAD_SIZE
                tl.store(out + target + in_head, values, mask=in_head < HEAD_SIZE)


@triton.jit(do_not_specialize=["num_tokens"])
def store_kernel(
    value,
    slot_mapping,
    v_pool,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    GROUP_TOKENS: tl.constexpr,
):
    # One item is one head of GROUP_TOKENS tokens: mostly one run of a page.
    in_head = tl.arange(0, HEAD_PADDED)
    total = tl.cdiv(num_tokens, GROUP_TOKENS) * NUM_HEADS
    page_values: tl.constexpr = NUM_HEADS * PAGE_TOKENS * HEAD_SIZE
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        head = item % NUM_HEADS
        token = (item // NUM_HEADS) * GROUP_TOKENS + tl.arange(0, GROUP_TOKENS)
        place = tl.load(slot_mapping + token, mask=token < num_tokens, other=-1).to(tl.int64)
        mask = (place >= 0)[:, None] & (in_head < HEAD_SIZE)[None, :]
        source = (token.to(tl.int64) * NUM_HEADS + head) * HEAD_SIZE
        values = tl.load(value + source[:, None] + in_head[None, :], mask=mask)
        target = (place // PAGE_TOKENS) * page_values + (
            head * PAGE_TOKENS + place % PAGE_TOKENS
        ) * HEAD_SIZE
        tl.store(v_pool + target[:, None] + in_head[None, :], values, mask=mask)


def gather_context(
    pages: torch.Tensor,
    page_table: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    first_rows: torch.Tensor,
    max_length: int,
    out: torch.Tensor,
    num_programs: int,
) -> None:
    """Copy runs of paged K or V, one for each request, into contiguous rows.

    Args:
        pages: [M, Hkv, S, D] model dtype: K pages (GPU) or one layer of the host pool (mapped).
        page_table: [R, MB] int32, GPU. Page ids of each request.
        starts: [R] int32, GPU. First token of the run, a multiple of S.
        lengths: [R] int32, GPU. Tokens of the run; 0 for none.
        first_rows: [R] int32, GPU. Row of `out` where the run begins.
        max_length: longest run, tokens (host).
        out: [rows, Hkv, D] model dtype, GPU. Rows outside the runs are left alone.
        num_programs: persistent programs; `LINK_PROGRAMS` when `pages` is in host memory.
    """
    num_requests = page_table.shape[0]
    _, num_heads, page_tokens, head_size = pages.shape
    if num_requests == 0 or max_length == 0:
        return
    head_padded = triton.next_power_of_2(head_size)
    gather_kernel[(num_programs,)](
        pages,
        page_table,
        starts,
        lengths,
        first_rows,
        out,
        pages.stride(0),
        page_table.stride(0),
        num_requests,
        max_length,
        NUM_HEADS=num_heads,
        PAGE_TOKENS=page_tokens,
        HEAD_SIZE=head_size,
        HEAD_PADDED=head_padded,
        RUN_TOKENS=max(16, RUN_BYTES // (head_padded * pages.element_size())),
        num_warps=4,
    )


def patch_context(
    out: torch.Tensor,
    value: torch.Tensor,
    step_rows: torch.Tensor,
    page_table: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    first_rows: torch.Tensor,
    max_length: int,
    page_tokens: int,
) -> None:
    """Overwrite gathered V rows that this very step is writing.

    Two prompts of one step may share pages: the second then reads as context what the first
    computes in the same step, and the copy to the host pool may still be under way.

    Args:
        out: [rows, Hkv, D] model dtype, GPU, from `gather_context`.
        value: [tokens, Hkv, D] model dtype, GPU. V of the step; strided over tokens.
        step_rows: [M * S] int32, GPU. Token of the step that writes a slot, or -1.
        page_table, starts, lengths, first_rows, max_length: as for `gather_context`.
        page_tokens: S.
    """
    num_requests = page_table.shape[0]
    _, num_heads, head_size = out.shape
    max_pages = -(-max_length // page_tokens)
    if num_requests == 0 or max_pages == 0:
        return
    patch_kernel[(max_pages, num_requests)](
        out,
        value,
        step_rows,
        page_table,
        starts,
        lengths,
        first_rows,
        page_table.stride(0),
        value.stride(0),
        NUM_HEADS=num_heads,
        PAGE_TOKENS=page_tokens,
        HEAD_SIZE=head_size,
        HEAD_PADDED=triton.next_power_of_2(head_size),
        num_warps=1,
    )


def store_value(value: torch.Tensor, slot_mapping: torch.Tensor, v_pool: torch.Tensor) -> None:
    """Write V of a step's tokens to the host pool with few programs, on the current stream.

    Args:
        value: [tokens, Hkv, D] model dtype, GPU, contiguous.
        slot_mapping: [tokens] int64, GPU; -1 is padding.
        v_pool: [M, Hkv, S, D] model dtype, host (mapped).
    """
    num_tokens, num_heads, head_size = value.shape
    if num_tokens == 0:
        return
    store_kernel[(LINK_PROGRAMS,)](
        value,
        slot_mapping,
        v_pool,
        num_tokens,
        NUM_HEADS=num_heads,
        PAGE_TOKENS=v_pool.shape[2],
        HEAD_SIZE=head_size,
        HEAD_PADDED=triton.next_power_of_2(head_size),
        GROUP_TOKENS=16,
        num_warps=4,
    )
