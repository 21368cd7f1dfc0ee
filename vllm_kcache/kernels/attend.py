# SPDX-License-Identifier: Apache-2.0
"""Attend over the selected V blocks (Triton; rows of int8 in csrc/attend.cu). Definition:
reference/attend.py.

K is read from the pages, or with K codes in the pages from the rows, beside V.

A list of selected blocks is dealt to `splits` programs in strides, by its length on the device.
Each leaves an unnormalised sum with its maximum and weight; the last of a list to finish adds
them up, so there is one launch whatever the split. Rows at `r >= 0` are read from GPU memory,
rows at `r <= -2` through mapped host memory.

With the tail "clip" the denominator is known beforehand. Each query head then has two rows of
results, one weighted with its probabilities and one with those cut at the clip; the rows that pad a
group for the tensor cores take them at no cost.

A learned sink (reference/sinks.py) joins the denominator where the sums of a list are complete.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_kcache.cache.hot_cache import EPOCH, ESTIMATE_ERROR_EDGES, FIRST_ESTIMATE_BUCKET
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels.attend_plan import (
    MAX_SPLITS,
    AttendConfig,
    RowsConfig,
    attend_config,
    on_tensor_cores,
    rows_config,
)
from vllm_kcache.kernels.dependent import gdc_wait
from vllm_kcache.kernels.score import (
    cap_scores,
    check_query_strides,
    is_first_program,
    lse_by_block,
)
from vllm_kcache.kernels.workspace import DecodeBatch, DecodeWorkspace, front
from vllm_kcache.types import Selected

LOG2_E = tl.constexpr(1.4426950408889634)
# With the tail "clip", probabilities are counted in units of 2^-15: no maximum scales them up, and
# small ones would lose bits in float16, which holds 2^15. Of rows selected by estimates a weight
# may be above 1, as often as the estimate was below the score: there the unit is 2^-7, which leaves
# float16 room for a weight of 500.
UNIT_BITS, ONE = tl.constexpr(15.0), tl.constexpr(float(1 << 15))
ESTIMATED_UNIT_BITS, ESTIMATED_ONE = tl.constexpr(7.0), tl.constexpr(float(1 << 7))
# More tokens than any request has.
NO_LENGTH = 1e30
# Where K of a selected token lies: in its page, in its row as the model's dtype, or as int8.
K_IN_PAGE, K_IN_ROW, K_INT8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_MOST_PARTS = tl.constexpr(MAX_SPLITS)
_EPOCH = tl.constexpr(EPOCH)
# Of so many launches one looks at how far estimates are off: every few steps of a model, and as
# often in each of its layers.
ESTIMATES_EVERY = 64
_FIRST_ESTIMATE_BUCKET = tl.constexpr(FIRST_ESTIMATE_BUCKET)
_ESTIMATE_BUCKETS = tl.constexpr(len(ESTIMATE_ERROR_EDGES))
_ESTIMATE_EDGES = tl.constexpr(ESTIMATE_ERROR_EDGES)
_TRITON_DTYPES = {
    torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16
}  # fmt: skip
# Parts whose loads are in flight at once while they are added up.
_AHEAD = tl.constexpr(4)


@triton.jit
def load_query(
    query, query_bias, request, heads, group_mask, query_stride, NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Query [G, D] of some heads of a request in the form that rows are scored with, and what its
    score adds to each [G]."""
    in_head = tl.arange(0, HEAD_PADDED)
    mask = group_mask[:, None] & (in_head < HEAD_SIZE)[None, :]
    values = heads[:, None] * HEAD_SIZE + in_head[None, :]
    q = tl.load(query + request * query_stride + values, mask=mask, other=0.0)
    bias = tl.zeros(heads.shape, tl.float32)
    if KEYS == K_INT8:
        bias = tl.load(query_bias + request * NUM_HEADS + heads, mask=group_mask, other=0.0)
    return q, bias


@triton.jit
def read_chunk(
    q, bias, k_pages, row_values, row_scales, rows, blocks, table_row, start, count, num_tokens,
    head_base, scale, host_distance, page_stride, HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr, PAGE_TOKENS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    CHUNK_BLOCKS: tl.constexpr, ROW_VALUES: tl.constexpr, VALUES_OF_16_BYTES: tl.constexpr,
    PRECISION: tl.constexpr, KEYS: tl.constexpr, SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """Columns of a list from `start`: scores [G, tokens], base 2, -inf where there is no token;
    V [tokens, D] as its row has it, and V's scales [tokens], of rows of int8 only."""
    in_head = tl.arange(0, HEAD_PADDED)
    in_chunk = tl.arange(0, CHUNK_BLOCKS * BLOCK_TOKENS)
    in_block = in_chunk % BLOCK_TOKENS
    part_values: tl.constexpr = BLOCK_TOKENS * HEAD_SIZE
    column = start + in_chunk // BLOCK_TOKENS
    listed = column < count
    block = tl.load(blocks + column, mask=listed, other=0)
    row = tl.load(rows + column, mask=listed, other=0)
    token = block * BLOCK_TOKENS + in_block
    exists = listed & (token < num_tokens)
    mask = exists[:, None]
    if HEAD_SIZE != HEAD_PADDED:
        mask = mask & (in_head < HEAD_SIZE)[None, :]
    # One base pointer and a distance reach both memories. Both are aligned to 16 bytes, which the
    # compiler must know to load as much at once.
    here = row.to(tl.int64) * ROW_VALUES
    # Triton passes small distances as int32: widen before multiplying.
    host = host_distance.to(tl.int64) * VALUES_OF_16_BYTES
    host += (-2 - row).to(tl.int64) * ROW_VALUES
    row_offset = tl.multiple_of(tl.where(row >= 0, here, host), VALUES_OF_16_BYTES)
    offset = row_offset + in_block * HEAD_SIZE
    if KEYS == K_IN_PAGE:
        page = tl.load(table_row + token // PAGE_TOKENS, mask=exists, other=0).to(tl.int64)
        k_offset = page * page_stride + head_base + (token % PAGE_TOKENS) * HEAD_SIZE
        k = tl.load(k_pages + k_offset[:, None] + in_head[None, :], mask=mask, other=0.0)
    else:
        k = tl.load(row_values + offset[:, None] + in_head[None, :], mask=mask, other=0)
        offset += part_values
    v = tl.load(row_values + offset[:, None] + in_head[None, :], mask=mask, other=0)
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * (scale * LOG2_E)
    v_scale = tl.zeros(in_chunk.shape, tl.float16)
    if KEYS == K_INT8:
        # Scales are float16, two bytes each where a value has one.
        at = row_offset // 2 + part_values + in_block
        k_scale = tl.load(row_scales + at, mask=exists, other=0.0).to(tl.float32)
        v_scale = tl.load(row_scales + at + BLOCK_TOKENS, mask=exists, other=0.0)
        scores = scores * k_scale[None, :] + (bias * LOG2_E)[:, None]
    scores = cap_scores(scores, SOFT_CAP)
    return tl.where(exists[None, :], scores, float("-inf")), v, v_scale


@triton.jit
def attend_share(
    q, bias, k_pages, row_values, row_scales, rows, blocks, table_row, first, step, count,
    num_tokens, head_base, scale, host_distance, page_stride, shift, limit,
    GROUP_PADDED: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, CHUNK_BLOCKS: tl.constexpr,
    ROW_VALUES: tl.constexpr, VALUES_OF_16_BYTES: tl.constexpr, PRECISION: tl.constexpr,
    CLIP: tl.constexpr, KEYS: tl.constexpr, V_DTYPE: tl.constexpr, SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """Attention over every `step`-th column of a list from `first`, in chunks.

    Returns the largest score [G] (base 2), the sum of exp2(score - largest) [G], and that sum
    weighted with V [G, D]. With CLIP the weights are min(exp2(score - shift), limit) instead, both
    [G], and the largest score is 0.
    """
    largest = tl.full((GROUP_PADDED,), 0.0 if CLIP else float("-inf"), tl.float32)
    weight = tl.zeros((GROUP_PADDED,), tl.float32)
    sums = tl.zeros((GROUP_PADDED, HEAD_PADDED), tl.float32)
    for start in range(first, count, step):
        scores, v, v_scale = read_chunk(
            q, bias, k_pages, row_values, row_scales, rows, blocks, table_row, start, count,
            num_tokens, head_base, scale, host_distance, page_stride, HEAD_SIZE, HEAD_PADDED,
            PAGE_TOKENS, BLOCK_TOKENS, CHUNK_BLOCKS, ROW_VALUES, VALUES_OF_16_BYTES, PRECISION,
            KEYS, SOFT_CAP,
        )  # fmt: skip
        if CLIP:
            # A NaN must not be hidden by the clip.
            weights = tl.minimum(
                tl.exp2(scores - shift[:, None]), limit[:, None], tl.PropagateNan.ALL
            )
            weight += tl.sum(weights, 1)
        else:
            # The first block of a chunk has at least one token, so the maximum is finite.
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            rescale = tl.exp2(largest - new_largest)
            weights = tl.exp2(scores - new_largest[:, None])
            weight = weight * rescale + tl.sum(weights, 1)
            sums = sums * rescale[:, None]
            largest = new_largest
        if KEYS == K_INT8:
            v = v.to(V_DTYPE) * v_scale.to(V_DTYPE)[:, None]
        sums += tl.dot(weights.to(V_DTYPE), v.to(V_DTYPE), input_precision=PRECISION)
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
    partial_sums, partial_weights, first_part, parts, row, group_mask, in_head,
    ROWS: tl.constexpr, GROUP_PADDED: tl.constexpr, HEAD_PADDED: tl.constexpr,
):  # fmt: skip
    """What `attend_share` would have returned for all parts together.

    One program does this for a list, bound by the latency of its loads, so it issues several at a
    time. They bypass the L1 cache, which does not see what other programs wrote.
    """
    in_parts = tl.arange(0, _MOST_PARTS)
    there = (in_parts < parts)[:, None] & group_mask[None, :]
    places = ((first_part + in_parts) * ROWS)[:, None] + row[None, :]
    its_largest = tl.load(partial_weights + places * 2, mask=there, other=0.0, cache_modifier=".cg")
    its_weight = tl.load(
        partial_weights + places * 2 + 1, mask=there, other=0.0, cache_modifier=".cg"
    )
    # Padding of the group gets a maximum of 0, which keeps its arithmetic finite.
    missing = tl.where(group_mask, float("-inf"), 0.0)[None, :]
    largest = tl.max(tl.where(there, its_largest, missing), 0)
    # Without any part the maximum is -inf, and the weight 0.
    weights = tl.where(there, its_weight * tl.exp2(its_largest - largest[None, :]), 0.0)
    weight = tl.sum(weights, 0)
    sums = tl.zeros((GROUP_PADDED, HEAD_PADDED), tl.float32)
    no_rows = tl.zeros((GROUP_PADDED,), tl.int32)
    for first in range(0, parts, _AHEAD):
        for ahead in tl.static_range(_AHEAD):
            part = (first_part + first + ahead) * ROWS + row
            mask = group_mask & (no_rows + first + ahead < parts)
            part_largest = tl.load(
                partial_weights + part * 2, mask=mask, other=float("-inf"), cache_modifier=".cg"
            )
            part_sums = tl.load(
                partial_sums + part[:, None] * HEAD_PADDED + in_head[None, :],
                mask=mask[:, None],
                other=0.0,
                cache_modifier=".cg",
            )
            sums += part_sums * tl.exp2(part_largest - largest)[:, None]
    return largest, weight, sums


@triton.jit
def share_out(
    weight, sums, dropped, sink, one, GROUP_PADDED: tl.constexpr, HEAD_PADDED: tl.constexpr,
    ESTIMATED: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Result [G, D] of the tail "clip", from its rows: the probabilities', then the clipped's.

    With ESTIMATED the mass that was dropped is given, [2 G] in the order of the rows, in units of
    the estimated total; otherwise it is what the probabilities lack. With SINKS a sink's weight is
    given likewise, in the unit of the weights.
    """
    weights = tl.reshape(weight, (2, GROUP_PADDED // 2))
    clipped = (tl.arange(0, 2) == 1)[:, None]
    kept = tl.sum(tl.where(clipped, 0.0, weights), 0)
    clipped_weight = tl.sum(tl.where(clipped, weights, 0.0), 0)
    if ESTIMATED:
        given = tl.reshape(dropped, (2, GROUP_PADDED // 2))
        dropped_mass = tl.maximum(tl.sum(tl.where(clipped, 0.0, given), 0), 0.0) * one
    else:
        dropped_mass = tl.maximum(one - kept, 0.0)
    # A padded row has weights and sums of 0 and gives 0.
    share = dropped_mass / tl.maximum(clipped_weight, 1e-30)
    total = tl.maximum(kept + dropped_mass, 1e-30)
    if SINKS:
        given = tl.reshape(sink, (2, GROUP_PADDED // 2))
        total += tl.sum(tl.where(clipped, 0.0, given), 0)
    factors = tl.where(clipped, share[None, :], 1.0) / total[None, :]
    sums = tl.reshape(sums, (2, GROUP_PADDED // 2, HEAD_PADDED))
    return tl.sum(sums * factors[:, :, None], 0)


@triton.jit
def count_estimate_errors(
    counters, block_lse, epoch, query, query_bias, k_pages, row_values, row_scales, rows, blocks,
    counts, block_table, seq_lens, scale, host_distance, query_stride, page_stride, table_stride,
    columns, max_blocks, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, CHUNK_BLOCKS: tl.constexpr,
    ROW_VALUES: tl.constexpr, VALUES_OF_16_BYTES: tl.constexpr,
    PRECISION: tl.constexpr, KEYS: tl.constexpr, SOFT_CAP: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """In one epoch of EVERY, drawn at random: how far the estimates are off of a chunk, drawn too.

    For one program of a launch. What it takes (some microseconds, of rows that the launch has just
    read) is too little to show when it is so seldom, and the other programs do nothing for it.
    """
    drawn, of_lists, of_chunks, _rest = tl.randint4x(0, epoch)
    if tl.umulhi(drawn, EVERY) == 0:
        num_lists = tl.num_programs(1) * tl.num_programs(2)
        list_id = tl.umulhi(of_lists, num_lists.to(tl.uint32)).to(tl.int64)
        request, head = list_id // NUM_KV_HEADS, list_id % NUM_KV_HEADS
        count = tl.load(counts + list_id)
        chunks = tl.cdiv(count, CHUNK_BLOCKS).to(tl.uint32)
        start = tl.umulhi(of_chunks, chunks).to(tl.int32) * CHUNK_BLOCKS
        in_group = tl.arange(0, GROUP_PADDED)
        group_mask = in_group < GROUP
        heads = head * GROUP + in_group
        q, bias = load_query(
            query, query_bias, request, heads, group_mask, query_stride, NUM_HEADS, HEAD_SIZE,
            HEAD_PADDED, KEYS,
        )  # fmt: skip
        list_blocks = blocks + list_id * columns
        scores, _v, _v_scale = read_chunk(
            q, bias, k_pages, row_values, row_scales, rows + list_id * columns, list_blocks,
            block_table + request * table_stride, start, count, tl.load(seq_lens + request),
            head * (PAGE_TOKENS * HEAD_SIZE), scale, host_distance, page_stride, HEAD_SIZE,
            HEAD_PADDED, PAGE_TOKENS, BLOCK_TOKENS, CHUNK_BLOCKS, ROW_VALUES, VALUES_OF_16_BYTES,
            PRECISION, KEYS, SOFT_CAP,
        )  # fmt: skip
        refined = lse_by_block(scores, BLOCK_TOKENS)
        column = start + tl.arange(0, CHUNK_BLOCKS)
        listed = column < count
        block = tl.load(list_blocks + column, mask=listed, other=0)
        counted = group_mask[:, None] & listed[None, :]
        places = (request * NUM_HEADS + heads)[:, None] * max_blocks + block[None, :]
        error = tl.abs(tl.load(block_lse + places, mask=counted, other=0.0) - refined)
        bucket = tl.zeros(error.shape, tl.int32)
        for edge in tl.static_range(_ESTIMATE_BUCKETS - 1):
            # What is no number is below no edge.
            bucket += tl.where(error <= _ESTIMATE_EDGES[edge], 0, 1)
        ones = tl.full(error.shape, 1, tl.int64)
        tl.atomic_add(counters + _FIRST_ESTIMATE_BUCKET + bucket, ones, mask=counted, sem="relaxed")


# Batch sizes differ in these numbers only, and share one compiled kernel.
@triton.jit(do_not_specialize=["columns", "max_blocks", "host_distance"])
def attend_kernel(
    query, query_bias, k_pages, row_values, row_scales, rows, blocks, counts, block_table,
    seq_lens, block_lse, request_lse, request_dropped, sinks, state, counters, partial_sums,
    partial_weights, arrivals, out, scale, clip, clip_length, host_distance, query_stride,
    page_stride, table_stride, out_stride, columns, max_blocks,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, CHUNK_BLOCKS: tl.constexpr,
    ROW_VALUES: tl.constexpr, VALUES_OF_16_BYTES: tl.constexpr, SPLIT: tl.constexpr,
    CLIP: tl.constexpr, KEYS: tl.constexpr, V_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    SOFT_CAP: tl.constexpr, EVERY: tl.constexpr, SINKS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        gdc_wait()
    epoch = 0
    if is_first_program():
        # The step's epoch ends here: this is its last launch, and no other program of it looks at
        # the epoch.
        epoch = tl.load(state + _EPOCH)
        if KEYS != K_IN_PAGE:
            # Every thread has it before one changes it.
            tl.debug_barrier()
        tl.store(state + _EPOCH, epoch + 1)
    split, splits = tl.program_id(0), tl.num_programs(0)
    head = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    list_id = request * NUM_KV_HEADS + head
    num_tokens = tl.load(seq_lens + request)
    count = tl.load(counts + list_id)
    # Rows of results: one of each query head, or with CLIP two of each, in halves.
    sides: tl.constexpr = 2 if CLIP else 1
    side_rows: tl.constexpr = GROUP_PADDED // sides
    padded_row = tl.arange(0, GROUP_PADDED)
    in_group = padded_row % side_rows
    row = padded_row // side_rows * GROUP + in_group
    in_head = tl.arange(0, HEAD_PADDED)
    group_mask = in_group < GROUP
    heads = head * GROUP + in_group
    q, bias = load_query(
        query, query_bias, request, heads, group_mask, query_stride, NUM_HEADS, HEAD_SIZE,
        HEAD_PADDED, KEYS,
    )  # fmt: skip
    shift = tl.zeros((GROUP_PADDED,), tl.float32)
    limit = tl.zeros((GROUP_PADDED,), tl.float32)
    dropped = tl.zeros((GROUP_PADDED,), tl.float32)
    lse = tl.zeros((GROUP_PADDED,), tl.float32)
    sink = tl.zeros((GROUP_PADDED,), tl.float32)
    unit_bits: tl.constexpr = UNIT_BITS if KEYS == K_IN_PAGE else ESTIMATED_UNIT_BITS
    one: tl.constexpr = ONE if KEYS == K_IN_PAGE else ESTIMATED_ONE
    if CLIP or SINKS:
        lse = tl.load(request_lse + request * NUM_HEADS + heads, mask=group_mask, other=0.0)
        if KEYS != K_IN_PAGE:
            dropped = tl.load(
                request_dropped + request * NUM_HEADS + heads, mask=group_mask, other=0.0
            )
    if SINKS:
        sink = tl.load(sinks + heads, mask=group_mask, other=0.0).to(tl.float32) * LOG2_E
    if CLIP:
        shift = lse * LOG2_E - unit_bits
        # Estimates may be below the scores: a weight has no bound but the dtype's, and a product
        # with infinity would be NaN.
        bound: tl.constexpr = 65504.0 if tl.float16 == V_DTYPE else 1e30
        most: tl.constexpr = one if KEYS == K_IN_PAGE else bound
        # Beyond so many tokens the clip falls as the threshold does.
        share = tl.sqrt(tl.minimum(clip_length / tl.maximum(num_tokens, 1).to(tl.float32), 1.0))
        limit = tl.where(padded_row < side_rows, most, clip * share * one)
    largest, weight, sums = attend_share(
        q, bias, k_pages, row_values, row_scales, rows + list_id * columns,
        blocks + list_id * columns, block_table + request * table_stride, split * CHUNK_BLOCKS,
        splits * CHUNK_BLOCKS, count, num_tokens, head.to(tl.int64) * (PAGE_TOKENS * HEAD_SIZE),
        scale, host_distance, page_stride, shift, limit, GROUP_PADDED, HEAD_SIZE, HEAD_PADDED,
        PAGE_TOKENS, BLOCK_TOKENS, CHUNK_BLOCKS, ROW_VALUES, VALUES_OF_16_BYTES, PRECISION, CLIP,
        KEYS, V_DTYPE, SOFT_CAP,
    )  # fmt: skip
    last = True
    if SPLIT:
        first_part = list_id * splits
        if split * CHUNK_BLOCKS < count:
            part = (first_part + split) * (sides * GROUP) + row
            leave_part(
                partial_sums, partial_weights, part, largest, weight, sums, group_mask, in_head
            )
        # All threads' stores come before the count of this program.
        tl.debug_barrier()
        last = tl.atomic_add(arrivals + list_id, 1) == splits - 1
        if last:
            tl.store(arrivals + list_id, 0)
            # Programs that had a share: the others left nothing.
            parts = tl.minimum(splits, tl.cdiv(count, CHUNK_BLOCKS))
            largest, weight, sums = add_parts(
                partial_sums, partial_weights, first_part, parts, row, group_mask, in_head,
                sides * GROUP, GROUP_PADDED, HEAD_PADDED,
            )  # fmt: skip
    if last:
        if CLIP:
            estimated: tl.constexpr = KEYS != K_IN_PAGE
            # The lse of a padded row is anything.
            sink = tl.where(count > 0, tl.exp2(sink - shift), 0.0)
            result = share_out(
                weight, sums, dropped, sink, one, GROUP_PADDED, HEAD_PADDED, estimated, SINKS
            )
        else:
            # A padded row has sums of 0 and gives 0.
            total = tl.where(count > 0, weight, 1.0)
            if SINKS:
                # It is weighed against all tokens: those selected, and what the others have.
                tokens = lse * LOG2_E
                if KEYS != K_IN_PAGE:
                    others = tokens + tl.log2(tl.maximum(dropped, 0.0))
                    ours = largest + tl.log2(total)
                    more = tl.maximum(ours, others)
                    tokens = more + tl.log2(tl.exp2(ours - more) + tl.exp2(others - more))
                share = 1.0 / (1.0 + tl.exp2(sink - tokens))
                sums *= tl.where(count > 0, share, 0.0)[:, None]
            result = sums / total[:, None]
        in_side = tl.arange(0, side_rows)
        tl.store(
            out + request * out_stride + (head * GROUP + in_side)[:, None] * HEAD_SIZE + in_head,
            result.to(out.dtype.element_ty),
            mask=(in_side < GROUP)[:, None] & (in_head < HEAD_SIZE)[None, :],
        )
    if KEYS != K_IN_PAGE and is_first_program():
        count_estimate_errors(
            counters, block_lse, epoch, query, query_bias, k_pages, row_values,
            row_scales, rows, blocks, counts, block_table, seq_lens, scale, host_distance,
            query_stride, page_stride, table_stride, columns, max_blocks, NUM_HEADS, NUM_KV_HEADS,
            GROUP, GROUP_PADDED, HEAD_SIZE, HEAD_PADDED, PAGE_TOKENS, BLOCK_TOKENS, CHUNK_BLOCKS,
            ROW_VALUES, VALUES_OF_16_BYTES, PRECISION, KEYS, SOFT_CAP, EVERY,
        )  # fmt: skip


def attend_blocks(
    view: LayerView,
    batch: DecodeBatch,
    selected: Selected,
    rows: torch.Tensor,
    workspace: DecodeWorkspace,
    out: torch.Tensor,
    *,
    config: AttendConfig | RowsConfig | None = None,
    dependent: bool = False,
) -> torch.Tensor:
    """Softmax over the selected tokens and the product with V (definition: reference/attend.py).

    The last launch of a step: it ends the epoch of the hot cache.

    Args:
        selected: the lists, GPU, of several rows each where `DecodeBatch.listed_together` says so.
            `lse`, and `dropped` where K is in the rows, are read for the tail
            "clip" and for learned sinks only.
        rows: [B, Hkv, N] int32, GPU. Where each selected row lies (`types.Fetched`); 0 and above is
            a slot of the hot cache.
        workspace: `sums`, `weights` and `arrivals` are used; with K in the rows also the estimates,
            `block_lse`, whose errors it counts now and then; and with rows of int8 the query as
            scoring left it, `code_query` and `code_bias`.
        out: [B, Hq, D] model dtype, GPU. Written and returned; 0 for a padded row.
        config: launch shape, chosen by `attend_config`, or with rows of int8 by `rows_config`,
            unless given.
        dependent: launch it as kernels/dependent.py says.
    Graph-safe: no allocation, no host sync.
    """
    shape, query, cache = view.shape, batch.query, view.hot_cache
    assert cache is not None
    check_query_strides(query)
    clip = view.selection.clip if view.tail == "clip" else None
    if view.tail == "clip" and (clip is None or selected.lse is None):
        raise ValueError('tail="clip": needs selected.lse and a selection with a mass threshold')
    num_lists, columns = batch.num_requests * shape.num_kv_heads, selected.blocks.shape[2]
    if num_lists == 0:
        return out
    row, dropped, sinks = shape.row, selected.dropped, batch.sinks
    if sinks is not None and selected.lse is None:
        raise ValueError("learned sinks: need selected.lse")
    if row.has_keys and (clip is not None or sinks is not None) and dropped is None:
        raise ValueError(
            'tail="clip" and sinks: need selected.dropped where blocks are chosen by estimates'
        )
    if on_tensor_cores(shape):
        assert not isinstance(config, AttendConfig)
        _attend_int8(view, batch, selected, rows, workspace, out, clip, config, dependent)
        return out
    assert not isinstance(config, RowsConfig)
    if config is None:
        config = attend_config(shape, num_lists, columns)
    rows_of_list = shape.group if clip is None else 2 * shape.group
    _check_workspace(workspace, num_lists, num_lists * config.splits * rows_of_list)
    keys = K_IN_PAGE if not row.has_keys else K_INT8 if row.host_dtype == "int8" else K_IN_ROW
    if keys.value == K_INT8.value:
        query, bias = front(workspace.code_query, *query.shape), workspace.code_bias
    else:
        bias = workspace.lse
    # With the hot cache off every row lies on the host.
    base = cache.slots if cache.num_slots else view.host_rows
    distance = view.host_rows.data_ptr() - base.data_ptr()
    if distance % 16:
        raise ValueError("host rows and hot slots: must be aligned to 16 bytes")
    attend_kernel[(config.splits, shape.num_kv_heads, batch.num_requests)](
        query, bias, view.k_pages, base.view(row.value_dtype), base.view(torch.float16), rows,
        selected.blocks, selected.counts, batch.block_table, batch.seq_lens, workspace.block_lse,
        workspace.lse if selected.lse is None else selected.lse,
        workspace.lse if dropped is None else dropped,
        workspace.lse if sinks is None else sinks, cache.state, cache.counters,
        workspace.sums, workspace.weights, workspace.arrivals, out, batch.scale,
        1.0 if clip is None else clip, float(view.selection.threshold_length or NO_LENGTH),
        distance // 16, query.stride(0),
        view.k_pages.stride(0), batch.block_table.stride(0), out.stride(0), columns,
        batch.max_blocks,
        NUM_HEADS=shape.num_query_heads, NUM_KV_HEADS=shape.num_kv_heads, GROUP=shape.group,
        GROUP_PADDED=max(16, triton.next_power_of_2(rows_of_list)),
        HEAD_SIZE=shape.head_size, HEAD_PADDED=triton.next_power_of_2(shape.head_size),
        PAGE_TOKENS=shape.page_tokens, BLOCK_TOKENS=shape.block_tokens,
        CHUNK_BLOCKS=config.chunk_blocks, ROW_VALUES=row.bytes // row.value_dtype.itemsize,
        VALUES_OF_16_BYTES=16 // row.value_dtype.itemsize, SPLIT=config.splits > 1,
        CLIP=clip is not None, KEYS=keys.value, V_DTYPE=_TRITON_DTYPES[shape.dtype],
        PRECISION="ieee" if shape.dtype == torch.float32 else "tf32",
        SOFT_CAP=batch.soft_cap or 0.0, EVERY=ESTIMATES_EVERY, SINKS=sinks is not None,
        DEPENDENT=dependent, launch_pdl=dependent,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def _attend_int8(
    view: LayerView,
    batch: DecodeBatch,
    selected: Selected,
    rows: torch.Tensor,
    workspace: DecodeWorkspace,
    out: torch.Tensor,
    clip: float | None,
    config: RowsConfig | None,
    dependent: bool,
) -> None:
    """Rows of int8 (csrc/attend.cu)."""
    together = batch.listed_together(view.shape)
    if config is None:
        num_lists, columns = selected.counts.numel(), selected.blocks.shape[2]
        config = rows_config(view.shape, num_lists, columns, workspace.multiprocessors, together)
    heads = batch.query.shape[:2]
    torch.ops.kcache.attend_int8_rows(
        view.packed, selected.blocks, selected.counts, rows, batch.seq_lens,
        front(workspace.block_lse, *heads, batch.max_blocks),
        front(workspace.code_query, *batch.query.shape), front(workspace.code_bias, *heads),
        selected.lse, selected.dropped, batch.sinks, workspace.sums, workspace.weights,
        workspace.arrivals, out, batch.spans, together, batch.scale, batch.soft_cap,
        -1.0 if clip is None else clip,
        float(view.selection.threshold_length or NO_LENGTH), config.splits, config.least_tiles,
        ESTIMATES_EVERY, dependent,
    )  # fmt: skip


def _check_workspace(workspace: DecodeWorkspace, num_lists: int, num_weights: int) -> None:
    """Raise ValueError unless a launch of so many lists and parts of heads fits."""
    lists, weights = workspace.arrivals.numel(), workspace.weights.numel() // 2
    if num_lists > lists or num_weights > weights:
        raise ValueError(
            f"workspace: made for {lists} lists and {weights} parts of heads; this launch has "
            f"{num_lists} and {num_weights}"
        )
