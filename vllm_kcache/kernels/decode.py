# SPDX-License-Identifier: Apache-2.0
"""One decode step of one layer: score, select and fetch, attend, in one or more streams.

In a large batch a second kernel follows the scoring on a stream of high priority: it selects and
fetches each list as soon as it is scored. Where that kernel cannot run (no extension, a small GPU),
the batch is cut in waves of KV heads: while the GPU scores wave i + 1, the link fetches what wave i
selected, and attention over the first waves runs beside the fetch of the last. A small batch is one
wave on one stream: there the launches cost more than the overlap gains. The plan depends on shapes
only, so all of it is captured.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_kcache.cache.hot_cache import HotCache
from vllm_kcache.kernels import extension
from vllm_kcache.kernels.attend import attend_blocks
from vllm_kcache.kernels.decode_plan import DecodePlan, plan_decode
from vllm_kcache.kernels.decode_workspace import DecodeWorkspace, front
from vllm_kcache.kernels.fetch import check_geometry, launch_fetch
from vllm_kcache.kernels.score import launch_score
from vllm_kcache.kernels.select import launch_select, selection_arguments
from vllm_kcache.types import Fetched, Selected, Selection, Tail

# For benchmarks: called on the stream that scores with (step, first KV head, one past the last),
# captured like the rest. It may overwrite these heads' block_lse, and the sums in chunk_lse with it
# (benchmarks/replay.py).
after_score: Callable[[DecodeStep, int, int], None] | None = None


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
    after_write: bool = False,
) -> torch.Tensor:
    """Score, select, fetch and attend for one query of each request; `write_kv` comes before.

    Args:
        workspace: buffers; the batch must fit. Its contents are those of the last step.
        max_blocks: P, V blocks of the longest request there may be: part of the captured shape.
        tail: "clip" takes its bound from the selection's mass threshold.
        hot_cache, layer: where V blocks are resident; this call is one epoch of it.
        out: [B, Hq, D] model dtype, GPU. Written and returned.
        plan: layout of the step; from `plan_decode` unless given. Without a miss list in the
            workspace each list copies its own misses.
        after_write: the launch before this call on the stream is `write_kv`, `dependent` where the
            workspace is, of one token for each of these requests and nothing else.
    Other arguments: as for the steps in `vllm_kcache.ops`.

    Graph-safe: no allocation, no host sync, grids that depend on shapes only. Uses the current
    stream, and a second one that is joined before the call returns.
    """
    check_geometry(hot_cache, v_pool, v_block_tokens, layer)
    num_requests = query.shape[0]
    if num_requests == 0:
        return out
    if plan is None:
        block_bytes = v_block_tokens * query.shape[2] * query.element_size()
        plan = plan_decode(
            num_requests, k_pages.shape[1], max_blocks, block_bytes, workspace.multiprocessors
        )
        if workspace.miss_list.numel() == 0 and not plan.followers:
            plan = DecodePlan(plan.waves)
    block_lse, selected, rows = workspace.views(num_requests, max_blocks, selection)
    step = DecodeStep(
        workspace, query, k_pages, v_pool, block_table, seq_lens, scale, v_block_tokens, selection,
        tail, hot_cache, layer, out, block_lse, selected, Fetched(rows, hot_cache.slots), plan,
        workspace.chunk_view(num_requests, max_blocks), after_write,
    )  # fmt: skip
    step.run()
    return out


@functools.cache
def _second_buffer(name: str, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Made in the warm-up of a capture, which runs eagerly."""
    return torch.empty(shape, device=device)


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
    chunk_lse: torch.Tensor | None = None
    after_write: bool = False

    @property
    def dependent(self) -> bool:
        """Whether launches are dependent: where there are waves, streams are joined instead."""
        return self.workspace.dependent and len(self.wave_bounds()) == 2

    def run(self) -> None:
        """All of it."""
        bounds = self.wave_bounds()
        if len(bounds) == 2:
            self.score_and_fetch()
            self.attend(0, bounds[-1])
            return
        self.score_and_fetch(join=False)
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
        if self.plan.followers:
            self._score_and_follow()
            return
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

    def _score_and_follow(self) -> None:
        """Scoring, and the kernel that selects and fetches behind it, joined.

        Scoring is launched first: should something run kernels one after the other, the one that
        waits must be the second.
        """
        workspace, cache, selected = self.workspace, self.hot_cache, self.selected
        assert workspace.fetch_stream is not None
        assert workspace.begun is not None
        scored = self
        if after_score is not None:
            # The follower does not wait for a kernel after scoring: its scores come before.
            scored = self._with_second_scores()
            after_score(scored, 0, self.k_pages.shape[1])
        main = torch.cuda.current_stream(self.query.device)
        workspace.begun.record(main)
        parts = launch_score(
            self.query, self.k_pages, self.block_table, self.seq_lens, self.scale,
            self.v_block_tokens, self.block_lse, chunk_lse=self.chunk_lse,
            parts_scored=workspace.parts_scored, dependent=self.dependent,
            after_write=self.after_write,
        )  # fmt: skip
        workspace.fetch_stream.wait_event(workspace.begun)
        with torch.cuda.stream(workspace.fetch_stream):
            torch.ops.kcache.follow_scores(
                scored.block_lse, self.seq_lens, self.v_block_tokens,
                *selection_arguments(self.selection), selected.blocks, selected.counts,
                selected.mass, selected.lse, scored.chunk_lse, workspace.chunk_blocks,
                self.block_table, self.v_pool, self.layer,
                self.fetched.rows, cache.slots, cache.table, cache.slot_word, cache.state,
                cache.counters, workspace.parts_scored, parts, self.plan.followers,
                self.plan.least_followers or self.plan.followers,
            )  # fmt: skip
            workspace.fetched[0].record(workspace.fetch_stream)
        main.wait_event(workspace.fetched[0])

    def _with_second_scores(self) -> DecodeStep:
        """This step with other buffers of scores."""
        chunk_lse = self.chunk_lse
        if chunk_lse is not None:
            chunk_lse = _second_buffer("chunk_lse", chunk_lse.shape, chunk_lse.device)
        block_lse = _second_buffer("block_lse", self.block_lse.shape, self.block_lse.device)
        return dataclasses.replace(self, block_lse=block_lse, chunk_lse=chunk_lse)

    def _score(self, first_head: int, last_head: int, new_epoch: bool) -> None:
        launch_score(
            self.query, self.k_pages, self.block_table, self.seq_lens, self.scale,
            self.v_block_tokens, self.block_lse,
            first_head=first_head, num_heads=last_head - first_head,
            new_epoch=self.hot_cache if new_epoch else None, chunk_lse=self.chunk_lse,
            dependent=self.dependent, after_write=self.after_write,
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
                scratch=front(
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
            selected.counts, selected.mass, selected.lse, self.chunk_lse, workspace.chunk_blocks,
            self.block_table, self.v_pool, self.layer, self.fetched.rows, cache.slots, cache.table,
            cache.slot_word, cache.state, cache.counters, misses, wave, self.dependent,
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
            clip=self.selection.clip,
            buffers=self.workspace.attend,
            first_head=first_head,
            last_head=last_head,
            dependent=self.dependent,
        )
