# SPDX-License-Identifier: Apache-2.0
"""One decode step of one layer: score, select and fetch, attend, in one or two streams.

A large batch is cut in waves of KV heads. While the GPU scores wave i + 1, the link fetches what
wave i selected, on a stream of high priority that is forked and joined inside the step; attention
over the first waves then runs beside the fetch of the last. A small batch is one wave on one
stream: there the launches cost more than the overlap gains. The plan depends on shapes only, so
all of it is captured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from vllm_kcache.cache.hot_cache import MAX_WAVES, HotCache
from vllm_kcache.kernels import extension
from vllm_kcache.kernels.attend import AttendBuffers, attend_blocks
from vllm_kcache.kernels.decode_plan import DecodePlan, plan_decode
from vllm_kcache.kernels.fetch import check_geometry, launch_fetch
from vllm_kcache.kernels.score import launch_score
from vllm_kcache.kernels.select import launch_select, selection_arguments
from vllm_kcache.types import Fetched, Selected, Selection, Tail

# Higher than that of the stream that scores; otherwise scoring starves the fetch.
FETCH_PRIORITY = -1
# For benchmarks: called on the stream that scores with (step, first KV head, one past the last),
# captured like the rest. It may overwrite these heads' block_lse (benchmarks/replay.py).
after_score: Callable[[DecodeStep, int, int], None] | None = None


@dataclass
class DecodeWorkspace:
    """Buffers of `decode_step`, made once and shared by all layers and batch sizes.

    Attributes:
        block_lse: [B * Hq * P] float32, GPU.
        blocks, rows: [B * Hkv * N] int32, GPU.
        counts, mass: [B * Hkv] int32 and float32, GPU.
        scratch: [B * Hkv * P] int32, GPU; empty when the extension selects.
        miss_list: [B * Hkv * N, 2] int32, GPU; empty unless asked for.
        attend: partial results of attention.
        fetch_stream, copy_stream: streams of high priority; None on the CPU (the interpreter).
        scored, listed, fetched: events of the waves; none on the CPU.
    """

    max_requests: int
    num_query_heads: int
    num_kv_heads: int
    max_blocks: int
    block_lse: torch.Tensor
    blocks: torch.Tensor
    rows: torch.Tensor
    counts: torch.Tensor
    mass: torch.Tensor
    scratch: torch.Tensor
    miss_list: torch.Tensor
    attend: AttendBuffers
    fetch_stream: torch.cuda.Stream | None
    copy_stream: torch.cuda.Stream | None
    scored: list[torch.cuda.Event] = field(default_factory=list)
    listed: list[torch.cuda.Event] = field(default_factory=list)
    fetched: list[torch.cuda.Event] = field(default_factory=list)

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
        with_miss_list: bool = False,
    ) -> DecodeWorkspace:
        """Allocate for batches of up to `max_requests` requests of up to `max_blocks` V blocks.

        Args:
            with_miss_list: for plans with `copy_thread_blocks`.
        """
        device = torch.device(device)
        lists = max_requests * num_kv_heads
        places = lists * _columns(selection, max_blocks)
        on_gpu = device.type == "cuda"

        def integers(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        return cls(
            max_requests=max_requests,
            num_query_heads=num_query_heads,
            num_kv_heads=num_kv_heads,
            max_blocks=max_blocks,
            block_lse=torch.empty(max_requests * num_query_heads * max_blocks, device=device),
            blocks=integers(places),
            rows=integers(places),
            counts=integers(lists),
            mass=torch.empty(lists, device=device),
            scratch=integers(0 if extension.available() else lists * max_blocks),
            miss_list=integers(places if with_miss_list else 0, 2),
            attend=AttendBuffers.make(lists, num_query_heads // num_kv_heads, head_size, device),
            fetch_stream=torch.cuda.Stream(device, FETCH_PRIORITY) if on_gpu else None,
            copy_stream=torch.cuda.Stream(device, FETCH_PRIORITY) if on_gpu else None,
            scored=[torch.cuda.Event() for _ in range(MAX_WAVES if on_gpu else 0)],
            listed=[torch.cuda.Event() for _ in range(MAX_WAVES if on_gpu else 0)],
            fetched=[torch.cuda.Event() for _ in range(MAX_WAVES if on_gpu else 0)],
        )

    @staticmethod
    def bytes(
        max_requests: int,
        num_query_heads: int,
        num_kv_heads: int,
        head_size: int,
        max_blocks: int,
        selection: Selection,
        with_miss_list: bool = False,
    ) -> int:
        """GPU memory that `make` takes."""
        lists = max_requests * num_kv_heads
        places = lists * _columns(selection, max_blocks)
        words = max_requests * num_query_heads * max_blocks + 2 * places + 2 * lists
        words += 0 if extension.available() else lists * max_blocks
        words += 2 * places if with_miss_list else 0
        group = num_query_heads // num_kv_heads
        return words * 4 + AttendBuffers.bytes(lists, group, head_size)

    def views(
        self, num_requests: int, max_blocks: int, selection: Selection
    ) -> tuple[torch.Tensor, Selected, torch.Tensor]:
        """block_lse [B, Hq, P], the selection and its rows [B, Hkv, N], for one batch."""
        if num_requests > self.max_requests or max_blocks > self.max_blocks:
            raise ValueError(
                f"workspace: made for {self.max_requests} requests of {self.max_blocks} V blocks; "
                f"this batch has {num_requests} of {max_blocks}"
            )
        lists = (num_requests, self.num_kv_heads)
        places = (*lists, _columns(selection, max_blocks))
        scores = (num_requests, self.num_query_heads, max_blocks)
        selected = Selected(
            _front(self.blocks, places), _front(self.counts, lists), _front(self.mass, lists)
        )
        return _front(self.block_lse, scores), selected, _front(self.rows, places)


def _columns(selection: Selection, max_blocks: int) -> int:
    return max_blocks if selection.top_n is None else min(selection.top_n, max_blocks)


def _front(buffer: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    size = 1
    for extent in shape:
        size *= extent
    return buffer[:size].view(shape)


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
    plan: DecodePlan | None = None,
) -> torch.Tensor:
    """Score, select, fetch and attend for one query of each request; `write_kv` comes before.

    Args:
        workspace: buffers; the batch must fit. Its contents are those of the last step.
        max_blocks: P, V blocks of the longest request there may be: part of the captured shape.
        hot_cache, layer: where V blocks are resident; this call is one epoch of it.
        out: [B, Hq, D] model dtype, GPU. Written and returned.
        plan: layout of the step; from `plan_decode` unless given. Without a miss list in the
            workspace each list copies its own misses.
    Other arguments: as for the steps in `vllm_kcache.ops`.

    Graph-safe: no allocation, no host sync, grids that depend on shapes only. Uses the current
    stream, and a second one that is joined before the call returns.
    """
    check_geometry(hot_cache, v_pool, v_block_tokens, layer)
    num_requests = query.shape[0]
    if num_requests == 0:
        return out
    if plan is None:
        tokens = max_blocks * v_block_tokens
        plan = plan_decode(
            num_requests, k_pages.shape[1], tokens, query.shape[2], query.element_size()
        )
        if workspace.miss_list.numel() == 0:
            plan = DecodePlan(plan.waves)
    block_lse, selected, rows = workspace.views(num_requests, max_blocks, selection)
    step = DecodeStep(
        workspace, query, k_pages, v_pool, block_table, seq_lens, scale, v_block_tokens, selection,
        tail, hot_cache, layer, out, block_lse, selected, Fetched(rows, hot_cache.slots), plan,
    )  # fmt: skip
    step.run()
    return out


@dataclass(frozen=True)
class DecodeStep:
    """The arguments of `decode_step` in one place, and its parts."""

    workspace: DecodeWorkspace
    query: torch.Tensor
    k_pages: torch.Tensor
    v_pool: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    scale: float
    v_block_tokens: int
    selection: Selection
    tail: Tail
    hot_cache: HotCache
    layer: int
    out: torch.Tensor
    block_lse: torch.Tensor
    selected: Selected
    fetched: Fetched
    plan: DecodePlan

    def run(self) -> None:
        """All of it."""
        bounds = self.wave_bounds()
        self.score_and_fetch(join=False)
        if len(bounds) == 2:
            self.attend(0, bounds[-1])
            return
        # All but the last wave were fetched while the last was scored, or nearly so.
        main = torch.cuda.current_stream(self.query.device)
        main.wait_event(self.workspace.fetched[len(bounds) - 3])
        self.attend(0, bounds[-2])
        main.wait_event(self.workspace.fetched[len(bounds) - 2])
        self.attend(bounds[-2], bounds[-1])

    def wave_bounds(self) -> list[int]:
        """First KV head of each wave, and one past the last."""
        return self.plan.wave_bounds(self.k_pages.shape[1])

    def score_and_fetch(self, join: bool = True) -> None:
        """Everything before attention.

        Args:
            join: make the current stream wait for the fetches; `run` waits for them piecemeal.
        """
        bounds = self.wave_bounds()
        if len(bounds) == 2:
            self._score(0, bounds[-1], new_epoch=True)
            self.select_fetch(0, 0, bounds[-1])
            return
        workspace = self.workspace
        copy_stream = workspace.copy_stream if self.plan.copy_stream else workspace.fetch_stream
        assert workspace.fetch_stream is not None
        assert copy_stream is not None
        main = torch.cuda.current_stream(self.query.device)
        for wave, (first, last) in enumerate(itertools.pairwise(bounds)):
            self._score(first, last, new_epoch=wave == 0)
            workspace.scored[wave].record(main)
            workspace.fetch_stream.wait_event(workspace.scored[wave])
            with torch.cuda.stream(workspace.fetch_stream):
                self._select(wave, first, last)
            if copy_stream is not workspace.fetch_stream:
                workspace.listed[wave].record(workspace.fetch_stream)
                copy_stream.wait_event(workspace.listed[wave])
            with torch.cuda.stream(copy_stream):
                self._copy(wave, first)
                workspace.fetched[wave].record(copy_stream)
        if join:
            main.wait_event(workspace.fetched[len(bounds) - 2])

    def _score(self, first_head: int, last_head: int, new_epoch: bool) -> None:
        launch_score(
            self.query, self.k_pages, self.block_table, self.seq_lens, self.scale,
            self.v_block_tokens, self.block_lse,
            first_head=first_head, num_heads=last_head - first_head,
            new_epoch=self.hot_cache if new_epoch else None,
        )  # fmt: skip
        if after_score is not None:
            after_score(self, first_head, last_head)

    def select_fetch(self, wave: int, first_head: int, last_head: int) -> None:
        """Selection and fetch of one wave, on the current stream."""
        self._select(wave, first_head, last_head)
        self._copy(wave, first_head)

    def _select(self, wave: int, first_head: int, last_head: int) -> None:
        """Select and look up; copy, too, unless the plan leaves that to `_copy`."""
        num_heads = last_head - first_head
        cache, selected, workspace = self.hot_cache, self.selected, self.workspace
        if not extension.available():
            launch_select(
                self.block_lse, self.seq_lens, self.v_block_tokens, self.selection, selected,
                first_head=first_head, num_heads=num_heads,
                scratch=_front(
                    workspace.scratch, (*selected.counts.shape, self.block_lse.shape[2])
                ),
                hot_cache=cache,
            )  # fmt: skip
            launch_fetch(
                selected, self.block_table, self.v_pool, self.v_block_tokens, cache, self.layer,
                self.fetched, first_head=first_head, num_heads=num_heads,
            )  # fmt: skip
            return
        misses = self._miss_list(first_head) if self.plan.copy_thread_blocks else None
        torch.ops.kcache.select_fetch(
            self.block_lse, self.seq_lens, self.v_block_tokens,
            *selection_arguments(self.selection), first_head, num_heads, selected.blocks,
            selected.counts, selected.mass, self.block_table, self.v_pool, self.layer,
            self.fetched.rows, cache.slots, cache.table, cache.slot_word, cache.state,
            cache.counters, misses, wave,
        )  # fmt: skip

    def _copy(self, wave: int, first_head: int) -> None:
        """Copy the misses that `_select` listed, if it did."""
        cache, thread_blocks = self.hot_cache, self.plan.copy_thread_blocks
        if thread_blocks and extension.available():
            torch.ops.kcache.copy_misses(
                self._miss_list(first_head), cache.state, wave, self.v_pool, self.v_block_tokens,
                cache.slots, thread_blocks,
            )  # fmt: skip

    def _miss_list(self, first_head: int) -> torch.Tensor:
        """A wave's own part of the list: the next wave may be selected while this one is copied."""
        num_requests, _, columns = self.selected.blocks.shape
        return self.workspace.miss_list[num_requests * first_head * columns :]

    def attend(self, first_head: int, last_head: int) -> None:
        """Attention of a range of KV heads, whose rows are there."""
        attend_blocks(
            self.query,
            self.k_pages,
            self.v_pool,
            self.fetched,
            self.selected,
            self.block_table,
            self.seq_lens,
            self.scale,
            self.v_block_tokens,
            self.tail,
            self.block_lse,
            out=self.out,
            buffers=self.workspace.attend,
            first_head=first_head,
            last_head=last_head,
        )
