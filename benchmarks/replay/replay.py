# SPDX-License-Identifier: Apache-2.0
"""Let a decode step select what a real model selected (record.py), on any model shape.

Weights that are made up attend flatly, and selections of one step say nothing of the next. In
replay a step runs as ever, scoring included; but what selection reads are other scores: recorded
masses, written by one more kernel, in an engine beside the layer before. Selection, look-up, fetch
and attention are those of production.

Which recording: (layer, KV head) i of n is played the recorded (layer, KV head) i * m // n of m, so
that depth stays depth. Where its query heads were recorded, query head g is played number (g + i)
modulo as many; otherwise all are played their mean. A request is known by its first physical page;
a hash of it chooses the text and where in it to begin. Each further token is the next step of the
recording, which is played forth and back, so that no jump spoils the repeats. The time is read from
`seq_lens`: there is no state, and running a step twice changes nothing.

Which block: recorded block j of some 500 takes the place j * stride + (a hash below stride) of a
longer request, the same at every step; the first (sink) stays first, and the last ones (recent)
stay last. All others get a mass of e^-80. So lists are as long as in 4K tokens of context at any
length: what is measured is the system at that selection, not how selections grow.

Differences to a real model: a block that leaves the recent ones is fetched once more at its other
place (at most one miss of a list in 8 steps); going back a list meets its past once more, which
favours hits for some steps after each turn (one in every `steps` - 1); and a request that grows by
another multiple of the recorded length changes its stride, so all its blocks move once.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.replay.record import LARGEST_CODE, OCTAVE_CODES, Recording
from vllm_kcache import split_cache_gpu
from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels.decode import decode_step
from vllm_kcache.kernels.dependent import gdc_wait
from vllm_kcache.kernels.score_plan import chunk_blocks, num_chunks
from vllm_kcache.kernels.select import Lists
from vllm_kcache.kernels.workspace import DecodeBatch, DecodeWorkspace

# V blocks of 8 tokens that the last 32 tokens overlap at most: they keep their distance to the end.
RECENT_BLOCKS = 5
# Logarithm of the mass of a block that was not recorded: nothing in any arithmetic that follows,
# and no infinity either.
NOTHING = -80.0

_RECENT = tl.constexpr(RECENT_BLOCKS)
_NOTHING = tl.constexpr(NOTHING)
_LARGEST_CODE = tl.constexpr(LARGEST_CODE)
_LOG2_OF_CODE = tl.constexpr(1 / OCTAVE_CODES)
_LN_2, _LOG2_E = tl.constexpr(math.log(2)), tl.constexpr(math.log2(math.e))
_CHUNK = 1024


@triton.jit
def hash_number(number):
    """A number of 31 bits that looks random, int32, of the lower 31 bits of a number."""
    number = number.to(tl.uint32) & 0x7FFFFFFF
    number = (((number >> 16) ^ number) * 0x45D9F3B) & 0x7FFFFFFF
    number = (((number >> 16) ^ number) * 0x45D9F3B) & 0x7FFFFFFF
    return ((number >> 16) ^ number).to(tl.int32)


@triton.jit
def sum_by_chunk(logs, BLOCKS: tl.constexpr):
    """Log-sum-exp of runs of BLOCKS masses, given base-2 logarithms; -inf where there is none."""
    # Masses are of NOTHING to 0: none leaves what float32 holds.
    sums = tl.sum(tl.exp2(tl.reshape(logs, (logs.shape[0] // BLOCKS, BLOCKS))), 1)
    return tl.log2(sums) * _LN_2


# All integers change between the layers and sizes that share one compiled kernel.
@triton.jit(
    do_not_specialize=[
        "table_stride", "wide_blocks", "max_chunks", "layer", "num_layers", "num_texts",
        "num_traces", "trace_group", "num_steps", "trace_blocks",
    ]
)  # fmt: skip
def replay_kernel(
    codes, trace_lengths, seq_lens, block_table, block_lse, chunk_lse, chunk_max, table_stride,
    wide_blocks, max_chunks, layer, num_layers, num_texts, num_traces, trace_group, num_steps,
    trace_blocks, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    CHUNK: tl.constexpr, CHUNK_BLOCKS: tl.constexpr, WIDE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    # Integers that a multiple is known of, so that WIDE scores are stored at once.
    max_blocks = wide_blocks * WIDE
    if DEPENDENT:
        gdc_wait()
    head = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    num_tokens = tl.load(seq_lens + request)
    num_blocks = tl.cdiv(num_tokens, BLOCK_TOKENS)
    block = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    if tl.program_id(0) * CHUNK < num_blocks:
        # What is played, and which of its steps.
        key = hash_number(tl.load(block_table + request * table_stride))
        list_number = layer * NUM_KV_HEADS + head
        trace = list_number * num_traces // (num_layers * NUM_KV_HEADS)
        turns = 2 * (num_steps - 1)
        time = (num_tokens + key // num_texts) % turns
        step = tl.minimum(time, turns - time)
        first_row = ((key % num_texts).to(tl.int64) * num_traces + trace) * trace_group
        recorded = tl.load(trace_lengths + step)
        # Which recorded block, if any, lies at each place.
        stride = tl.maximum((num_blocks - _RECENT) // (trace_blocks - _RECENT), 1)
        # Quotient and random number below it by products, which so few blocks allow: divisions of
        # integers would take longer than all the rest.
        spread = ((block.to(tl.float32) + 0.5) * (1.0 / stride.to(tl.float32))).to(tl.int32)
        random = hash_number(key + list_number * 65536 + spread).to(tl.uint32) << 1
        offset = tl.umulhi(random, stride.to(tl.uint32)).to(tl.int32)
        offset = tl.where(spread == 0, 0, offset)
        is_spread = (block - spread * stride == offset) & (spread < recorded - _RECENT)
        from_end = num_blocks - 1 - block
        is_recent = from_end < _RECENT
        source = tl.where(is_recent, recorded - 1 - from_end, spread)
        exists = block < num_blocks
        nothing = tl.where(exists, _NOTHING * _LOG2_E, float("-inf"))
        stored = block < tl.cdiv(num_blocks, WIDE) * WIDE
        first_query_head = (request * NUM_KV_HEADS + head) * GROUP
        out = block_lse + first_query_head * max_blocks + block
        chunks: tl.constexpr = CHUNK // CHUNK_BLOCKS
        chunk = tl.program_id(0) * chunks + tl.arange(0, chunks)
        sums = chunk_lse + first_query_head * max_chunks + chunk
        most = chunk_max + first_query_head * max_chunks + chunk
        member = list_number % trace_group
        for _ in tl.static_range(GROUP):
            row = (first_row + member) * num_steps + step
            member = tl.where(member + 1 < trace_group, member + 1, 0)
            code = tl.load(
                codes + row * trace_blocks + source, mask=exists & (is_recent | is_spread), other=0
            ).to(tl.int32)
            log2 = code.to(tl.float32) * _LOG2_OF_CODE - _LARGEST_CODE * _LOG2_OF_CODE
            log2 = tl.where(code > 0, log2, nothing)
            tl.store(out, log2 * _LN_2, mask=stored)
            out += max_blocks
            chunk_sums = sum_by_chunk(log2, CHUNK_BLOCKS)
            tl.store(sums, chunk_sums, mask=chunk < max_chunks)
            # No mass is above the sum, but for rounding.
            tl.store(most, chunk_sums + 1e-3, mask=chunk < max_chunks)
            sums += max_chunks
            most += max_chunks


class Replay:
    """Has decode steps select by recorded masses.

    Args:
        recording: what to play.
        device: where the recording is copied to. It follows the workspaces: one of several workers
            does not know its GPU before.
    Raises:
        ValueError: the recording is no longer than the recent blocks.

    Attributes:
        Workspace: a `DecodeWorkspace` whose steps are played. It has buffers of scores of its
            own, for scoring writes others.
    """

    Workspace: type[DecodeWorkspace]

    def __init__(self, recording: Recording, device: torch.device | str) -> None:
        if int(recording.num_blocks[0]) <= RECENT_BLOCKS:
            raise ValueError(
                f"replay: {int(recording.num_blocks[0])} V blocks were recorded; needs more than "
                f"{RECENT_BLOCKS}"
            )
        self.recording = recording
        # By number of requests: shape and P of the last step.
        self._launched: dict[int, tuple[CacheShape, int]] = {}
        self.Workspace = self._workspace()
        # What is written already.
        self._ahead: tuple[int, ...] | None = None
        self._move_to(torch.device(device))

    def _move_to(self, device: torch.device) -> None:
        self.codes = self.recording.codes.to(device).contiguous()
        self.lengths = self.recording.num_blocks.to(device=device, dtype=torch.int32)
        # What comes ahead is written on it; None on the CPU.
        self._stream = torch.cuda.Stream(device) if self.codes.is_cuda else None

    def _workspace(self) -> type[DecodeWorkspace]:
        play, replay = self._play, self

        @dataclass
        class Workspace(DecodeWorkspace):
            def __post_init__(self) -> None:
                if replay.codes.device != self.block_lse.device:
                    replay._move_to(self.block_lse.device)
                # Here, so that an engine that measures what memory is left counts them. Two of
                # each: a layer's are read while the next one's are written.
                self.played = [
                    [torch.zeros_like(scores) for scores in (self.block_lse, *[self.chunk_lse] * 2)]
                    for _ in range(2)
                ]

            def selected_by(self, view: LayerView, batch: DecodeBatch, lists: Lists) -> Lists:
                return play(self, view, view.index, batch, self.dependent)

        return Workspace

    def decode_step(
        self,
        view: LayerView,
        workspace: DecodeWorkspace,
        batch: DecodeBatch,
        out: torch.Tensor,
        **options: Any,
    ) -> torch.Tensor:
        """`kernels.decode.decode_step`, and beside it what the next layer selects by: behind
        scoring it would add to each layer what no real model has.
        """
        following = view.index + 1
        if following == view.shape.num_layers or batch.num_requests == 0:
            return decode_step(view, workspace, batch, out, **options)
        if self._stream is None:
            decode_step(view, workspace, batch, out, **options)
            self._play(workspace, view, following, batch)
        else:
            main = torch.cuda.current_stream()
            self._stream.wait_stream(main)
            decode_step(view, workspace, batch, out, **options)
            with torch.cuda.stream(self._stream):
                self._play(workspace, view, following, batch)
            main.wait_stream(self._stream)
        self._ahead = self._key(following, batch)
        return out

    @staticmethod
    def _key(layer: int, batch: DecodeBatch) -> tuple[int, ...]:
        return layer, batch.seq_lens.data_ptr(), batch.num_requests, batch.max_blocks

    def install(self) -> None:
        """Take part in every step of the engines that this process starts from now on.

        What a worker checks its kernels with before it serves is not played.
        """
        split_cache_gpu.DecodeWorkspace = self.Workspace  # type: ignore[misc]
        split_cache_gpu.decode_step = self.decode_step

    def _play(
        self,
        workspace: Any,
        view: LayerView,
        layer: int,
        batch: DecodeBatch,
        dependent: bool = False,
    ) -> Lists:
        """What a layer selects by; written on the current stream, unless it is there already."""
        lists = workspace.views(view, batch)
        block_lse, chunk_lse, chunk_max = (
            buffer[: scores.numel()].view(scores.shape)
            for buffer, scores in zip(
                workspace.played[layer % 2],
                (lists.block_lse, lists.chunk_lse, lists.chunk_lse),
                strict=True,
            )
        )
        if self._ahead != self._key(layer, batch):
            self._launched[batch.num_requests] = view.shape, batch.max_blocks
            self.launch(
                view.shape, layer, lists.seq_lens, lists.block_table, block_lse, chunk_lse,
                chunk_max, dependent,
            )  # fmt: skip
        self._ahead = None
        if lists.chunk_max is not None:
            lists = replace(lists, chunk_max=chunk_max)
        return replace(lists, block_lse=block_lse, chunk_lse=chunk_lse)

    def launch(
        self,
        shape: CacheShape,
        layer: int,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        block_lse: torch.Tensor,
        chunk_lse: torch.Tensor,
        chunk_max: torch.Tensor,
        dependent: bool = False,
    ) -> None:
        """The kernel.

        Args:
            shape: of the model that is measured.
            layer: number of the layer that is played.
            seq_lens: [B] int32, on the device of the recording; 0 marks a padded row, which is left
                alone.
            block_table: [B, MB] int32, beside it. Its first column tells requests apart.
            block_lse: [B, Hq, P] float32, beside it, contiguous. Written up to the length of each
                request; where P is a multiple of four, of the next such multiple.
            chunk_lse: [B, Hq, C] float32, beside it, contiguous. Written: the sums of chunks.
            chunk_max: [B, Hq, C] float32, beside it, contiguous. Written: what no block of a chunk
                scores above.
            dependent: launch it as kernels/dependent.py says, so that it does not break the chain
                of a step that is played.
        Raises:
            ValueError: V blocks of another size than those that were recorded.

        Graph-safe: no allocation, no host sync, a grid that depends on shapes only.
        """
        if shape.block_tokens != self.recording.v_block_tokens:
            raise ValueError(
                f"replay: V blocks of {shape.block_tokens} tokens, and the recording has blocks of "
                f"{self.recording.v_block_tokens}"
            )
        num_texts, layers, heads, num_steps, trace_blocks = self.codes.shape
        group, max_blocks = self.recording.group, block_lse.shape[2]
        wide = 4 if max_blocks % 4 == 0 else 1
        grid = (triton.cdiv(max_blocks, _CHUNK), shape.num_kv_heads, block_lse.shape[0])
        replay_kernel[grid](
            self.codes, self.lengths, seq_lens, block_table, block_lse, chunk_lse, chunk_max,
            block_table.stride(0), max_blocks // wide, chunk_lse.shape[2], layer, shape.num_layers,
            num_texts, layers * heads // group, group, num_steps, trace_blocks,
            NUM_KV_HEADS=shape.num_kv_heads, GROUP=shape.group, BLOCK_TOKENS=shape.block_tokens,
            CHUNK=_CHUNK, CHUNK_BLOCKS=chunk_blocks(shape), WIDE=wide, DEPENDENT=dependent,
            launch_pdl=dependent,
        )  # fmt: skip

    def cost_ms(self, num_requests: int, tokens: int) -> float:
        """What the kernel takes in a step, measured alone on an idle GPU.

        In an engine it runs beside the step, which is longer by less than this.

        Graphs hold its launches of all layers, for as many requests as a step had, or the next
        larger number that there was (a padded batch). More requests than any call had decode in
        several groups, and so are measured.

        Args:
            num_requests: rows of the batch: a request each, or a token where they verify drafts.
            tokens: length of each.
        Raises:
            ValueError: no step was seen.
        """
        if not self._launched:
            raise ValueError("replay: no step was seen")
        total, largest = 0.0, max(self._launched)
        for first in range(0, num_requests, largest):
            total += self._group_cost_ms(min(largest, num_requests - first), tokens)
        return total

    def _group_cost_ms(self, num_requests: int, tokens: int) -> float:
        from benchmarks.ops.common import time_calls

        size = min(size for size in self._launched if size >= num_requests)
        shape, max_blocks = self._launched[size]
        device, heads = self.codes.device, shape.num_query_heads
        block_lse = torch.empty((size, heads, max_blocks), device=device)
        chunk_lse = torch.empty((size, heads, num_chunks(shape, max_blocks)), device=device)
        chunk_max = torch.empty_like(chunk_lse)
        lengths = torch.zeros(size, dtype=torch.int32, device=device)
        lengths[:num_requests] = tokens
        table = torch.arange(size, dtype=torch.int32, device=device)[:, None]
        calls = [
            functools.partial(
                self.launch, shape, layer, lengths, table, block_lse, chunk_lse, chunk_max
            )
            for layer in range(shape.num_layers)
        ]
        return time_calls(calls).p50 * shape.num_layers
