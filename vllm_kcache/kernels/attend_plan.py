# SPDX-License-Identifier: Apache-2.0
"""How a launch of attention is laid out. Without Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.kernels.score_plan import padded
from vllm_kcache.types import Selection

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
# Rows of int8 (csrc/attend.cu): thread blocks for each multiprocessor, at least so many for each
# list that may be long, and tiles of 16 tokens that are worth one.
_BLOCKS_OF_MULTIPROCESSOR, _LEAST_BLOCKS, _LEAST_TILES = 2, 6, 32
# The last where several rows have one list: one for so many warps, and the shortest part has three
# times as many. A small batch leaves multiprocessors without work, and adding up parts costs less.
_JOINT_WARPS_OF_TILE = 2
# More values of a head, and more query heads of a list of several rows, take all registers that a
# thread may have.
_SMALL_HEAD, _TILE_HEADS = 128, 4


@dataclass(frozen=True)
class AttendConfig:
    """Launch shape: V blocks a program takes at once, programs for each list, warps, stages."""

    chunk_blocks: int
    splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RowsConfig:
    """Launch shape for rows of int8 (csrc/attend.cu).

    Attributes:
        splits: thread blocks of a list that is long enough. Where several rows have one list, of
            the launch: they share all lists.
        least_tiles: 16 tokens each, that are worth a thread block. Where several rows have one
            list a power of two, and a part of a list has three times as many or more.
    """

    splits: int
    least_tiles: int


def most_parts(num_lists: int) -> int:
    """No launch of up to `num_lists` lists has more parts than this. Where several rows have one
    list, a part of it counts once for each."""
    return TARGET_PROGRAMS + LEAST_SPLITS * num_lists


def rows_of_list(group: int, selection: Selection) -> int:
    """Rows of results of a list: the clipped tail keeps two for each query head."""
    return group if selection.clip is None else 2 * group


def on_tensor_cores(shape: CacheShape) -> bool:
    """Whether csrc/attend.cu attends: its weights are float16, which is not enough for float32."""
    return shape.host_dtype == "int8" and shape.dtype != torch.float32


def rows_config(
    shape: CacheShape, num_lists: int, columns: int, multiprocessors: int, together: int = 1
) -> RowsConfig:
    """Launch shape for `num_lists` lists of at most `columns` V blocks of int8 rows.

    Args:
        multiprocessors: of the GPU.
        together: rows of a request that have one list, all but the first of which are empty.
    """
    multiprocessors, num_lists = max(1, multiprocessors), max(1, num_lists)
    if together > 1:
        return _joint_config(shape, num_lists, multiprocessors, together)
    programs = multiprocessors * _BLOCKS_OF_MULTIPROCESSOR
    splits = max(_LEAST_BLOCKS, -(-programs // num_lists))
    # A short request has no work for more.
    longest = -(-columns * shape.block_tokens // (16 * _LEAST_TILES))
    return RowsConfig(max(1, min(splits, longest, MAX_SPLITS)), _LEAST_TILES)


def _joint_config(
    shape: CacheShape, num_lists: int, multiprocessors: int, together: int
) -> RowsConfig:
    """`rows_config` where several rows have one list: as many thread blocks as there is room for at
    once, or some times as many where there are more lists. csrc/attend.cu halves those of more
    than one tile of query heads where there are more than multiprocessors."""
    lists, heads = -(-num_lists // together), together * shape.group
    tiles = next(tiles for tiles in (1, 2, 4) if heads <= tiles * _TILE_HEADS or tiles == 4)
    small_head = shape.head_size <= _SMALL_HEAD
    of_warp = tiles if small_head else 1
    halved = of_warp > 1 and lists > multiprocessors
    room_for_two = halved or (small_head and tiles == 1)
    at_once = multiprocessors * (_BLOCKS_OF_MULTIPROCESSOR if room_for_two else 1)
    blocks = at_once * -(-lists // at_once)
    # A part has the room of as many rows as may have a list.
    room = most_parts(num_lists) // together
    warps_of_list = (4 if halved else 8) * of_warp // tiles
    return RowsConfig(min(blocks, room), max(1, warps_of_list // _JOINT_WARPS_OF_TILE))


def attend_config(shape: CacheShape, num_lists: int, columns: int) -> AttendConfig:
    """Launch shape for `num_lists` lists of at most `columns` V blocks."""
    row_bytes = padded(shape.head_size) * shape.dtype.itemsize
    long = columns * shape.block_tokens > _SHORT_LIST
    chunk_bytes = _LARGE_CHUNK if long else _SMALL_CHUNK
    tokens = max(16, shape.block_tokens, min(chunk_bytes // 256, chunk_bytes // row_bytes))
    chunk_blocks = tokens // shape.block_tokens
    splits = max(LEAST_SPLITS if long else 1, -(-TARGET_PROGRAMS // max(1, num_lists)))
    splits = min(MAX_SPLITS, splits, -(-max(1, columns) // chunk_blocks))
    # Two stages of larger chunks do not fit GPUs with 99 KiB of shared memory, nor do those of rows
    # of 1 KiB (float32), whose query and sums take more.
    num_stages = 2 if tokens * row_bytes <= _LARGE_CHUNK and row_bytes <= 512 else 1
    return AttendConfig(chunk_blocks, max(1, splits), 4, num_stages)
