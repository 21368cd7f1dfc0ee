# SPDX-License-Identifier: Apache-2.0
"""Launch shapes of the score kernel, and the size of what it leaves behind. Without Triton."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_kcache.cache.formats import CacheShape

# Bytes of K that a program loads at once. Twice as many are slower at every size measured
# (docs/benchmarks.md, score).
_CHUNK = 32768

# Tokens of a chunk of codes: what a warp leaves one sum of (csrc/score_codes.cu).
CODE_CHUNK_TOKENS = 256

# 80 registers: no spills for 2-byte heads above 64; unlimited costs occupancy. Set only there.
MAX_REGISTERS = 80

# Programs of a launch. More than fit at once keep the GPU full to the end, and the more a list has,
# the sooner it is scored and its fetch begins. But a graph captured for longer requests launches
# many with nothing to do, a nanosecond each (docs/benchmarks.md, score).
_PROGRAMS_OF_LIST, _LEAST_PROGRAMS, _MOST_PROGRAMS = 128, 2048, 16384


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


def chunk_blocks(shape: CacheShape) -> int:
    """V blocks of a chunk: what a program loads at once, and leaves one sum of."""
    if shape.k_bits == 4:
        return CODE_CHUNK_TOKENS // shape.block_tokens
    tokens = _CHUNK // (padded(shape.head_size) * shape.dtype.itemsize)
    return max(16, shape.block_tokens, tokens) // shape.block_tokens


def num_chunks(shape: CacheShape, max_blocks: int) -> int:
    """C: chunks of a request of so many V blocks."""
    return -(-max_blocks // chunk_blocks(shape))


def score_config(shape: CacheShape, num_requests: int, max_blocks: int) -> ScoreConfig:
    """Launch shape for a batch."""
    chunks = max(1, num_chunks(shape, max_blocks))
    lists = max(1, num_requests * shape.num_kv_heads)
    programs = min(max(_PROGRAMS_OF_LIST * lists, _LEAST_PROGRAMS), _MOST_PROGRAMS)
    each = -(-chunks * lists // programs)
    limited = shape.dtype.itemsize == 2 and shape.head_size > 64
    tokens = chunk_blocks(shape) * shape.block_tokens
    return ScoreConfig(tokens, -(-chunks // each), 4, 3, MAX_REGISTERS if limited else None)
