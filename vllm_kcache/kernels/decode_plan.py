# SPDX-License-Identifier: Apache-2.0
"""How a decode step is laid out: waves of KV heads, streams, thread blocks that copy."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from vllm_kcache.cache.hot_cache import MAX_WAVES

# Bytes of K that make a wave worth its launches: some 60 us of an H100's memory bandwidth.
WAVE_BYTES = 192 << 20
# A wave of fewer lists selects on too few multiprocessors.
WAVE_LISTS = 48
# More waves than this cost more launches than they hide, and a launch of its own with this many
# thread blocks fills the link without crowding scoring out (docs/benchmarks.md, overlap).
MOST_WAVES = 4
COPY_THREAD_BLOCKS = 48
# Size of the first and the last wave, as a share of the others: nothing is fetched beside the first
# one's scoring, and nothing is scored beside the last one's fetch.
OUTER_WAVE = 1 / 3
# Thread blocks that follow the scoring: with fewer long lists wait, more take multiprocessors from
# scoring (docs/benchmarks.md, overlap). Where all is found in the hot cache, the lesser number
# works, and where fetching takes as long as scoring, all do. And the V blocks of a request up to
# which their shared memory leaves scoring the multiprocessor's.
FOLLOWERS = 48
LEAST_FOLLOWERS = 32
FOLLOWED_BLOCKS = 8192


@dataclass(frozen=True)
class DecodePlan:
    """How a step is laid out.

    Attributes:
        followers: thread blocks of a kernel beside scoring that selects and fetches each list as
            soon as it is scored. 0 does without: lists are selected after a wave of them is scored.
        least_followers: of these, how many work where nothing was missing in the step before; the
            more was, the more do. 0: always all.
        waves: parts of the KV heads; 1 runs on the current stream alone.
        copy_thread_blocks: 0 lets the thread block of a list copy its misses; otherwise misses are
            listed and this many thread blocks copy them, in a launch of their own for each wave.
        copy_stream: copies run on a third stream, so that the link need not wait while the next
            wave is selected. Needs `copy_thread_blocks`.
        outer_wave: size of the first and the last wave as a share of the others.
    """

    waves: int = 1
    copy_thread_blocks: int = 0
    copy_stream: bool = False
    outer_wave: float = OUTER_WAVE
    followers: int = 0
    least_followers: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.waves <= MAX_WAVES:
            raise ValueError(f"waves={self.waves}: must be 1 to {MAX_WAVES}")
        if self.copy_stream and not self.copy_thread_blocks:
            raise ValueError("copy_stream=True: needs copy_thread_blocks of at least 1")
        if not 0 < self.outer_wave <= 1:
            raise ValueError(f"outer_wave={self.outer_wave}: must be above 0 and at most 1")
        if self.followers and (self.waves > 1 or self.copy_thread_blocks):
            raise ValueError(f"followers={self.followers}: needs one wave whose lists copy")
        if not 0 <= self.least_followers <= self.followers:
            raise ValueError(
                f"least_followers={self.least_followers}: must be 0 to followers={self.followers}"
            )

    def wave_bounds(self, num_heads: int) -> list[int]:
        """First KV head of each wave, and `num_heads`; no wave is empty."""
        waves = min(self.waves, num_heads)
        sizes = [1.0] * waves
        if waves > 2:
            sizes[0] = self.outer_wave
        if waves > 1:
            sizes[-1] = self.outer_wave
        bounds = [0]
        for wave, upto in enumerate(itertools.accumulate(sizes), 1):
            bound = round(num_heads * upto / sum(sizes))
            bounds.append(min(max(bound, bounds[-1] + 1), num_heads - (waves - wave)))
        return bounds


def plan_decode(
    num_requests: int,
    num_kv_heads: int,
    max_blocks: int,
    block_bytes: int,
    multiprocessors: int = 0,
) -> DecodePlan:
    """The plan for a batch.

    Args:
        max_blocks: P, V blocks that the longest request may have.
        block_bytes: bytes of K of one V block.
        multiprocessors: of the GPU, where a kernel may follow the scoring; 0 where none can.
    """
    k_bytes = num_requests * num_kv_heads * max_blocks * block_bytes
    by_lists = num_requests * num_kv_heads // WAVE_LISTS
    waves = max(1, min(k_bytes // WAVE_BYTES, by_lists, num_kv_heads, MOST_WAVES))
    if waves == 1:
        return DecodePlan()
    # Half of the GPU stays free of followers: scoring must have a place to run.
    followers = min(FOLLOWERS, multiprocessors // 2)
    if followers and max_blocks <= FOLLOWED_BLOCKS:
        return DecodePlan(followers=followers, least_followers=min(LEAST_FOLLOWERS, followers))
    return DecodePlan(waves, COPY_THREAD_BLOCKS, copy_stream=True)
