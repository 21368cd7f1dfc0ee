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

from vllm_kcache.cache.hot_cache import EPOCH, FIRST_MISS_COUNT, MAX_WAVES, HotCache
from vllm_kcache.kernels.dependent import gdc_launch_dependents, gdc_wait
from vllm_kcache.kernels.score_plan import ScoreConfig, num_chunks, score_config
from vllm_kcache.types import MOST_QUERY_HEADS_GPU

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
_EPOCH = tl.constexpr(EPOCH)
_FIRST_MISS_COUNT = tl.constexpr(FIRST_MISS_COUNT)
_MAX_WAVES = tl.constexpr(MAX_WAVES)


@triton.jit
def is_first_program():
    """Whether this is the first program of its launch."""
    return (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0)


@triton.jit
def begin_epoch(state):
    """Begin an epoch of the hot cache and zero its miss counts, with one program of a launch.

    Nothing else of this layer runs yet, and all of the layer before has ended.
    """
    if is_first_program():
        tl.store(state + _EPOCH, tl.load(state + _EPOCH) + 1)
        waves = tl.arange(0, _MAX_WAVES)
        tl.store(state + _FIRST_MISS_COUNT + waves, tl.zeros((_MAX_WAVES,), tl.int32))


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


# Batch sizes and waves differ in these numbers only, and share one compiled kernel.
@triton.jit(do_not_specialize=["max_blocks", "max_chunks", "first_head"])
def score_kernel(
    query, k_pages, block_table, seq_lens, block_lse, chunk_lse, state, parts_scored, scale,
    query_stride, page_stride, table_stride, max_blocks, max_chunks, first_head,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
    HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, PAD: tl.constexpr,
    NEW_EPOCH: tl.constexpr, CHUNK_LSE: tl.constexpr, SIGNAL: tl.constexpr,
    DEPENDENT: tl.constexpr, AFTER_WRITE: tl.constexpr,
):  # fmt: skip
    if DEPENDENT and not AFTER_WRITE:
        gdc_wait()
    split, splits = tl.program_id(0), tl.num_programs(0)
    head = first_head + tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    num_tokens = tl.load(seq_lens + request)
    chunks = tl.cdiv(num_tokens, CHUNK)
    if DEPENDENT:
        if AFTER_WRITE:
            # Of what this reads, the launch before wrote only K of the newest token, and of the one
            # before it where that is the newest of another request, whose page this one shares. The
            # first program waits in any case: it begins the epoch that the launch before reads, and
            # so no launch ends before the one before it.
            last, before = (chunks - 1) % splits, (chunks - 2) % splits
            if (split == last) | (split == before) | is_first_program():
                gdc_wait()
        gdc_launch_dependents()
    if NEW_EPOCH:
        begin_epoch(state)
    if not PAD:  # noqa: SIM102  (known when compiled)
        if split >= chunks:
            # A graph captured for longer requests has many such programs: they should be short.
            if SIGNAL:
                tl.atomic_add(
                    parts_scored + request * (NUM_HEADS // GROUP) + head, 1, sem="release"
                )
            return
    in_group = tl.arange(0, GROUP_PADDED)
    in_head = tl.arange(0, HEAD_PADDED)
    in_chunk = tl.arange(0, CHUNK)
    chunk_blocks: tl.constexpr = CHUNK // BLOCK_TOKENS
    in_chunk_blocks = tl.arange(0, chunk_blocks)
    group_mask = in_group < GROUP
    heads = head * GROUP + in_group
    q = tl.load(
        query + request * query_stride + heads[:, None] * HEAD_SIZE + in_head[None, :],
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
        scores = tl.where(exists[None, :], scores, float("-inf"))
        blocks = chunk * chunk_blocks + in_chunk_blocks
        out_mask = group_mask[:, None] & (blocks < max_blocks)[None, :]
        lse = lse_by_block(scores, BLOCK_TOKENS)
        tl.store(out_rows[:, None] + blocks[None, :], lse, mask=out_mask)
        if CHUNK_LSE:
            # A chunk has a token, so its largest score is finite.
            largest = tl.max(lse, 1)
            total = tl.sum(tl.exp2((lse - largest[:, None]) * LOG2_E), 1)
            tl.store(chunk_rows + chunk, largest + tl.log2(total) * LN_2, mask=group_mask)
    if PAD:
        # Chunks wholly past the length, in the same strides.
        nothing = tl.full((GROUP_PADDED, chunk_blocks), float("-inf"), tl.float32)
        for chunk in range(split, tl.cdiv(max_blocks, chunk_blocks), splits):
            blocks = chunk * chunk_blocks + in_chunk_blocks
            beyond = (blocks < max_blocks) & (blocks >= chunks * chunk_blocks)
            out_mask = group_mask[:, None] & beyond[None, :]
            tl.store(out_rows[:, None] + blocks[None, :], nothing, mask=out_mask)
    if SIGNAL:
        # All threads' stores come before the one thread's count.
        tl.debug_barrier()
        tl.atomic_add(parts_scored + request * (NUM_HEADS // GROUP) + head, 1, sem="release")


def check_query_strides(query: torch.Tensor) -> None:
    """The kernels take queries that are strided over requests only."""
    head_size = query.shape[2]
    if query.stride()[1:] != (head_size, 1):
        raise ValueError(
            f"query: has strides {list(query.stride())}; the last two must be [{head_size}, 1]"
        )


def check_chunk_lse(
    chunk_lse: torch.Tensor, num_requests: int, num_query_heads: int, chunks: int
) -> None:
    """The kernel writes a sum for each chunk of its own size."""
    if chunk_lse.shape != (num_requests, num_query_heads, chunks):
        raise ValueError(
            f"chunk_lse: has shape {list(chunk_lse.shape)}; must be [B={num_requests}, "
            f"Hq={num_query_heads}, C={chunks}]"
        )


def score_blocks(
    query: torch.Tensor,
    k_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    v_block_tokens: int,
    max_blocks: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-sum-exp of each V block. See `ops.score_blocks`. Graph-safe when `out` is given."""
    if out is None:
        out = query.new_empty((*query.shape[:2], max_blocks), dtype=torch.float32)
    launch_score(query, k_pages, block_table, seq_lens, scale, v_block_tokens, out, pad=True)
    return out


def launch_score(
    query: torch.Tensor,
    k_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    v_block_tokens: int,
    block_lse: torch.Tensor,
    *,
    first_head: int = 0,
    num_heads: int | None = None,
    new_epoch: HotCache | None = None,
    pad: bool = False,
    config: ScoreConfig | None = None,
    chunk_lse: torch.Tensor | None = None,
    parts_scored: torch.Tensor | None = None,
    dependent: bool = False,
    after_write: bool = False,
) -> int:
    """Score a range of KV heads on the current stream.

    Args:
        block_lse: [B, Hq, P] float32, GPU, contiguous; rows of the heads in range are written.
        first_head, num_heads: range of KV heads; None means up to the last.
        new_epoch: begin a new epoch of this hot cache and zero its miss counts.
        pad: write -inf past `seq_lens`. The other kernels stop at `seq_lens` and need no padding.
        config: launch shape, chosen by `score_config` unless given.
        chunk_lse: [B, Hq, C] float32, GPU, contiguous. Takes the log-sum-exp of each chunk of
            `chunk_tokens`, so that selection need not read all scores for their sum.
        parts_scored: [B * Hkv] int32, GPU. Each program of a list adds one when its scores are
            there, for a kernel that runs beside (csrc/follow.cu).
        dependent: launch it as kernels/dependent.py says.
        after_write: the launch before it on this stream is `write_kv`, of one token for each of
            these requests and nothing else. Most programs need not wait for it then. Without
            `dependent` all wait for it anyway.

    Returns:
        Programs of each list.
    """
    num_requests, num_query_heads, head_size = query.shape
    _, num_kv_heads, page_tokens, _ = k_pages.shape
    num_heads = num_kv_heads - first_head if num_heads is None else num_heads
    check_query_strides(query)
    if num_requests == 0 or num_heads == 0:
        return 0
    max_blocks = block_lse.shape[2]
    group = num_query_heads // num_kv_heads
    if group > MOST_QUERY_HEADS_GPU:
        raise ValueError(
            f"query: has {group} heads for a KV head; at most {MOST_QUERY_HEADS_GPU} on a GPU"
        )
    if config is None:
        config = score_config(
            num_requests * num_heads,
            head_size,
            k_pages.element_size(),
            v_block_tokens,
            max_blocks,
        )
    chunks = num_chunks(max_blocks, config.chunk_tokens // v_block_tokens)
    if chunk_lse is not None:
        check_chunk_lse(chunk_lse, num_requests, num_query_heads, chunks)
    score_kernel[(config.splits, num_heads, num_requests)](
        query,
        k_pages,
        block_table,
        seq_lens,
        block_lse,
        chunk_lse if chunk_lse is not None else block_lse,
        new_epoch.state if new_epoch is not None else seq_lens,
        parts_scored if parts_scored is not None else seq_lens,
        scale,
        query.stride(0),
        k_pages.stride(0),
        block_table.stride(0),
        max_blocks,
        chunks,
        first_head,
        NUM_HEADS=num_query_heads,
        GROUP=group,
        GROUP_PADDED=MOST_QUERY_HEADS_GPU,
        HEAD_SIZE=head_size,
        HEAD_PADDED=triton.next_power_of_2(head_size),
        PAGE_TOKENS=page_tokens,
        BLOCK_TOKENS=v_block_tokens,
        CHUNK=config.chunk_tokens,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        PAD=pad,
        NEW_EPOCH=new_epoch is not None,
        CHUNK_LSE=chunk_lse is not None,
        SIGNAL=parts_scored is not None,
        DEPENDENT=dependent,
        AFTER_WRITE=dependent and after_write,
        launch_pdl=dependent,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
    )
    return config.splits
