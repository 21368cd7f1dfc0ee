# SPDX-License-Identifier: Apache-2.0
"""V of a prefill on its way: earlier V streams in ahead of its use, new V streams out behind it.
With K codes in the pages, K goes with V.

Both run on streams of their own. Inbound, the next piece of context (of this layer or the next) is
gathered while the current one is attended. Outbound, new V is staged in GPU memory and written to
the host pool while later layers compute. `fence` orders the next step after everything outbound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels.context import (
    GPU_PROGRAMS,
    LINK_PROGRAMS,
    gather_context,
    patch_context,
    store_value,
)
from vllm_kcache.kernels.rows import LINK_BLOCKS, gather_rows, write_rows
from vllm_kcache.kernels.write import WriteParts


@dataclass(frozen=True)
class ContextPiece:
    """A run of earlier tokens for each request that prefills, gathered as one batch.

    Attributes:
        starts: [R] int32, GPU. First token of each run.
        lengths: [R] int32, GPU. Tokens of each run.
        first_rows: [R + 1] int32, GPU. Where each run begins in the scratch; the last is the total.
        max_length: Longest run, tokens.
        total: Tokens of all runs.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    first_rows: torch.Tensor
    max_length: int
    total: int


def plan_pieces(
    context_lens: list[int], scratch_tokens: int, page_tokens: int, device: torch.device
) -> list[ContextPiece]:
    """Cut the contexts of a batch into pieces that fit the scratch.

    Args:
        context_lens: Earlier tokens of each request that prefills; 0 for none.
        scratch_tokens: Rows of the scratch.
        page_tokens: S; pieces begin on page boundaries.
        device: Where the pieces' tensors go.

    Returns:
        Pieces in order; none without context.

    Raises:
        ValueError: The scratch cannot hold one page for each request with context.
    """
    having = sum(1 for length in context_lens if length)
    if not having:
        return []
    run_tokens = scratch_tokens // having // page_tokens * page_tokens
    if run_tokens == 0:
        raise ValueError(
            f"scratch_tokens={scratch_tokens}: must hold a page of {page_tokens} tokens for each "
            f"of {having} requests"
        )
    rows = []
    for start in range(0, max(context_lens), run_tokens):
        lengths = [max(0, min(run_tokens, length - start)) for length in context_lens]
        first_rows = [0]
        for length in lengths:
            first_rows.append(first_rows[-1] + length)
        rows.append((start, lengths, first_rows))
    # One transfer for the whole plan.
    flat: list[int] = []
    for start, lengths, first_rows in rows:
        flat += [start] * len(lengths) + lengths + first_rows
    packed = torch.tensor(flat, dtype=torch.int32)
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    pieces, at, count = [], 0, len(context_lens)
    for _, lengths, first_rows in rows:
        starts_at, lengths_at, rows_at = at, at + count, at + 2 * count
        at += 3 * count + 1
        pieces.append(
            ContextPiece(
                packed[starts_at:lengths_at],
                packed[lengths_at:rows_at],
                packed[rows_at:at],
                max(lengths),
                first_rows[-1],
            )
        )
    return pieces


class PrefillTransfer:
    """Streams, staging and scratch for V of prefills.

    The staging holds V of one layer: it leaves while the next layer's projections compute, which
    take longer at any prompt length, so a second buffer would only take blocks from the cache.

    Args:
        shape: Geometry of the layers.
        max_tokens: Most tokens of a step.
        scratch_tokens: Tokens of a context piece.
        device: The GPU. Takes its part of `GPUMemory.fixed_bytes` of it.
    """

    def __init__(
        self, shape: CacheShape, max_tokens: int, scratch_tokens: int, device: torch.device
    ) -> None:
        self.scratch_tokens = scratch_tokens
        row, dtype = (shape.num_kv_heads, shape.head_size), shape.dtype
        # K that is gathered ahead needs two places, K from the pages is there at once.
        places, staged = (2, 2) if shape.row.has_keys else (1, 1)
        self._staging = torch.empty((staged, max_tokens, *row), dtype=dtype, device=device)
        self._v_scratch = torch.empty((2, scratch_tokens, *row), dtype=dtype, device=device)
        self._k_scratch = torch.empty((places, scratch_tokens, *row), dtype=dtype, device=device)
        self._step_rows = torch.empty(0, dtype=torch.int32, device=device)
        self._written: torch.Tensor | None = None
        self._in = torch.cuda.Stream(device)
        self._out = torch.cuda.Stream(device)
        self._staged = torch.cuda.Event()
        self._read = [torch.cuda.Event(), torch.cuda.Event()]
        self._gathers = 0
        self._reading = 0
        self._ahead: tuple[tuple[int, int], int, torch.cuda.Event] | None = None
        # Slots of V on its way out: where it goes must stay what it is until it is there.
        self._outbound: torch.Tensor | None = None

    def set_num_slots(self, num_slots: int) -> None:
        """Serve a paged cache of M * S = `num_slots` token slots; takes 4 bytes of GPU for each."""
        device = self._step_rows.device
        self._step_rows = torch.full((num_slots,), -1, dtype=torch.int32, device=device)
        self._written = None

    def begin_step(self, slot_mapping: torch.Tensor) -> None:
        """Note which slots this step writes. Call once per step that prefills with context.

        Args:
            slot_mapping: [tokens] int64, GPU; -1 is padding.
        """
        if self._written is not None:
            self._step_rows.index_fill_(0, self._written, -1)
        # Padding goes to slot 0, which lies in vLLM's null block: no request owns it.
        valid = slot_mapping.clamp_min(0)
        rows = torch.arange(valid.shape[0], dtype=torch.int32, device=valid.device)
        rows = torch.where(slot_mapping >= 0, rows, -1)
        self._step_rows.index_copy_(0, valid, rows)
        self._written = valid

    def end_step(self) -> None:
        """Forget what was gathered ahead: pages may be reused in the next step."""
        self._ahead = None

    def store(
        self, view: LayerView, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Send new V, and K where rows hold it, to the host pool behind the computation.

        Args:
            view: The layer.
            key, value: [tokens, Hkv, D] model dtype, GPU. Copied on the current stream, so the next
                layer may overwrite them.
            slot_mapping: [tokens] int64, GPU; -1 is padding. The same for all layers of a step, and
                as it is until `fence`, which lets go of it.
        """
        main = torch.cuda.current_stream()
        main.wait_event(self._staged)
        staged = self._staging[:, : value.shape[0]]
        staged[0].copy_(value)
        if view.shape.row.has_keys:
            staged[1].copy_(key)
        self._out.wait_stream(main)
        with torch.cuda.stream(self._out):
            if view.shape.row.has_keys:
                write_rows(
                    view, staged[1], staged[0], slot_mapping, parts=WriteParts.ROW_HOST,
                    most_thread_blocks=LINK_BLOCKS,
                )  # fmt: skip
            else:
                store_value(staged[0], slot_mapping, view.v_pages)
            self._staged.record()
        self._outbound = slot_mapping

    def fence(self) -> None:
        """Make the current stream wait for all V on its way to the host pool."""
        if self._outbound is not None:
            torch.cuda.current_stream().wait_stream(self._out)
            self._outbound = None

    def gather(
        self,
        key: tuple[int, int],
        piece: ContextPiece,
        view: LayerView,
        new: tuple[torch.Tensor, torch.Tensor],
        page_table: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a piece of context, contiguous, ready on the current stream.

        Args:
            key: (layer, number of the piece), to match what was gathered ahead.
            piece: The runs.
            view: The layer.
            new: K and V of this step in this layer, [tokens, Hkv, D] model dtype, GPU.
            page_table: [R, MB] int32, GPU.

        Returns:
            keys, values: [total, Hkv, D] model dtype, GPU. Valid until the next call but one.
        """
        if not self.is_ahead(key):
            self.gather_ahead(key, piece, view, page_table)
        assert self._ahead is not None
        _, which, arrived = self._ahead
        self._ahead = None
        self._reading = which
        values = self._v_scratch[which, : piece.total]
        runs = (page_table, piece.starts, piece.lengths, piece.first_rows, piece.max_length)
        patched = [(values, new[1])]
        if view.shape.row.has_keys:
            keys = self._k_scratch[which, : piece.total]
            patched.append((keys, new[0]))
        else:
            keys = self._k_scratch[0, : piece.total]
            gather_context(view.k_pages, *runs, keys, GPU_PROGRAMS)
        torch.cuda.current_stream().wait_event(arrived)
        for there, written in patched:
            patch_context(there, written, self._step_rows, *runs, view.shape.page_tokens)
        return keys, values

    def is_ahead(self, key: tuple[int, int]) -> bool:
        """Whether this piece is being gathered already."""
        return self._ahead is not None and self._ahead[0] == key

    def release(self) -> None:
        """The attention that reads what `gather` gave last has been launched."""
        self._read[self._reading].record()

    def gather_ahead(
        self,
        key: tuple[int, int],
        piece: ContextPiece,
        view: LayerView,
        page_table: torch.Tensor,
    ) -> None:
        """Start to gather what the link brings of a piece (see `gather`), beside what the current
        stream does next.

        Call it before the attention that it is to overlap is launched.
        """
        which = self._gathers % 2
        self._gathers += 1
        self._in.wait_event(self._read[which])
        self._in.wait_stream(torch.cuda.current_stream())
        arrived = torch.cuda.Event()
        runs = (page_table, piece.starts, piece.lengths, piece.first_rows, piece.max_length)
        values = self._v_scratch[which, : piece.total]
        with torch.cuda.stream(self._in):
            if view.shape.row.has_keys:
                gather_rows(view, *runs, self._k_scratch[which, : piece.total], values)
            else:
                gather_context(view.v_pages, *runs, values, LINK_PROGRAMS)
            arrived.record()
        self._ahead = (key, which, arrived)
