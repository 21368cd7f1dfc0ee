# SPDX-License-Identifier: Apache-2.0
"""Score every V block in one pass over the K pages (Triton). Definition: reference/score.py.

Bound by memory: K is read once, the output is 4 bytes for every `T * D` values read. A program
takes chunks of one (request, KV head) in strides, so a fixed grid serves any length: what a
program does is decided by `seq_lens` on the device, and a graph captured for the longest context
costs a short one nothing but idle programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_kcache.cache.hot_cache import SCORED
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels.dependent import gdc_launch_dependents, gdc_wait
from vllm_kcache.kernels.score_plan import ScoreConfig, score_config
from vllm_kcache.kernels.select import Lists
from vllm_kcache.kernels.workspace import DecodeBatch
from vllm_kcache.types import MOST_QUERY_HEADS_GPU

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
_SCORED = tl.constexpr(SCORED)


@triton.jit
def is_first_program():
    """Whether this is the first program of its launch."""
    return (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0)


@triton.jit
def lse_by_block(scores, BLOCK_TOKENS: tl.constexpr):
    """Log-sum-exp of runs of BLOCK_TOKENS scores: [G, tokens] in base 2 -> [G, blocks], natural."""
    blocks: tl.constexpr = scores.shape[1] // BLOCK_TOKENS
    by_block = tl.reshape(scores, (scores.shape[0], blocks, BLOCK_TOKENS))
    largest = tl.max(by_block, 2)
    # A block past the length has only -inf; subtracting 0 there gives log(0) = -inf, not NaN.
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp2(by_block - shift[:, :, None]), 2)
    return (tl.log2(total) + shift) * LN_2


@triton.jit
def cap_scores(scores, SOFT_CAP: tl.constexpr):
    """SOFT_CAP * tanh(score / SOFT_CAP) of scores in base 2; the scores themselves with 0."""
    if SOFT_CAP != 0.0:
        most: tl.constexpr = SOFT_CAP * LOG2_E
        # 1 - 2 / (exp(2 x) + 1) is tanh(x), at both ends of the range, too.
        scores = most - 2.0 * most / (tl.exp2(scores * (2.0 / SOFT_CAP)) + 1.0)
    return scores


# Batch sizes differ in these numbers only, and share one compiled kernel.
@triton.jit(do_not_specialize=["max_blocks", "max_chunks"])
def score_kernel(
    query, k_pages, block_table, seq_lens, spans, block_lse, chunk_lse, signals, state, scale,
    query_stride, page_stride, table_stride, max_blocks, max_chunks,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
    HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    SOFT_CAP: tl.constexpr, TOGETHER: tl.constexpr, SIGNAL: tl.constexpr, DEPENDENT: tl.constexpr,
    AFTER_WRITE: tl.constexpr,
):  # fmt: skip
    if DEPENDENT and not AFTER_WRITE:
        gdc_wait()
    split, splits = tl.program_id(0), tl.num_programs(0)
    head = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    rows = 1
    if TOGETHER == 1:
        num_tokens = tl.load(seq_lens + request)
    else:
        # Rows of a request that begin before the batch belong to another one.
        row = tl.program_id(2)
        before = tl.minimum(tl.load(spans + 2 * request), row)
        after = tl.load(spans + 2 * request + 1)
        rows = tl.minimum(tl.minimum(after + 1, TOGETHER), tl.num_programs(2) - row)
        # Of the last of them, which has most. Other rows than the first have nothing to do.
        num_tokens = tl.load(seq_lens + request + rows - 1)
        num_tokens = tl.where(before % TOGETHER == 0, num_tokens, 0)
    chunks = tl.cdiv(num_tokens, CHUNK)
    if DEPENDENT:
        if AFTER_WRITE:
            # Of what this reads, write stored only K of the newest token, and of those just before
            # it (the newest of another request that shares this one's page, or those that a draft
            # comes after). The first program always waits, so that no launch ends before its
            # predecessor.
            last, before = (chunks - 1) % splits, (chunks - 2) % splits
            if (split == last) | (split == before) | is_first_program():
                gdc_wait()
        gdc_launch_dependents()
    # A graph captured for longer requests has many such programs: they should be short.
    if split >= chunks:
        return
    in_group = tl.arange(0, GROUP_PADDED)
    in_head = tl.arange(0, HEAD_PADDED)
    in_chunk = tl.arange(0, CHUNK)
    chunk_blocks: tl.constexpr = CHUNK // BLOCK_TOKENS
    in_chunk_blocks = tl.arange(0, chunk_blocks)
    if TOGETHER == 1:
        group_mask = in_group < GROUP
        heads = head * GROUP + in_group
        q_rows = query + request * query_stride + heads[:, None] * HEAD_SIZE
    else:
        # Query heads of one row after those of another.
        later = in_group // GROUP
        group_mask = in_group < rows * GROUP
        heads = later * NUM_HEADS + head * GROUP + in_group % GROUP
        lengths = num_tokens - (rows - 1 - later)
        q_rows = query + (request + later)[:, None] * query_stride
        q_rows += (head * GROUP + in_group % GROUP)[:, None] * HEAD_SIZE
    q = tl.load(
        q_rows + in_head[None, :],
        mask=group_mask[:, None] & (in_head < HEAD_SIZE)[None, :],
        other=0.0,
    )
    table_row = block_table + request * table_stride
    head_base = head.to(tl.int64) * (PAGE_TOKENS * HEAD_SIZE)
    out_rows = block_lse + (request * NUM_HEADS + heads) * max_blocks
    chunk_rows = chunk_lse + (request * NUM_HEADS + heads) * max_chunks
    for chunk in range(split, chunks, splits):
        tokens = chunk * CHUNK + in_chunk
        exists = tokens < num_tokens
        pages = tl.load(table_row + tokens // PAGE_TOKENS, mask=exists, other=0).to(tl.int64)
        offsets = pages * page_stride + head_base + (tokens % PAGE_TOKENS) * HEAD_SIZE
        mask = exists[:, None]
        if HEAD_SIZE != HEAD_PADDED:
            mask = mask & (in_head < HEAD_SIZE)[None, :]
        k = tl.load(k_pages + offsets[:, None] + in_head[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        scores = cap_scores(scores, SOFT_CAP)
        chunk_mask = group_mask
        if TOGETHER == 1:
            scores = tl.where(exists[None, :], scores, float("-inf"))
        else:
            scores = tl.where(tokens[None, :] < lengths[:, None], scores, float("-inf"))
            chunk_mask = group_mask & (chunk * CHUNK < lengths)
        blocks = chunk * chunk_blocks + in_chunk_blocks
        out_mask = group_mask[:, None] & (blocks < max_blocks)[None, :]
        lse = lse_by_block(scores, BLOCK_TOKENS)
        tl.store(out_rows[:, None] + blocks[None, :], lse, mask=out_mask)
        # A chunk has a token, of each row that is stored: so its largest score is finite.
        largest = tl.max(lse, 1)
        total = tl.sum(tl.exp2((lse - largest[:, None]) * LOG2_E), 1)
        tl.store(chunk_rows + chunk, largest + tl.log2(total) * LN_2, mask=chunk_mask)
    if SIGNAL:
        # All threads' stores come before the one thread's count.
        tl.debug_barrier()
        place = signals + request * (NUM_HEADS // GROUP) + head
        before_this = tl.atomic_add(place, 1, sem="release")
        if before_this + 1 == tl.minimum(splits, chunks):
            # Followers that wait for a later list see that scoring goes on (csrc/follow.cu).
            tl.atomic_add(state + _SCORED, 1, sem="relaxed")


def check_query_strides(query: torch.Tensor) -> None:
    """The kernels take queries that are strided over requests only."""
    head_size = query.shape[2]
    if query.stride()[1:] != (head_size, 1):
        raise ValueError(
            f"query: has strides {list(query.stride())}; the last two must be [{head_size}, 1]"
        )


def score_blocks(
    view: LayerView,
    batch: DecodeBatch,
    lists: Lists,
    *,
    signal: bool = False,
    dependent: bool = False,
    after_write: bool = False,
    config: ScoreConfig | None = None,
) -> int:
    """Write the log-sum-exp of each V block and of each chunk of them; nothing past the lengths.

    Args:
        lists: `block_lse` and `chunk_lse` are written; with `signal`, `signals`, too.
        signal: each program of a list that has something to score adds one to its entry of
            `signals` when its scores are there, for followers.
        dependent: launch it as kernels/dependent.py says.
        after_write: the launch before it on this stream is `write_kv`, of one token for each of
            these requests and nothing else; of rows that are tokens of one request, of fewer
            tokens than a chunk. Most programs need not wait for it then. Without `dependent` all
            wait for it anyway.
        config: launch shape, chosen by `score_config` unless given.

    K is read once for several tokens of a request (`DecodeBatch.spans`), of as many as have 16
    query heads a KV head together; not with `signal`.

    Returns:
        Programs of each list.
    """
    shape, query, k_pages = view.shape, batch.query, view.k_pages
    check_query_strides(query)
    if shape.group > MOST_QUERY_HEADS_GPU:
        raise ValueError(
            f"query: has {shape.group} heads for a KV head; at most {MOST_QUERY_HEADS_GPU} on a GPU"
        )
    together = 1 if signal else batch.scored_together(shape.group)
    if config is None:
        config = score_config(shape, -(-batch.num_requests // together), batch.max_blocks)
    score_kernel[(config.splits, shape.num_kv_heads, batch.num_requests)](
        query,
        k_pages,
        batch.block_table,
        batch.seq_lens,
        batch.spans if together > 1 else batch.seq_lens,
        lists.block_lse,
        lists.chunk_lse,
        lists.signals,
        view.hot_cache.state if view.hot_cache is not None else lists.signals,
        batch.scale,
        query.stride(0),
        k_pages.stride(0),
        batch.block_table.stride(0),
        batch.max_blocks,
        lists.chunk_lse.shape[2],
        NUM_HEADS=shape.num_query_heads,
        GROUP=shape.group,
        GROUP_PADDED=MOST_QUERY_HEADS_GPU,
        HEAD_SIZE=shape.head_size,
        HEAD_PADDED=triton.next_power_of_2(shape.head_size),
        PAGE_TOKENS=shape.page_tokens,
        BLOCK_TOKENS=shape.block_tokens,
        CHUNK=config.chunk_tokens,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        TOGETHER=together,
        SOFT_CAP=batch.soft_cap or 0.0,
        SIGNAL=signal,
        DEPENDENT=dependent,
        AFTER_WRITE=dependent and after_write,
        launch_pdl=dependent,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
    )
    return config.splits
