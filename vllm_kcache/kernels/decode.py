# SPDX-License-Identifier: Apache-2.0
"""One decode step of one layer on the GPU: score, select, fetch and attend, ready for capture.

With many lists the step runs in waves of KV heads: while one wave is scored, the wave before selects
and fetches on a stream of high priority, so that the link works beside the memory. With few lists a
second stream costs more than it hides, and everything runs on one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from vllm_kcache.cache.hot_cache import MAX_WAVES, HotCache
from vllm_kcache.kernels import extension
from vllm_kcache.kernels.attend import AttendBuffers, attend_blocks
from vllm_kcache.kernels.fetch import launch_fetch
from vllm_kcache.kernels.score import launch_score
from vllm_kcache.kernels.select import launch_select, selection_arguments
from vllm_kcache.types import Fetched, Selected, Selection, Tail

# Lists (request, KV head) from which on a step is cut in waves, and how many waves then.
WAVE_LISTS = 96
WAVES = 2
# Thread blocks that copy misses: enough to fill PCIe 5 x16, few enough to leave the GPU to scoring.
COPY_THREAD_BLOCKS = 48
# Programs that attend_config aims at beyond one per list.
_ATTEND_PROGRAMS = 1056


@dataclass(frozen=True)
class DecodeWorkspace:
    """Buffers of a decode step, shared by all layers. Made once; addresses never change.

    Attributes:
        max_requests: Most requests of one call.
        block_lse: [max_requests * Hq * P] float32, GPU.
        blocks, rows: [max_requests * Hkv * N] int32, GPU.
        counts: [max_requests * Hkv] int32, GPU.
        mass: [max_requests * Hkv] float32, GPU.
        miss_list: [max_requests * Hkv * N, 2] int32, GPU. (physical V block, slot) of each miss.
        scratch: [max_requests * Hkv * P] int32, GPU, for the Triton selection; empty otherwise.
        attend: Partial results of attention.
        side: Stream of high priority for select and fetch.
        waves: Waves of a step with many lists.
    """

    max_requests: int
    block_lse: torch.Tensor
    blocks: torch.Tensor
    rows: torch.Tensor
    counts: torch.Tensor
    mass: torch.Tensor
    miss_list: torch.Tensor
    scratch: torch.Tensor
    attend: AttendBuffers
    side: torch.cuda.Stream | None
    waves: int

    @classmethod
    def make(
        cls,
        max_requests: int,
        num_query_heads: int,
        num_kv_heads: int,
        head_size: int,
        max_blocks: int,
        selection: Selection,
        device: torch.device | str,
        waves: int = WAVES,
    ) -> DecodeWorkspace:
        """Allocate the buffers.

        Args:
            max_requests: Most requests of one call.
            num_query_heads, num_kv_heads, head_size: Hq, Hkv, D.
            max_blocks: P of the longest request.
            selection: Decides N.
            device: The GPU.
            waves: Waves of a step with many lists, 1 to `MAX_WAVES`.
        """
        if not 1 <= waves <= MAX_WAVES:
            raise ValueError(f"waves={waves}: must be 1 to {MAX_WAVES}")
        device = torch.device(device)
        lists = max_requests * num_kv_heads
        columns = _columns(selection, max_blocks)

        def integers(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        is_cuda = device.type == "cuda"
        with_scratch = not extension.available()
        return cls(
            max_requests,
            torch.zeros(max_requests * num_query_heads * max_blocks, device=device),
            integers(lists * columns),
            integers(lists * columns),
            integers(lists),
            torch.zeros(lists, device=device),
            integers(lists * columns, 2),
            integers(lists * max_blocks if with_scratch else 0),
            AttendBuffers.make(lists + _ATTEND_PROGRAMS, 1, head_size, device),
            torch.cuda.Stream(device, priority=-1) if is_cuda else None,
            waves,
        )

    @staticmethod
    def bytes(
        max_requests: int,
        num_query_heads: int,
        num_kv_heads: int,
        head_size: int,
        max_blocks: int,
        selection: Selection,
    ) -> int:
        """GPU memory that `make` takes."""
        lists = max_requests * num_kv_heads
        columns = _columns(selection, max_blocks)
        scores = max_requests * num_query_heads * max_blocks * 4
        scratch = 0 if extension.available() else lists * max_blocks * 4
        attend = (lists + _ATTEND_PROGRAMS) * (16 * (triton.next_power_of_2(head_size) + 2) + 1) * 4
        return scores + lists * columns * 16 + lists * 8 + scratch + attend


def _columns(selection: Selection, max_blocks: int) -> int:
    return max_blocks if selection.top_n is None else min(selection.top_n, max_blocks)


def _front(buffer: torch.Tensor, *shape: int) -> torch.Tensor:
    """The first elements of a flat buffer, contiguous in the given shape."""
    return buffer[: math.prod(shape)].view(shape)


def decode_step(
    workspace: DecodeWorkspace,
    query: torch.Tensor,
    k_pages: torch.Tensor,
    v_pool: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    v_block_tokens: int,
    max_blocks: int,
    selection: Selection,
    tail: Tail,
    hot_cache: HotCache,
    layer: int,
    out: torch.Tensor,
) -> Selected:
    """Attend one query per request through the selection.

    Args:
        workspace: The buffers; at least B requests and `max_blocks` blocks.
        query, k_pages, v_pool, block_table, seq_lens, scale, v_block_tokens: docs/design.md.
        max_blocks: P, V blocks that cover the longest request (host).
        selection: The rule.
        tail: "renormalize" or "drop".
        hot_cache: The hot V cache; this call is one epoch of it.
        layer: Layer of the host pool.
        out: [B, Hq, D] model dtype, GPU, written.

    Returns:
        What was selected: views of the workspace, valid until the next call.

    Raises:
        ValueError: More requests than the workspace has room for.

    Graph-safe: fixed grids, no allocation with the extension, no host sync. A second stream is forked
    from the current one and joined before attention.
    """
    num_requests, num_query_heads, _ = query.shape
    num_kv_heads = k_pages.shape[1]
    if num_requests > workspace.max_requests:
        raise ValueError(
            f"query: has {num_requests} requests; the workspace has room for "
            f"{workspace.max_requests}"
        )
    columns = _columns(selection, max_blocks)
    block_lse = _front(workspace.block_lse, num_requests, num_query_heads, max_blocks)
    lists = (num_requests, num_kv_heads)
    selected = Selected(
        _front(workspace.blocks, *lists, columns),
        _front(workspace.counts, *lists),
        _front(workspace.mass, *lists),
    )
    fetched = Fetched(_front(workspace.rows, *lists, columns), hot_cache.slots)

    def score(first_head: int, num_heads: int) -> None:
        launch_score(
            query,
            k_pages,
            block_table,
            seq_lens,
            scale,
            v_block_tokens,
            block_lse,
            first_head=first_head,
            num_heads=num_heads,
            new_epoch=hot_cache if first_head == 0 else None,
        )

    def select_and_fetch(first_head: int, num_heads: int, wave: int, in_waves: bool) -> None:
        if extension.available():
            torch.ops.kcache.select_fetch(
                block_lse,
                seq_lens,
                v_block_tokens,
                *selection_arguments(selection),
                first_head,
                num_heads,
                selected.blocks,
                selected.counts,
                selected.mass,
                block_table,
                v_pool,
                layer,
                fetched.rows,
                fetched.v_rows,
                hot_cache.table,
                hot_cache.slot_word,
                hot_cache.state,
                hot_cache.counters,
                workspace.miss_list if in_waves else None,
                wave,
            )
            if in_waves:
                torch.ops.kcache.copy_misses(
                    workspace.miss_list,
                    hot_cache.state,
                    wave,
                    v_pool,
                    v_block_tokens,
                    fetched.v_rows,
                    COPY_THREAD_BLOCKS,
                )
            return
        scratch = _front(workspace.scratch, *lists, max_blocks)
        span = {"first_head": first_head, "num_heads": num_heads}
        launch_select(
            block_lse,
            seq_lens,
            v_block_tokens,
            selection,
            selected,
            scratch=scratch,
            hot_cache=hot_cache,
            **span,
        )
        launch_fetch(
            selected, block_table, v_pool, v_block_tokens, hot_cache, layer, fetched, **span
        )

    waves = min(workspace.waves, num_kv_heads) if math.prod(lists) >= WAVE_LISTS else 1
    if waves == 1 or workspace.side is None:
        score(0, num_kv_heads)
        select_and_fetch(0, num_kv_heads, 0, False)
    else:
        main = torch.cuda.current_stream()
        side = workspace.side
        edges = [num_kv_heads * wave // waves for wave in range(waves + 1)]
        for wave in range(waves):
            first_head, num_heads = edges[wave], edges[wave + 1] - edges[wave]
            score(first_head, num_heads)
            side.wait_stream(main)
            with torch.cuda.stream(side):
                select_and_fetch(first_head, num_heads, wave, True)
        main.wait_stream(side)
    attend_blocks(
        query,
        k_pages,
        v_pool,
        fetched,
        selected,
        block_table,
        seq_lens,
        scale,
        v_block_tokens,
        tail,
        block_lse,
        out=out,
        buffers=workspace.attend,
    )
    return selected
