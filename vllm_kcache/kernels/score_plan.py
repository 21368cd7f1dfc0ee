# SPDX-License-Identifier: Apache-2.0
"""Launch shapes of the score kernel, and the size of what it leaves behind. Without Triton."""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of K that a program loads at once. Twice as many are slower at every size measured
# (docs/benchmarks.md, score).
_CHUNK = 32768


def padded(head_size: int) -> int:
    """The power of two that a kernel computes a head in."""
    return 1 << (head_size - 1).bit_length()


@dataclass(frozen=True)
class ScoreConfig:
    """Launch shape: tokens loaded at once, programs of each (request, head), warps, stages, and
    registers that a thread may have (None: as many as the compiler takes)."""

    chunk_tokens: int
    splits: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


# Left alone, the compiler takes more for the sums of chunks, and fewer programs fit; with these it
# spills nothing for heads of more than 64 in two bytes, and only there are they set.
MAX_REGISTERS = 80

# Programs of a launch. Many more than fit at once even out the end, and the more a list has, the
# sooner the first is scored and its fetch begins. But in a graph that was captured for longer
# requests many have nothing to do, and still take a nanosecond each (docs/benchmarks.md, score).
_PROGRAMS_OF_LIST, _LEAST_PROGRAMS, _MOST_PROGRAMS = 128, 2048, 16384


def chunk_tokens(head_size: int, itemsize: int, v_block_tokens: int) -> int:
    """Tokens that a program loads at once: of them it leaves one sum behind."""
    return max(16, v_block_tokens, _CHUNK // (padded(head_size) * itemsize))


def chunk_blocks(head_size: int, itemsize: int, v_block_tokens: int) -> int:
    """The same in V blocks."""
    return chunk_tokens(head_size, itemsize, v_block_tokens) // v_block_tokens


def score_config(
    num_lists: int, head_size: int, itemsize: int, v_block_tokens: int, max_blocks: int
) -> ScoreConfig:
    """Launch shape for `num_lists` pairs of (request, KV head)."""
    chunk = chunk_tokens(head_size, itemsize, v_block_tokens)
    chunks = max(1, -(-max_blocks * v_block_tokens // chunk))
    lists = max(1, num_lists)
    programs = min(max(_PROGRAMS_OF_LIST * lists, _LEAST_PROGRAMS), _MOST_PROGRAMS)
    each = -(-chunks * lists // programs)
    limited = itemsize == 2 and head_size > 64
    return ScoreConfig(chunk, -(-chunks // each), 4, 3, MAX_REGISTERS if limited else None)


def num_chunks(max_blocks: int, blocks_each: int) -> int:
    """C: chunks of the longest request; 0 where chunks leave no sums."""
    return -(-max_blocks // blocks_each) if blocks_each else 0
