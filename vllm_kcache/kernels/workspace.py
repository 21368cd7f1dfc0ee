# SPDX-License-Identifier: Apache-2.0
"""A decode batch, and the buffers, stream and events of its steps: made once, nothing allocated
in a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels import attend_plan, score_plan
from vllm_kcache.kernels.select import Lists
from vllm_kcache.types import MOST_LISTED_TOGETHER, MOST_QUERY_HEADS_GPU, Selected, Selection

# Higher than that of the stream that scores; otherwise scoring starves the fetch.
FETCH_PRIORITY = -1

# Name of a buffer -> values and dtype.
Buffers = Mapping[str, tuple[int, torch.dtype]]


@dataclass(frozen=True)
class DecodeBatch:
    """One query token for each request of a step.

    Attributes:
        query: [B, Hq, D] model dtype, GPU. May be strided over B.
        block_table: [B, MB] int32, GPU. Columns past a row's length are not used.
        seq_lens: [B] int32, GPU. Tokens, the current one included; 0 marks a padded row.
        scale: factor on the scores.
        max_blocks: P, V blocks of the longest request there may be: part of a captured shape.
        spans: [B, 2] int32, GPU; None where each row is a request of its own. Of a row that is one
            of several tokens of a request, its rows before it and after it: side by side, in
            order, of one block table. Those before may belong to another batch.
        most_tokens: of a request there may be: part of a captured shape.
        sinks: [Hq], GPU. Learned scores beside those of the tokens (reference/sinks.py).
        soft_cap: bound of the scaled scores (reference/soft_cap.py); None for none.
    """

    query: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    scale: float
    max_blocks: int
    spans: torch.Tensor | None = None
    most_tokens: int = 1
    sinks: torch.Tensor | None = None
    soft_cap: float | None = None

    @property
    def num_requests(self) -> int:
        return self.query.shape[0]

    def scored_together(self, group: int) -> int:
        """Most rows of a request that are scored at once, by query heads of a KV head."""
        if self.spans is None:
            return 1
        return scored_together(self.most_tokens, group)

    def listed_together(self, shape: CacheShape) -> int:
        """Most rows of a request that have one list: what `select_and_fetch` and `attend_blocks`
        of int8 rows take as `together`."""
        # csrc/attend.cu is compiled for lists of several rows or for a cap, not for both.
        if self.spans is None or self.soft_cap is not None:
            return 1
        return listed_together(shape, self.most_tokens)


def scored_together(most_tokens: int, group: int) -> int:
    """Of so many rows of a request, how many are scored at once."""
    return max(1, min(most_tokens, MOST_QUERY_HEADS_GPU // group))


def listed_together(shape: CacheShape, most_tokens: int) -> int:
    """Of so many rows of a request, how many have one list: csrc/attend.cu knows such lists."""
    if not attend_plan.on_tensor_cores(shape):
        return 1
    return min(scored_together(most_tokens, shape.group), MOST_LISTED_TOGETHER)


@dataclass(frozen=True)
class Followers:
    """Thread blocks that select and fetch beside scoring.

    Attributes:
        most: of the launch.
        least: of these, how many work where nothing was missing in the step before; the more was,
            the more do.
    """

    most: int
    least: int


def workspace_buffers(
    shape: CacheShape,
    selection: Selection,
    max_requests: int,
    max_blocks: int,
    decode_tokens: int = 1,
) -> dict[str, tuple[int, torch.dtype]]:
    """What `DecodeWorkspace.make` allocates for batches of up to so many requests and V blocks.

    Args:
        decode_tokens: Most tokens of a request in a batch.
    """
    heads, lists = max_requests * shape.num_query_heads, max_requests * shape.num_kv_heads
    chunks = score_plan.num_chunks(shape, max_blocks)
    together = listed_together(shape, decode_tokens)
    places = lists * columns_of(selection, max_blocks, together)
    parts = attend_plan.most_parts(lists)
    parts *= attend_plan.rows_of_list(shape.group, selection)
    coded = 0 if shape.k_bits == 16 else heads
    return {
        "block_lse": (heads * max_blocks, torch.float32),
        "chunk_lse": (heads * chunks, torch.float32),
        "chunk_max": (coded * chunks, torch.float32),
        "blocks": (places, torch.int32),
        "rows": (places, torch.int32),
        "counts": (lists, torch.int32),
        "mass": (lists, torch.float32),
        "lse": (heads, torch.float32),
        "dropped": (coded, torch.float32),
        "code_query": (coded * shape.head_size, torch.float32),
        "code_bias": (coded, torch.float32),
        "signals": (lists, torch.int32),
        "sums": (parts * score_plan.padded(shape.head_size), torch.float32),
        "weights": (parts * 2, torch.float32),
        "arrivals": (lists, torch.int32),
    }


def columns_of(selection: Selection, max_blocks: int, together: int = 1) -> int:
    """N: the longest list there may be, of so many rows."""
    if selection.top_n is None:
        return max_blocks
    return min(selection.top_n * together, max_blocks)


@dataclass
class DecodeWorkspace:
    """Buffers of decode steps, shared by all layers and batch sizes.

    Attributes:
        max_requests, max_blocks: of a batch.
        block_lse ... signals: flat, see `select.Lists`; `chunk_max` is empty with k_bits 16.
            `signals` is zero between steps.
        code_query, code_bias: [B, Hq, D] and [B, Hq] float32, GPU. The query in the form that codes
            are scored with, and what its score adds to each (reference/codes.py); empty with k_bits
            16.
        sums, weights, arrivals: parts of attention (kernels/attend.py). `arrivals` is zero between
            launches.
        fetch_stream: where followers run; None on the CPU (the interpreter).
        multiprocessors: of the GPU; 0 on the CPU.
        dependent: the GPU knows dependent launches (kernels/dependent.py).
        begun, followed: events around the followers; None on the CPU.
    """

    max_requests: int
    max_blocks: int
    block_lse: torch.Tensor
    chunk_lse: torch.Tensor
    chunk_max: torch.Tensor
    blocks: torch.Tensor
    rows: torch.Tensor
    counts: torch.Tensor
    mass: torch.Tensor
    lse: torch.Tensor
    dropped: torch.Tensor
    code_query: torch.Tensor
    code_bias: torch.Tensor
    signals: torch.Tensor
    sums: torch.Tensor
    weights: torch.Tensor
    arrivals: torch.Tensor
    fetch_stream: torch.cuda.Stream | None
    multiprocessors: int
    dependent: bool
    begun: torch.cuda.Event | None
    followed: torch.cuda.Event | None

    @classmethod
    def make(
        cls,
        shape: CacheShape,
        selection: Selection,
        max_requests: int,
        max_blocks: int,
        device: torch.device | str,
        decode_tokens: int = 1,
    ) -> DecodeWorkspace:
        """Allocate `workspace_buffers` on the device."""
        device = torch.device(device)
        buffers = workspace_buffers(shape, selection, max_requests, max_blocks, decode_tokens)
        on_gpu = device.type == "cuda"
        return cls(
            max_requests=max_requests,
            max_blocks=max_blocks,
            **{
                name: torch.zeros(size, dtype=dtype, device=device)
                for name, (size, dtype) in buffers.items()
            },
            fetch_stream=torch.cuda.Stream(device, FETCH_PRIORITY) if on_gpu else None,
            multiprocessors=_multiprocessors(device) if on_gpu else 0,
            dependent=on_gpu and torch.cuda.get_device_capability(device) >= (9, 0),
            begun=torch.cuda.Event() if on_gpu else None,
            followed=torch.cuda.Event() if on_gpu else None,
        )

    def views(self, view: LayerView, batch: DecodeBatch) -> Lists:
        """The buffers in the shape of one batch.

        Raises:
            ValueError: the batch does not fit.
        """
        requests, max_blocks, shape = batch.num_requests, batch.max_blocks, view.shape
        if requests > self.max_requests or max_blocks > self.max_blocks:
            raise ValueError(
                f"workspace: made for {self.max_requests} requests of {self.max_blocks} V blocks; "
                f"this batch has {requests} of {max_blocks}"
            )
        lists = (requests, shape.num_kv_heads)
        columns = columns_of(view.selection, max_blocks, batch.listed_together(shape))
        places = (*lists, columns)
        heads = (requests, shape.num_query_heads)
        chunks = (*heads, score_plan.num_chunks(shape, max_blocks))
        selected = Selected(
            front(self.blocks, *places),
            front(self.counts, *lists),
            front(self.mass, *lists),
            front(self.lse, *heads),
            front(self.dropped, *heads) if shape.k_bits != 16 else None,
        )
        return Lists(
            batch.seq_lens,
            batch.block_table,
            front(self.block_lse, *heads, max_blocks),
            front(self.chunk_lse, *chunks),
            score_plan.chunk_blocks(shape),
            selected,
            front(self.rows, *places),
            self.signals,
            front(self.chunk_max, *chunks) if shape.k_bits != 16 else None,
        )

    def selected_by(self, view: LayerView, batch: DecodeBatch, lists: Lists) -> Lists:
        """What is selected by: the scores that scoring writes.

        Benchmarks override this to select by recorded scores, with random K in the pages. It is
        called behind scoring; with followers before it, since they do not wait for another kernel.
        """
        return lists


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def front(buffer: torch.Tensor, *shape: int) -> torch.Tensor:
    """The first values of a flat buffer in a shape; the same memory."""
    size = 1
    for extent in shape:
        size *= extent
    return buffer[:size].view(shape)
