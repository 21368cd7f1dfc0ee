# SPDX-License-Identifier: Apache-2.0
"""Attend over the selected V blocks (Triton). Definition: reference/attend.py.

A list of selected blocks is dealt to `splits` programs in strides, by its length on the device.
Each leaves an unnormalised sum with its maximum and weight; the last of a list to finish adds
them up, so there is one launch whatever the split. Rows at `r >= 0` are read from GPU memory,
rows at `r <= -2` through mapped host memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_kcache.kernels.score import check_query_strides
from vllm_kcache.types import Fetched, Selected, Tail

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_share(
    q, k_pages, v_rows, rows, blocks, table_row, first, step, count, num_tokens, head_base, scale,
    host_distance, page_stride, GROUP_PADDED: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr, PAGE_TOKENS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    CHUNK_BLOCKS: tl.constexpr, VALUES_OF_16_BYTES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention over every `step`-th column of a list from `first`, in chunks.

    Returns the largest score [G] (base 2), the sum of exp2(score - largest) [G], and that sum
    weighted with V [G, D].
    """
    in_head = tl.arange(0, HEAD_PADDED)
    in_chunk = tl.arange(0, CHUNK_BLOCKS * BLOCK_TOKENS)
    in_block = in_chunk % BLOCK_TOKENS
    row_values: tl.constexpr = BLOCK_TOKENS * HEAD_SIZE
    largest = tl.full((GROUP_PADDED,), float("-inf"), tl.float32)
    weight = tl.zeros((GROUP_PADDED,), tl.float32)
    sums = tl.zeros((GROUP_PADDED, HEAD_PADDED), tl.float32)
    for start in range(first, count, step):
        column = start + in_chunk // BLOCK_TOKENS
        listed = column < count
        block = tl.load(blocks + column, mask=listed, other=0)
        row = tl.load(rows + column, mask=listed, other=0)
        token = block * BLOCK_TOKENS + in_block
        exists = listed & (token < num_tokens)
        page = tl.load(table_row + token // PAGE_TOKENS, mask=exists, other=0).to(tl.int64)
        k_offset = page * page_stride + head_base + (token % PAGE_TOKENS) * HEAD_SIZE
        mask = exists[:, None]
        if HEAD_SIZE != HEAD_PADDED:
            mask = mask & (in_head < HEAD_SIZE)[None, :]
        k = tl.load(k_pages + k_offset[:, None] + in_head[None, :], mask=mask, other=0.0)
        # One base pointer and a distance reach both memories. Both are aligned to 16 bytes, which
        # the compiler must know to load as much at once.
        here = row.to(tl.int64) * row_values
        host = host_distance * VALUES_OF_16_BYTES + (-2 - row).to(tl.int64) * row_values
        v_offset = tl.multiple_of(tl.where(row >= 0, here, host), VALUES_OF_16_BYTES)
        v_offset += in_block * HEAD_SIZE
        v = tl.load(v_rows + v_offset[:, None] + in_head[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        scores = tl.where(exists[None, :], scores, float("-inf"))
        # The first block of a chunk has at least one token, so the maximum is finite.
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        rescale = tl.exp2(largest - new_largest)
        weights = tl.exp2(scores - new_largest[:, None])
        weight = weight * rescale + tl.sum(weights, 1)
        sums = sums * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        largest = new_largest
    return largest, weight, sums


@triton.jit
def leave_part(partial_sums, partial_weights, part, largest, weight, sums, group_mask, in_head):
    """Store what `attend_share` returned; `part` is its place [G]."""
    tl.store(partial_weights + part * 2, largest, mask=group_mask)
    tl.store(partial_weights + part * 2 + 1, weight, mask=group_mask)
    places = part[:, None] * in_head.shape[0] + in_head[None, :]
    tl.store(partial_sums + places, sums, mask=group_mask[:, None])


@triton.jit
def add_parts(
    partial_sums, partial_weights, first_part, parts, group_mask, in_head,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, HEAD_PADDED: tl.constexpr,
):  # fmt: skip
    """What `attend_share` would have returned for all parts together."""
    in_group = tl.arange(0, GROUP_PADDED)
    largest = tl.full((GROUP_PADDED,), float("-inf"), tl.float32)
    weight = tl.zeros((GROUP_PADDED,), tl.float32)
    sums = tl.zeros((GROUP_PADDED, HEAD_PADDED), tl.float32)
    for other in range(parts):
        part = (first_part + other) * GROUP + in_group
        # Padding of the group gets a maximum of 0, which keeps its arithmetic finite.
        its_largest = tl.load(partial_weights + part * 2, mask=group_mask, other=0.0, volatile=True)
        its_weight = tl.load(
            partial_weights + part * 2 + 1, mask=group_mask, other=1.0, volatile=True
        )
        its_sums = tl.load(
            partial_sums + part[:, None] * HEAD_PADDED + in_head[None, :],
            mask=group_mask[:, None],
            other=0.0,
            volatile=True,
        )
        new_largest = tl.maximum(largest, its_largest)
        rescale = tl.exp2(largest - new_largest)
        its_rescale = tl.exp2(its_largest - new_largest)
        weight = weight * rescale + its_weight * its_rescale
        sums = sums * rescale[:, None] + its_sums * its_rescale[:, None]
        largest = new_largest
    return largest, weight, sums


@triton.jit
def weight_of_all(lse_rows, largest, num_blocks, group_mask, CHUNK: tl.constexpr):
    """Sum of exp2(score - largest) over all tokens of the request, from its blocks' scores."""
    weight = tl.zeros(largest.shape, tl.float32)
    for start in range(0, num_blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        lse = tl.load(
            lse_rows[:, None] + block[None, :],
            mask=group_mask[:, None] & (block < num_blocks)[None, :],
            other=float("-inf"),
        )
        weight += tl.sum(tl.exp2(lse * LOG2_E - largest[:, None]), 1)
    return weight


# Batch sizes and waves differ in these numbers only, and share one compiled kernel.
@triton.jit(do_not_specialize=["columns", "max_blocks", "first_head"])
def attend_kernel(
    query, k_pages, v_rows, rows, blocks, counts, block_table, seq_lens, block_lse, partial_sums,
    partial_weights, arrivals, out, scale, host_distance, query_stride, page_stride, table_stride,
    out_stride, columns, max_blocks, first_head,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, CHUNK_BLOCKS: tl.constexpr,
    SPLIT: tl.constexpr, DROP: tl.constexpr, LSE_CHUNK: tl.constexpr,
    VALUES_OF_16_BYTES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split, splits = tl.program_id(0), tl.num_programs(0)
    head = first_head + tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    # The list among all, and among those of this launch.
    list_id = request * NUM_KV_HEADS + head
    launch_list = request * tl.num_programs(1) + tl.program_id(1)
    num_tokens = tl.load(seq_lens + request)
    count = tl.load(counts + list_id)
    in_group = tl.arange(0, GROUP_PADDED)
    in_head = tl.arange(0, HEAD_PADDED)
    group_mask = in_group < GROUP
    heads = head * GROUP + in_group
    values_mask = group_mask[:, None] & (in_head < HEAD_SIZE)[None, :]
    values = heads[:, None] * HEAD_SIZE + in_head[None, :]
    q = tl.load(query + request * query_stride + values, mask=values_mask, other=0.0)
    largest, weight, sums = attend_share(
        q, k_pages, v_rows, rows + list_id * columns, blocks + list_id * columns,
        block_table + request * table_stride, split * CHUNK_BLOCKS, splits * CHUNK_BLOCKS, count,
        num_tokens, head.to(tl.int64) * (PAGE_TOKENS * HEAD_SIZE), scale, host_distance,
        page_stride, GROUP_PADDED, HEAD_SIZE, HEAD_PADDED, PAGE_TOKENS, BLOCK_TOKENS,
        CHUNK_BLOCKS, VALUES_OF_16_BYTES, PRECISION,
    )  # fmt: skip
    last = True
    if SPLIT:
        first_part = launch_list * splits
        if split * CHUNK_BLOCKS < count:
            part = (first_part + split) * GROUP + in_group
            leave_part(
                partial_sums, partial_weights, part, largest, weight, sums, group_mask, in_head
            )
        # All threads' stores come before the count of this program.
        tl.debug_barrier()
        last = tl.atomic_add(arrivals + launch_list, 1) == splits - 1
        if last:
            tl.store(arrivals + launch_list, 0)
            # Programs that had a share: the others left nothing.
            parts = tl.minimum(splits, tl.cdiv(count, CHUNK_BLOCKS))
            largest, weight, sums = add_parts(
                partial_sums, partial_weights, first_part, parts, group_mask, in_head,
                GROUP, GROUP_PADDED, HEAD_PADDED,
            )  # fmt: skip
    if last:
        if DROP:
            lse_rows = block_lse + (request * NUM_HEADS + heads) * max_blocks
            num_blocks = tl.cdiv(num_tokens, BLOCK_TOKENS)
            weight = weight_of_all(lse_rows, largest, num_blocks, group_mask, LSE_CHUNK)
        # A padded row has sums of 0 and gives 0.
        result = sums / tl.where(count > 0, weight, 1.0)[:, None]
        tl.store(
            out + request * out_stride + values, result.to(out.dtype.element_ty), mask=values_mask
        )


@dataclass(frozen=True)
class AttendConfig:
    """Launch shape: V blocks a program takes at once, programs for each list, warps, stages."""

    chunk_blocks: int
    splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttendBuffers:
    """Partial results of split lists. `arrivals` is zero between launches.

    Attributes:
        sums: [parts * G * next power of two of D] float32, GPU.
        weights: [parts * G * 2] float32, GPU. Maximum and weight.
        arrivals: [lists] int32, GPU.
    """

    sums: torch.Tensor
    weights: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def make(
        cls, num_lists: int, group: int, head_size: int, device: torch.device | str
    ) -> AttendBuffers:
        """Buffers for any launch of up to `num_lists` lists with `attend_config`'s splits."""
        parts = _most_parts(num_lists) * group
        return cls(
            torch.empty(parts * triton.next_power_of_2(head_size), device=device),
            torch.empty(parts * 2, device=device),
            torch.zeros(num_lists, dtype=torch.int32, device=device),
        )

    def check(self, num_lists: int, num_weights: int) -> None:
        """Raise ValueError unless a launch of so many lists and parts of heads fits."""
        if num_lists > self.arrivals.numel() or num_weights * 2 > self.weights.numel():
            raise ValueError(
                f"buffers: made for {self.arrivals.numel()} lists and {self.weights.numel() // 2} "
                f"parts of heads; this launch has {num_lists} and {num_weights}"
            )

    @staticmethod
    def bytes(num_lists: int, group: int, head_size: int) -> int:
        """GPU memory that `make` takes."""
        parts = _most_parts(num_lists) * group
        return parts * (triton.next_power_of_2(head_size) + 2) * 4 + num_lists * 4


# Lists differ in length by an order of magnitude: many programs, each a part of one, even that out.
TARGET_PROGRAMS = 1056
MAX_SPLITS = 32


def _most_parts(num_lists: int) -> int:
    """No launch of up to `num_lists` lists has more parts than this."""
    return TARGET_PROGRAMS + num_lists


def attend_config(
    num_lists: int, columns: int, head_size: int, itemsize: int, v_block_tokens: int
) -> AttendConfig:
    """Launch shape for `num_lists` lists of at most `columns` V blocks."""
    row_bytes = triton.next_power_of_2(head_size) * itemsize
    tokens = max(16, v_block_tokens, min(64, 16384 // row_bytes))
    chunk_blocks = tokens // v_block_tokens
    splits = min(
        MAX_SPLITS, -(-TARGET_PROGRAMS // max(1, num_lists)), -(-max(1, columns) // chunk_blocks)
    )
    return AttendConfig(chunk_blocks, max(1, splits), 4, 2)


def attend_blocks(
    query: torch.Tensor,
    k_pages: torch.Tensor,
    v_pool: torch.Tensor,
    fetched: Fetched,
    selected: Selected,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    v_block_tokens: int,
    tail: Tail,
    block_lse: torch.Tensor,
    v_page_means: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    buffers: AttendBuffers | None = None,
    config: AttendConfig | None = None,
    first_head: int = 0,
    last_head: int | None = None,
) -> torch.Tensor:
    """Softmax over the selected tokens and the product with V. See `ops.attend_blocks`.

    Args:
        buffers: from `AttendBuffers.make` for at least this many lists.
        config: launch shape, chosen by `attend_config` unless given.
        first_head, last_head: range of KV heads, without the last; None means all from the first.
    Graph-safe when `out` and `buffers` are given.
    """
    if tail == "mean":
        raise NotImplementedError(
            'kcache_config.tail="mean": not implemented on the GPU; use "renormalize" or "drop"'
        )
    num_requests, num_heads, head_size = query.shape
    _, num_kv_heads, page_tokens, _ = k_pages.shape
    check_query_strides(query)
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    last_head = num_kv_heads if last_head is None else last_head
    num_lists = num_requests * (last_head - first_head)
    if num_lists <= 0:
        return out
    group, columns = num_heads // num_kv_heads, selected.blocks.shape[2]
    if config is None:
        config = attend_config(num_lists, columns, head_size, query.element_size(), v_block_tokens)
    if buffers is None:
        buffers = AttendBuffers.make(num_lists, group, head_size, query.device)
    buffers.check(num_lists, num_lists * config.splits * group)
    distance = v_pool.data_ptr() - fetched.v_rows.data_ptr()
    if distance % 16:
        raise ValueError("v_pool and fetched.v_rows: must be aligned to 16 bytes")
    attend_kernel[(config.splits, last_head - first_head, num_requests)](
        query, k_pages, fetched.v_rows, fetched.rows, selected.blocks, selected.counts,
        block_table, seq_lens, block_lse, buffers.sums, buffers.weights, buffers.arrivals, out,
        scale, distance // 16, query.stride(0), k_pages.stride(0), block_table.stride(0),
        out.stride(0), columns, block_lse.shape[2], first_head,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, GROUP=group, GROUP_PADDED=16,
        HEAD_SIZE=head_size, HEAD_PADDED=triton.next_power_of_2(head_size),
        PAGE_TOKENS=page_tokens, BLOCK_TOKENS=v_block_tokens, CHUNK_BLOCKS=config.chunk_blocks,
        SPLIT=config.splits > 1, DROP=tail == "drop", LSE_CHUNK=128,
        VALUES_OF_16_BYTES=16 // query.element_size(),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
