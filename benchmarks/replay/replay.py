# SPDX-License-Identifier: Apache-2.0
"""Let a decode step select what a real model selected (record.py), on any model shape.

Weights that are made up attend flatly, and selections of one step say nothing of the next. In
replay a step runs as ever, scoring included; only then its scores are overwritten, by one more
kernel, with recorded masses. Selection, look-up, fetch and attention are those of production.

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
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from benchmarks.replay.record import LARGEST_CODE, OCTAVE_CODES, Recording
from vllm_kcache.kernels import decode
from vllm_kcache.kernels.decode import DecodeStep
from vllm_kcache.kernels.score_plan import num_chunks

# V blocks of 8 tokens that the last 32 tokens overlap at most: they keep their distance to the end.
RECENT_BLOCKS = 5
# Logarithm of the mass of a block that was not recorded: nothing in any arithmetic that follows,
# and no infinity either.
NOTHING = -80.0

_RECENT = tl.constexpr(RECENT_BLOCKS)
_NOTHING = tl.constexpr(NOTHING)
_LARGEST_CODE = tl.constexpr(LARGEST_CODE)
_LOG_OF_CODE = tl.constexpr(math.log(2) / OCTAVE_CODES)
_CHUNK = 1024


@triton.jit
def hash_number(number):
    """A number of 31 bits that looks random, of an int64 of at least 0."""
    number = number & 0x7FFFFFFF
    number = (((number >> 16) ^ number) * 0x45D9F3B) & 0x7FFFFFFF
    number = (((number >> 16) ^ number) * 0x45D9F3B) & 0x7FFFFFFF
    return (number >> 16) ^ number


@triton.jit
def sum_by_chunk(log_masses, BLOCKS: tl.constexpr):
    """Log-sum-exp of runs of BLOCKS masses; -inf where there is none."""
    runs = tl.reshape(log_masses, (log_masses.shape[0] // BLOCKS, BLOCKS))
    largest = tl.max(runs, 1)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    return largest + tl.log(tl.sum(tl.exp(runs - largest[:, None]), 1))


# All integers change between the waves and sizes that share one compiled kernel.
@triton.jit(
    do_not_specialize=[
        "table_stride", "max_blocks", "max_chunks", "first_head", "layer", "num_layers",
        "num_texts", "num_traces", "trace_group", "num_steps", "trace_blocks",
    ]
)  # fmt: skip
def replay_kernel(
    codes, trace_lengths, seq_lens, block_table, block_lse, chunk_lse, table_stride, max_blocks,
    max_chunks, first_head, layer, num_layers, num_texts, num_traces, trace_group, num_steps,
    trace_blocks,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    CHUNK: tl.constexpr, CHUNK_BLOCKS: tl.constexpr,
):  # fmt: skip
    head = first_head + tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    num_tokens = tl.load(seq_lens + request)
    num_blocks = tl.cdiv(num_tokens, BLOCK_TOKENS)
    block = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    if tl.program_id(0) * CHUNK < num_blocks:
        # What is played, and which of its steps.
        key = hash_number(tl.load(block_table + request * table_stride).to(tl.int64))
        list_number = layer * NUM_KV_HEADS + head
        trace = list_number * num_traces // (num_layers * NUM_KV_HEADS)
        turns = 2 * (num_steps - 1)
        time = (num_tokens + key // num_texts) % turns
        step = tl.minimum(time, turns - time)
        first_row = ((key % num_texts) * num_traces + trace) * trace_group
        recorded = tl.load(trace_lengths + step)
        # Which recorded block, if any, lies at each place.
        stride = tl.maximum((num_blocks - _RECENT) // (trace_blocks - _RECENT), 1)
        spread = block // stride
        offset = hash_number(key + list_number * 65536 + spread) % stride
        offset = tl.where(spread == 0, 0, offset)
        is_spread = (block - spread * stride == offset) & (spread < recorded - _RECENT)
        from_end = num_blocks - 1 - block
        is_recent = from_end < _RECENT
        source = tl.where(is_recent, recorded - 1 - from_end, spread)
        exists = block < num_blocks
        first_query_head = (request * NUM_KV_HEADS + head) * GROUP
        out = block_lse + first_query_head * max_blocks + block
        if CHUNK_BLOCKS:
            chunks: tl.constexpr = CHUNK // CHUNK_BLOCKS
            chunk = tl.program_id(0) * chunks + tl.arange(0, chunks)
            sums = chunk_lse + first_query_head * max_chunks + chunk
        for in_group in tl.static_range(GROUP):
            row = (first_row + (in_group + list_number) % trace_group) * num_steps + step
            code = tl.load(
                codes + row * trace_blocks + source, mask=exists & (is_recent | is_spread), other=0
            ).to(tl.int32)
            log_mass = (code - _LARGEST_CODE).to(tl.float32) * _LOG_OF_CODE
            log_mass = tl.where(code > 0, log_mass, _NOTHING)
            tl.store(out, log_mass, mask=exists)
            out += max_blocks
            if CHUNK_BLOCKS:
                there = tl.where(exists, log_mass, float("-inf"))
                tl.store(sums, sum_by_chunk(there, CHUNK_BLOCKS), mask=chunk < max_chunks)
                sums += max_chunks


@dataclass(frozen=True)
class Geometry:
    """What a launch is for, besides its tensors.

    Attributes:
        num_layers: layers of the model that is measured.
        num_kv_heads, num_query_heads: its heads.
        max_blocks: P of the scores.
        chunk_blocks: V blocks of a chunk that scoring leaves a sum of; 0 when it leaves none.
        v_block_tokens: T.
    """

    num_layers: int
    num_kv_heads: int
    num_query_heads: int
    max_blocks: int
    v_block_tokens: int
    chunk_blocks: int = 0

    @classmethod
    def of(cls, step: DecodeStep) -> Geometry:
        """That of a decode step."""
        _, num_query_heads, max_blocks = step.block_lse.shape
        num_layers, num_kv_heads = step.hot_cache.table.shape[0], step.k_pages.shape[1]
        return cls(
            num_layers, num_kv_heads, num_query_heads, max_blocks, step.v_block_tokens,
            step.workspace.chunk_blocks,
        )  # fmt: skip


class Replay:
    """Overwrites the scores of decode steps with recorded masses.

    Args:
        recording: what to play.
        device: where the steps run; the recording is copied there.
    Raises:
        ValueError: the recording is no longer than the recent blocks.
    """

    def __init__(self, recording: Recording, device: torch.device | str) -> None:
        if int(recording.num_blocks[0]) <= RECENT_BLOCKS:
            raise ValueError(
                f"replay: {int(recording.num_blocks[0])} V blocks were recorded; needs more than "
                f"{RECENT_BLOCKS}"
            )
        self.recording = recording
        self.codes = recording.codes.to(device).contiguous()
        self.lengths = recording.num_blocks.to(device=device, dtype=torch.int32)
        # By number of requests: the first layer of the last step, as ranges of KV heads.
        self._launched: dict[int, tuple[Geometry, list[tuple[int, int]]]] = {}

    @property
    def shortest_tokens(self) -> int:
        """A request must be at least this long for every recorded block to have a place."""
        return int(self.recording.seq_lens[-1]) + self.recording.v_block_tokens

    def install(self) -> None:
        """Take part in every step of this process from now on; before graphs are captured."""
        decode.after_score = self

    def __call__(self, step: DecodeStep, first_head: int, last_head: int) -> None:
        """Overwrite the scores of some KV heads of one layer, on the current stream."""
        geometry = Geometry.of(step)
        if step.layer == 0:
            num_requests = step.query.shape[0]
            if first_head == 0:
                self._launched[num_requests] = geometry, []
            self._launched[num_requests][1].append((first_head, last_head))
        self.launch(
            geometry, step.block_lse, step.seq_lens, step.block_table, step.layer, first_head,
            last_head, step.chunk_lse,
        )  # fmt: skip

    def launch(
        self,
        geometry: Geometry,
        block_lse: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        layer: int,
        first_head: int,
        last_head: int,
        chunk_lse: torch.Tensor | None = None,
    ) -> None:
        """The kernel.

        Args:
            block_lse: [B, Hq, P] float32, on the device of the recording, contiguous. Rows of the
                heads in range are overwritten up to the length of each request.
            chunk_lse: [B, Hq, C] float32, beside it, contiguous: what scoring left of them.
            seq_lens: [B] int32, beside it; 0 marks a padded row, which is left alone.
            block_table: [B, MB] int32, beside it. Its first column tells requests apart.
        Raises:
            ValueError: V blocks of another size than those that were recorded.

        Graph-safe: no allocation, no host sync, a grid that depends on shapes only.
        """
        if geometry.v_block_tokens != self.recording.v_block_tokens:
            raise ValueError(
                f"replay: V blocks of {geometry.v_block_tokens} tokens, and the recording has "
                f"blocks of {self.recording.v_block_tokens}"
            )
        num_texts, layers, heads, num_steps, trace_blocks = self.codes.shape
        group = self.recording.group
        programs = triton.cdiv(geometry.max_blocks, _CHUNK)
        replay_kernel[(programs, last_head - first_head, block_lse.shape[0])](
            self.codes, self.lengths, seq_lens, block_table, block_lse,
            block_lse if chunk_lse is None else chunk_lse, block_table.stride(0),
            geometry.max_blocks, 0 if chunk_lse is None else chunk_lse.shape[2], first_head, layer,
            geometry.num_layers, num_texts, layers * heads // group, group, num_steps,
            trace_blocks,
            NUM_KV_HEADS=geometry.num_kv_heads,
            GROUP=geometry.num_query_heads // geometry.num_kv_heads,
            BLOCK_TOKENS=geometry.v_block_tokens, CHUNK=_CHUNK,
            CHUNK_BLOCKS=0 if chunk_lse is None else geometry.chunk_blocks,
        )  # fmt: skip

    def cost_ms(self, num_requests: int, tokens: int) -> float:
        """What the kernel adds to a step, measured alone on an idle GPU.

        Graphs hold its launches of all layers, cut in waves as the last step of so many requests
        was, or of the next larger number that there was (a padded batch). More requests than any
        call had decode in several groups, and so are measured.

        Args:
            num_requests: requests of the batch.
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
        geometry, ranges = self._launched[size]
        device = self.codes.device
        block_lse = torch.empty(
            (size, geometry.num_query_heads, geometry.max_blocks), device=device
        )
        chunks = num_chunks(geometry.max_blocks, geometry.chunk_blocks)
        chunk_lse = None
        if chunks:
            chunk_lse = torch.empty((size, geometry.num_query_heads, chunks), device=device)
        lengths = torch.zeros(size, dtype=torch.int32, device=device)
        lengths[:num_requests] = tokens
        table = torch.arange(size, dtype=torch.int32, device=device)[:, None]

        def one_layer(layer: int) -> None:
            for first_head, last_head in ranges:
                self.launch(
                    geometry, block_lse, lengths, table, layer, first_head, last_head, chunk_lse
                )

        calls = [functools.partial(one_layer, layer) for layer in range(geometry.num_layers)]
        return time_calls(calls).p50 * geometry.num_layers
