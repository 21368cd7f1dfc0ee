# SPDX-License-Identifier: Apache-2.0
"""How a launch of attention is laid out, and the buffers of its parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class AttendConfig:
    """Launch shape: V blocks a program takes at once, programs for each list, warps, stages."""

    chunk_blocks: int
    splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttendBuffers:
    """Partial results of split lists. `arrivals` is zero between launches.

    Attributes:
        sums: [parts * G * next power of two of D] float32, GPU.
        weights: [parts * G * 2] float32, GPU. Maximum and weight.
        arrivals: [lists] int32, GPU.
        clipped: made for the tail "clip", too, which has twice the parts.
    """

    sums: torch.Tensor
    weights: torch.Tensor
    arrivals: torch.Tensor
    clipped: bool

    @classmethod
    def make(
        cls,
        num_lists: int,
        group: int,
        head_size: int,
        device: torch.device | str,
        clipped: bool = False,
    ) -> AttendBuffers:
        """Buffers for any launch of up to `num_lists` lists with `attend_config`'s splits.

        Args:
            clipped: for the tail "clip" as well as for the others.
        """
        parts = _most_parts(num_lists) * group * (2 if clipped else 1)
        return cls(
            torch.empty(parts * triton.next_power_of_2(head_size), device=device),
            torch.empty(parts * 2, device=device),
            torch.zeros(num_lists, dtype=torch.int32, device=device),
            clipped,
        )

    def check(self, num_lists: int, num_weights: int, clipped: bool) -> None:
        """Raise ValueError unless a launch of so many lists and parts of heads fits."""
        if clipped and not self.clipped:
            raise ValueError('buffers: made without clipped=True, which tail="clip" needs')
        if num_lists > self.arrivals.numel() or num_weights * 2 > self.weights.numel():
            raise ValueError(
                f"buffers: made for {self.arrivals.numel()} lists and {self.weights.numel() // 2} "
                f"parts of heads; this launch has {num_lists} and {num_weights}"
            )

    @staticmethod
    def bytes(num_lists: int, group: int, head_size: int, clipped: bool = False) -> int:
        """GPU memory that `make` takes."""
        parts = _most_parts(num_lists) * group * (2 if clipped else 1)
        return parts * (triton.next_power_of_2(head_size) + 2) * 4 + num_lists * 4


# Lists differ in length by an order of magnitude: many programs, each a part of one, even that out.
TARGET_PROGRAMS = 1056
# Programs of a list that may be long, however many lists there are. The longest of 48 blocks on
# average has some 800: three programs take twice as long for it (docs/benchmarks.md, attend).
LEAST_SPLITS = 6
MAX_SPLITS = 32
# Bytes of K, and of V, that a program takes at once; the larger where lists may be longer than so
# many tokens.
_SMALL_CHUNK, _LARGE_CHUNK = 16384, 32768
_SHORT_LIST = 256


def _most_parts(num_lists: int) -> int:
    """No launch of up to `num_lists` lists has more parts than this."""
    return TARGET_PROGRAMS + LEAST_SPLITS * num_lists


def attend_config(
    num_lists: int,
    columns: int,
    head_size: int,
    itemsize: int,
    v_block_tokens: int,
) -> AttendConfig:
    """Launch shape for `num_lists` lists of at most `columns` V blocks."""
    row_bytes = triton.next_power_of_2(head_size) * itemsize
    long = columns * v_block_tokens > _SHORT_LIST
    chunk_bytes = _LARGE_CHUNK if long else _SMALL_CHUNK
    tokens = max(16, v_block_tokens, min(chunk_bytes // 256, chunk_bytes // row_bytes))
    chunk_blocks = tokens // v_block_tokens
    splits = max(LEAST_SPLITS if long else 1, -(-TARGET_PROGRAMS // max(1, num_lists)))
    splits = min(MAX_SPLITS, splits, -(-max(1, columns) // chunk_blocks))
    # Two stages of larger chunks do not fit GPUs with 99 KiB of shared memory, nor do those of rows
    # of 1 KiB (float32), whose query and sums take more.
    num_stages = 2 if tokens * row_bytes <= _LARGE_CHUNK and row_bytes <= 512 else 1
    return AttendConfig(chunk_blocks, max(1, splits), 4, num_stages)
