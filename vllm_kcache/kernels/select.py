# SPDX-License-Identifier: Apache-2.0
"""Choose the V blocks to attend, without a sort. Definition: reference/select.py.

The blocks kept are those whose (mass, then lower block) is at least that of one block, the last
in. It is found by halving: the bits of a mass, as an integer, order like the mass. Masses are
added up as integers of 2^-30: the sum does not depend on the order, so the Triton kernel here and
csrc/select.cu agree.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from vllm_kcache.cache.hot_cache import (
    COUNTER_NAMES,
    DROPPED_MASS_BUCKETS,
    FIRST_DROPPED_BUCKET,
    HotCache,
)
from vllm_kcache.kernels import extension
from vllm_kcache.types import Selected, Selection

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FIXED_POINT_ONE = tl.constexpr(float(1 << 30))
FORCED_KEY = tl.constexpr(0x7F000000)  # above the bits of any mass
_MOST_INT32 = 2**31 - 1
# Of csrc/select.cuh: bins of a sum, and words of all histograms at least; what a list takes beside
# them and its masses; and the check of csrc/bindings.cpp.
_BINS, _LEAST_WORDS, _OTHER_SHARED_BYTES, _MOST_BLOCKS = 256, 1024, 7168, 49152
_LISTS = tl.constexpr(COUNTER_NAMES.index("lists"))
_SELECTED = tl.constexpr(COUNTER_NAMES.index("selected"))
_FIRST_DROPPED = tl.constexpr(FIRST_DROPPED_BUCKET)
_BUCKETS = tl.constexpr(DROPPED_MASS_BUCKETS)


@triton.jit
def block_masses(lse_rows, shift, block, num_blocks, GROUP, in_group):
    """Masses [G, chunk] of the chunk `block` of V blocks, 0 past `num_blocks`."""
    lse = tl.load(
        lse_rows[:, None] + block[None, :],
        mask=(in_group < GROUP)[:, None] & (block < num_blocks)[None, :],
        other=float("-inf"),
    )
    return tl.exp2(lse * LOG2_E - shift[:, None])


@triton.jit
def head_shifts(lse_rows, num_blocks, in_group, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """Each query head's log-sum-exp over the request, base 2; 0 for padding of the group."""
    largest = tl.full(in_group.shape, float("-inf"), tl.float32)
    total = tl.zeros(in_group.shape, tl.float32)
    for start in range(0, num_blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        lse = tl.load(
            lse_rows[:, None] + block[None, :],
            mask=(in_group < GROUP)[:, None] & (block < num_blocks)[None, :],
            other=float("-inf"),
        )
        lse = lse * LOG2_E
        new_largest = tl.maximum(largest, tl.max(lse, 1))
        # Padding of the group has only -inf.
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp2(largest - base) + tl.sum(tl.exp2(lse - base[:, None]), 1)
        largest = new_largest
    return tl.where(in_group < GROUP, tl.log2(total) + largest, 0.0)


@triton.jit
def rank_blocks(
    lse_rows, keys, shift, num_blocks, sink_blocks, first_recent, in_group,
    GROUP: tl.constexpr, MAX: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Store the key of each block; returns all mass [G] in fixed point, which coverage is of."""
    totals = tl.zeros(in_group.shape, tl.int32)
    for start in range(0, num_blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        masses = block_masses(lse_rows, shift, block, num_blocks, GROUP, in_group)
        if MAX:
            combined = tl.max(masses, 0)
            fixed = (masses * FIXED_POINT_ONE + 0.5).to(tl.int32)
        else:
            combined = tl.sum(masses, 0) / GROUP
            fixed = (combined * FIXED_POINT_ONE + 0.5).to(tl.int32)
            fixed = tl.broadcast_to(fixed[None, :], masses.shape)
        totals += tl.sum(fixed, 1)
        forced = (block < sink_blocks) | (block >= first_recent)
        key = tl.where(forced, FORCED_KEY, combined.to(tl.int32, bitcast=True))
        tl.store(keys + block, key, mask=block < num_blocks)
    tl.debug_barrier()
    return totals


@triton.jit
def suffices(
    keys, lse_rows, shift, totals, num_blocks, least_key, last_tie, cap, num_forced, coverage,
    in_group, GROUP: tl.constexpr, MAX: tl.constexpr, COVER: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Whether blocks with a key above `least_key`, or equal up to `last_tie`, suffice."""
    count = 0
    covered = tl.zeros(in_group.shape, tl.int32)
    for start in range(0, num_blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        key = tl.load(keys + block, mask=block < num_blocks, other=-1)
        kept = (key > least_key) | ((key == least_key) & (block <= last_tie))
        count += tl.sum(kept.to(tl.int32), 0)
        if COVER:
            mass = block_masses(lse_rows, shift, block, num_blocks, GROUP, in_group)
            if not MAX:
                mass = tl.broadcast_to((tl.sum(mass, 0) / GROUP)[None, :], mass.shape)
            fixed = (mass * FIXED_POINT_ONE + 0.5).to(tl.int32)
            covered += tl.sum(tl.where(kept[None, :], fixed, 0), 1)
    enough = count >= cap
    if COVER:
        met = (covered.to(tl.float32) >= coverage * totals.to(tl.float32)) | (in_group >= GROUP)
        enough = enough | ((count >= num_forced) & (tl.min(met.to(tl.int32), 0) == 1))
    return enough


@triton.jit
def last_kept(
    keys, lse_rows, shift, totals, num_blocks, cap, num_forced, coverage, in_group,
    GROUP: tl.constexpr, MAX: tl.constexpr, COVER: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Key of the last block kept, and the last block kept of those with that key."""
    # The largest key with which the blocks above and at it suffice; bit by bit from the top.
    least_key = tl.full((), 0, tl.int32)
    bit = tl.full((), 1 << 30, tl.int32)
    while bit > 0:
        tried = least_key | bit
        if suffices(
            keys, lse_rows, shift, totals, num_blocks, tried, num_blocks, cap, num_forced,
            coverage, in_group, GROUP, MAX, COVER, CHUNK,
        ):  # fmt: skip
            least_key = tried
        bit = bit >> 1
    # Of the ties at that key, the lowest blocks that suffice.
    low = tl.full((), 0, tl.int32)
    high = tl.maximum(num_blocks - 1, 0)
    while low < high:
        middle = (low + high) // 2
        if suffices(
            keys, lse_rows, shift, totals, num_blocks, least_key, middle, cap, num_forced,
            coverage, in_group, GROUP, MAX, COVER, CHUNK,
        ):  # fmt: skip
            high = middle
        else:
            low = middle + 1
    return least_key, low


@triton.jit
def write_list(
    out, columns, keys, lse_rows, shift, num_blocks, least_key, last_tie, in_group,
    GROUP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the kept blocks in ascending order, then -1; returns their number and mass [G]."""
    count = tl.full((), 0, tl.int32)
    covered = tl.zeros(in_group.shape, tl.float32)
    for start in range(0, num_blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        key = tl.load(keys + block, mask=block < num_blocks, other=-1)
        kept = (key > least_key) | ((key == least_key) & (block <= last_tie))
        place = count + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(out + place, block, mask=kept & (place < columns))
        count += tl.sum(kept.to(tl.int32), 0)
        masses = block_masses(lse_rows, shift, block, num_blocks, GROUP, in_group)
        covered += tl.sum(tl.where(kept[None, :], masses, 0.0), 1)
    for start in range(0, columns, CHUNK):
        place = start + tl.arange(0, CHUNK)
        beyond = (place >= count) & (place < columns)
        tl.store(out + place, tl.full((CHUNK,), -1, tl.int32), mask=beyond)
    return count, covered


@triton.jit(
    do_not_specialize=[
        "top_n",
        "sink_blocks",
        "recent_tokens",
        "max_blocks",
        "columns",
        "first_head",
    ]
)
def select_kernel(
    block_lse, seq_lens, scratch, blocks, counts, mass_out, lse_out, counters, top_n, coverage,
    mass_threshold, sink_blocks, recent_tokens, max_blocks, columns, first_head,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, MAX: tl.constexpr, COVER: tl.constexpr, THRESHOLD: tl.constexpr,
    CHUNK: tl.constexpr, WRITE_LSE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    head = first_head + tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    list_id = request * NUM_KV_HEADS + head
    num_tokens = tl.load(seq_lens + request)
    num_blocks = tl.cdiv(num_tokens, BLOCK_TOKENS)
    in_group = tl.arange(0, GROUP_PADDED)
    lse_rows = block_lse + (list_id * GROUP + in_group) * max_blocks
    keys = scratch + list_id * max_blocks
    shift = head_shifts(lse_rows, num_blocks, in_group, GROUP, CHUNK)
    if WRITE_LSE:
        tl.store(lse_out + list_id * GROUP + in_group, shift * LN_2, mask=in_group < GROUP)
    first_recent = tl.maximum(num_tokens - recent_tokens, 0) // BLOCK_TOKENS
    sinks = tl.minimum(sink_blocks, num_blocks)
    num_forced = sinks + num_blocks - first_recent - tl.maximum(sinks - first_recent, 0)
    totals = rank_blocks(
        lse_rows, keys, shift, num_blocks, sink_blocks, first_recent, in_group, GROUP, MAX, CHUNK
    )
    cap = tl.minimum(top_n, num_blocks)
    search = True
    least_key = tl.full((), 0, tl.int32)
    last_tie = num_blocks
    if THRESHOLD:
        # All ties at the threshold are kept, unless that is more than the cap.
        least_key = tl.full((), mass_threshold, tl.float32).to(tl.int32, bitcast=True)
        search = suffices(
            keys, lse_rows, shift, totals, num_blocks, least_key, num_blocks, cap + 1, num_forced,
            coverage, in_group, GROUP, MAX, False, CHUNK,
        )  # fmt: skip
    if search:
        least_key, last_tie = last_kept(
            keys, lse_rows, shift, totals, num_blocks, cap, num_forced, coverage, in_group,
            GROUP, MAX, COVER, CHUNK,
        )  # fmt: skip
    count, covered = write_list(
        blocks + list_id * columns, columns, keys, lse_rows, shift, num_blocks, least_key,
        last_tie, in_group, GROUP, CHUNK,
    )  # fmt: skip
    if MAX:
        mass = tl.min(tl.where(in_group < GROUP, covered, 1.0), 0)
    else:
        mass = tl.sum(tl.where(in_group < GROUP, covered, 0.0), 0) / GROUP
    mass = tl.where(num_tokens > 0, tl.minimum(mass, 1.0), 1.0)
    tl.store(counts + list_id, count)
    tl.store(mass_out + list_id, mass)
    if COUNT:  # noqa: SIM102  (one is known when compiling, the other is not)
        if num_tokens > 0:
            tl.atomic_add(counters + _LISTS, tl.full((), 1, tl.int64))
            tl.atomic_add(counters + _SELECTED, count.to(tl.int64))
            bucket = dropped_bucket(1.0 - mass)
            tl.atomic_add(counters + _FIRST_DROPPED + bucket, tl.full((), 1, tl.int64))


@triton.jit
def dropped_bucket(dropped):
    """Bucket of a dropped mass: edges from 1e-4 to 1, evenly spaced in the logarithm."""
    log10 = tl.log2(tl.maximum(dropped, 1e-30)) * 0.30102999566
    bucket = tl.ceil((log10 + 4.0) * ((_BUCKETS - 1) / 4.0)).to(tl.int32)
    return tl.minimum(tl.maximum(bucket, 0), _BUCKETS - 1)


def select_blocks(
    block_lse: torch.Tensor,
    seq_lens: torch.Tensor,
    num_kv_heads: int,
    v_block_tokens: int,
    selection: Selection,
    out: Selected | None = None,
) -> Selected:
    """Choose V blocks. See `ops.select_blocks`. Graph-safe when `out` is given, except that the
    Triton kernel allocates its scratch."""
    num_requests, _, max_blocks = block_lse.shape
    made = out
    if made is None:
        columns = max_blocks if selection.top_n is None else min(selection.top_n, max_blocks)
        shape = (num_requests, num_kv_heads)
        made = Selected(
            seq_lens.new_empty((*shape, columns)),
            seq_lens.new_empty(shape),
            block_lse.new_empty(shape),
            None if selection.clip is None else block_lse.new_empty(block_lse.shape[:2]),
        )
    if num_requests:
        launch_select(block_lse, seq_lens, v_block_tokens, selection, made)
    if out is None:
        width = int(made.counts.max()) if num_requests else 0
        made = replace(made, blocks=made.blocks[..., :width].contiguous())
    return made


def launch_select(
    block_lse: torch.Tensor,
    seq_lens: torch.Tensor,
    v_block_tokens: int,
    selection: Selection,
    out: Selected,
    *,
    first_head: int = 0,
    num_heads: int | None = None,
    scratch: torch.Tensor | None = None,
    hot_cache: HotCache | None = None,
    chunk_lse: torch.Tensor | None = None,
    chunk_blocks: int = 1,
) -> None:
    """Select for a range of KV heads, on the current stream.

    Args:
        out: written, its lse too when it has one.
        scratch: [B, Hkv, P] int32, GPU: only the Triton kernel needs it, and makes it if not given.
        hot_cache: its counters take the lists and the dropped mass.
        chunk_lse: [B, Hq, C] float32, GPU: what scoring left of each chunk (kernels/score.py). The
            extension then need not read all scores for their sum; the Triton kernel reads them.
        chunk_blocks: V blocks of a chunk.
    """
    num_requests, num_heads_all, max_blocks = block_lse.shape
    _, num_kv_heads, columns = out.blocks.shape
    num_heads = num_kv_heads - first_head if num_heads is None else num_heads
    if num_requests == 0 or num_heads == 0:
        return
    if extension.available():
        torch.ops.kcache.select_blocks(
            block_lse,
            seq_lens,
            v_block_tokens,
            *selection_arguments(selection),
            first_head,
            num_heads,
            out.blocks,
            out.counts,
            out.mass,
            out.lse,
            hot_cache.counters if hot_cache is not None else None,
            chunk_lse,
            chunk_blocks,
        )
        return
    if scratch is None:
        scratch = seq_lens.new_empty((num_requests, num_kv_heads, max_blocks))
    select_kernel[(num_heads, num_requests)](
        block_lse,
        seq_lens,
        scratch,
        out.blocks,
        out.counts,
        out.mass,
        out.lse if out.lse is not None else out.mass,
        hot_cache.counters if hot_cache is not None else out.counts,
        max_blocks if selection.top_n is None else selection.top_n,
        2.0 if selection.coverage is None else selection.coverage,
        2.0 if selection.mass_threshold is None else selection.mass_threshold,
        selection.sink_blocks,
        selection.recent_tokens,
        max_blocks,
        columns,
        first_head,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads_all // num_kv_heads,
        GROUP_PADDED=triton.next_power_of_2(num_heads_all // num_kv_heads),
        BLOCK_TOKENS=v_block_tokens,
        MAX=selection.combine == "max",
        COVER=selection.coverage is not None,
        THRESHOLD=selection.mass_threshold is not None,
        CHUNK=1024,
        WRITE_LSE=out.lse is not None,
        COUNT=hot_cache is not None,
        num_warps=8,
    )


def selection_arguments(selection: Selection) -> tuple[int, float, float, int, int, bool]:
    """The rule as the extension takes it: top_n, coverage and mass_threshold are -1 for none."""
    return (
        -1 if selection.top_n is None else min(selection.top_n, _MOST_INT32),
        -1.0 if selection.coverage is None else selection.coverage,
        -1.0 if selection.mass_threshold is None else selection.mass_threshold,
        min(selection.sink_blocks, _MOST_INT32),
        min(selection.recent_tokens, _MOST_INT32),
        selection.combine == "max",
    )


def most_blocks(selection: Selection, group: int, shared_bytes: int) -> int:
    """V blocks of a request that the extension can select from: a list's masses lie in shared
    memory (csrc/select.cuh).

    Args:
        group: query heads of a KV head.
        shared_bytes: that a thread block of the GPU may have.
    """
    sums = 0
    if selection.coverage is not None:
        sums = group if selection.combine == "max" else 1
    histogram = max(_BINS * (1 + sums), _LEAST_WORDS)
    room = (shared_bytes - _OTHER_SHARED_BYTES) // 4 - histogram - 1  # which is aligned
    return min(_MOST_BLOCKS, room * 32 // 33)  # with a bit of each block
