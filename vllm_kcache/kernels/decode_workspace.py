# SPDX-License-Identifier: Apache-2.0
"""Buffers, streams and events of decode steps: made once, so that a step allocates nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vllm_kcache.cache.hot_cache import MAX_WAVES
from vllm_kcache.kernels import extension
from vllm_kcache.kernels.attend_plan import AttendBuffers
from vllm_kcache.kernels.dependent import has_dependent_launches
from vllm_kcache.kernels.score_plan import num_chunks
from vllm_kcache.types import Selected, Selection

# Higher than that of the stream that scores; otherwise scoring starves the fetch.
FETCH_PRIORITY = -1


@dataclass
class DecodeWorkspace:
    """Buffers of `decode_step`, made once and shared by all layers and batch sizes.

    Attributes:
        block_lse: [B * Hq * P] float32, GPU.
        chunk_blocks: V blocks of a chunk that scoring leaves a sum of; 0 when it leaves none.
        chunk_lse: [B * Hq * C] float32, GPU.
        blocks, rows: [B * Hkv * N] int32, GPU.
        counts, mass: [B * Hkv] int32 and float32, GPU.
        lse: [B * Hq] float32, GPU.
        scratch: [B * Hkv * P] int32, GPU; empty when the extension selects.
        miss_list: [B * Hkv * N, 2] int32, GPU; empty unless asked for.
        parts_scored: [B * Hkv] int32, GPU. Zero between steps.
        attend: partial results of attention.
        fetch_stream, copy_stream: streams of high priority; None on the CPU (the interpreter).
        multiprocessors: of the GPU, where the extension can follow the scoring; otherwise 0.
        dependent: the GPU knows dependent launches (kernels/dependent.py).
        begun: event before scoring; None on the CPU.
        scored, listed, fetched: events of the waves; none on the CPU.
    """

    max_requests: int
    num_query_heads: int
    num_kv_heads: int
    max_blocks: int
    chunk_blocks: int
    block_lse: torch.Tensor
    chunk_lse: torch.Tensor
    blocks: torch.Tensor
    rows: torch.Tensor
    counts: torch.Tensor
    mass: torch.Tensor
    lse: torch.Tensor
    scratch: torch.Tensor
    miss_list: torch.Tensor
    parts_scored: torch.Tensor
    attend: AttendBuffers
    fetch_stream: torch.cuda.Stream | None
    copy_stream: torch.cuda.Stream | None
    multiprocessors: int
    dependent: bool
    begun: torch.cuda.Event | None
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
        chunk_blocks: int = 0,
    ) -> DecodeWorkspace:
        """Allocate for batches of up to `max_requests` requests of up to `max_blocks` V blocks.

        Args:
            with_miss_list: for plans with `copy_thread_blocks`.
            chunk_blocks: `score_plan.chunk_blocks` lets the extension take the sums that
                scoring leaves behind; with 0 it reads all scores for them.
        """
        device = torch.device(device)
        lists = max_requests * num_kv_heads
        places = lists * _columns(selection, max_blocks)
        on_gpu = device.type == "cuda"
        group, clipped = num_query_heads // num_kv_heads, selection.clip is not None

        def integers(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        return cls(
            max_requests=max_requests,
            num_query_heads=num_query_heads,
            num_kv_heads=num_kv_heads,
            max_blocks=max_blocks,
            chunk_blocks=chunk_blocks,
            block_lse=torch.empty(max_requests * num_query_heads * max_blocks, device=device),
            chunk_lse=torch.empty(
                max_requests * num_query_heads * num_chunks(max_blocks, chunk_blocks),
                device=device,
            ),
            blocks=integers(places),
            rows=integers(places),
            counts=integers(lists),
            mass=torch.empty(lists, device=device),
            lse=torch.empty(max_requests * num_query_heads, device=device),
            scratch=integers(0 if extension.available() else lists * max_blocks),
            miss_list=integers(places if with_miss_list else 0, 2),
            parts_scored=torch.zeros(lists, dtype=torch.int32, device=device),
            attend=AttendBuffers.make(lists, group, head_size, device, clipped),
            fetch_stream=torch.cuda.Stream(device, FETCH_PRIORITY) if on_gpu else None,
            copy_stream=torch.cuda.Stream(device, FETCH_PRIORITY) if on_gpu else None,
            multiprocessors=_multiprocessors(device) if on_gpu and extension.available() else 0,
            dependent=has_dependent_launches(device),
            begun=torch.cuda.Event() if on_gpu else None,
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
        chunk_blocks: int = 0,
    ) -> int:
        """GPU memory that `make` takes."""
        lists = max_requests * num_kv_heads
        places = lists * _columns(selection, max_blocks)
        scores = max_blocks + num_chunks(max_blocks, chunk_blocks)
        words = max_requests * num_query_heads * (scores + 1) + 2 * places + 3 * lists
        words += 0 if extension.available() else lists * max_blocks
        words += 2 * places if with_miss_list else 0
        group = num_query_heads // num_kv_heads
        return words * 4 + AttendBuffers.bytes(lists, group, head_size, selection.clip is not None)

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
            front(self.blocks, places),
            front(self.counts, lists),
            front(self.mass, lists),
            front(self.lse, (num_requests, self.num_query_heads)),
        )
        return front(self.block_lse, scores), selected, front(self.rows, places)

    def chunk_view(self, num_requests: int, max_blocks: int) -> torch.Tensor | None:
        """chunk_lse [B, Hq, C] of one batch; None where chunks leave no sums."""
        if not self.chunk_blocks:
            return None
        chunks = num_chunks(max_blocks, self.chunk_blocks)
        return front(self.chunk_lse, (num_requests, self.num_query_heads, chunks))


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _columns(selection: Selection, max_blocks: int) -> int:
    return max_blocks if selection.top_n is None else min(selection.top_n, max_blocks)


def front(buffer: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    size = 1
    for extent in shape:
        size *= extent
    return buffer[:size].view(shape)
