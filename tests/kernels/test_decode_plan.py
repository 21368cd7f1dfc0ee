# SPDX-License-Identifier: Apache-2.0
"""The layout of a decode step."""

from __future__ import annotations

import itertools

import pytest
import torch

from vllm_kcache.kernels.decode_plan import (
    FOLLOWED_BLOCKS,
    FOLLOWERS,
    LEAST_FOLLOWERS,
    MOST_WAVES,
    DecodePlan,
    plan_decode,
)
from vllm_kcache.kernels.score import check_chunk_lse
from vllm_kcache.kernels.score_plan import score_config
from vllm_kcache.kernels.select import most_blocks
from vllm_kcache.types import Selection


@pytest.mark.parametrize(
    ("waves", "num_heads"), list(itertools.product((1, 2, 3, 4, 7, 16), (1, 2, 3, 8, 12, 32)))
)
def test_waves_cover_all_heads_once(waves: int, num_heads: int) -> None:
    bounds = DecodePlan(waves).wave_bounds(num_heads)
    sizes = [after - before for before, after in itertools.pairwise(bounds)]
    assert bounds[0] == 0
    assert bounds[-1] == num_heads
    assert min(sizes) >= 1
    assert len(sizes) == min(waves, num_heads)
    assert max(sizes[0], sizes[-1]) <= max(sizes)


def test_first_and_last_wave_are_small() -> None:
    assert DecodePlan(4).wave_bounds(32) == [0, 4, 16, 28, 32]
    assert DecodePlan(4).wave_bounds(8) == [0, 1, 4, 7, 8]
    assert DecodePlan(2).wave_bounds(8) == [0, 6, 8]
    assert DecodePlan(4, outer_wave=1.0).wave_bounds(8) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"waves": 0}, "waves=0"),
        ({"copy_stream": True}, "copy_stream"),
        ({"outer_wave": 0.0}, "outer_wave"),
        ({"followers": 8, "waves": 2}, "followers=8"),
        ({"followers": 8, "least_followers": 9}, "least_followers=9"),
    ],
)
def test_impossible_plans_are_refused(settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DecodePlan(**settings)


def test_small_batches_are_one_wave() -> None:
    assert plan_decode(1, 32, 2048, 2048, 132) == DecodePlan()
    assert plan_decode(26, 8, 4096, 2048).waves == MOST_WAVES


def test_followers_leave_half_of_the_gpu() -> None:
    assert plan_decode(26, 8, 4096, 2048, 132) == DecodePlan(
        followers=FOLLOWERS, least_followers=LEAST_FOLLOWERS
    )
    assert plan_decode(26, 8, 4096, 2048, 58).followers == 29
    small = plan_decode(26, 8, 4096, 2048, 8)
    assert small.followers == small.least_followers == 4
    # Too long for shared memory beside scoring.
    assert plan_decode(26, 8, FOLLOWED_BLOCKS + 1, 2048, 132).followers == 0


def test_blocks_that_a_selection_holds() -> None:
    """Masses, the histogram and what else a list takes fit the GPU's shared memory."""
    fixed = Selection(16, None, 1, 32, "sum")
    covered = Selection(None, 0.9, 1, 32, "max")
    for shared in (99 << 10, 163 << 10, 227 << 10):
        for rule, sums in ((fixed, 0), (covered, 8)):
            most = most_blocks(rule, 8, shared)
            histogram = max(1024, 256 * (1 + sums))
            assert 4 * (most + -(-most // 32) + 1 + histogram) + 7168 <= shared
            assert most == 49152 or 4 * (most * 33 // 32 + 3 + histogram) + 7168 > shared
    # 8 tokens a block: 392K tokens on an H100, 301K on an A100, 174K on an L4.
    assert most_blocks(fixed, 4, 227 << 10) == 49152
    assert 37000 < most_blocks(fixed, 4, 163 << 10) < 39000
    assert 21000 < most_blocks(fixed, 4, 99 << 10) < 23000


def test_sums_must_have_the_width_of_their_chunks() -> None:
    check_chunk_lse(torch.empty(2, 4, 3), 2, 4, 3)
    with pytest.raises(ValueError, match=r"chunk_lse: has shape \[2, 4, 3\]; must be .*C=4"):
        check_chunk_lse(torch.empty(2, 4, 3), 2, 4, 4)


@pytest.mark.parametrize("max_blocks", [1, 16, 512, 2048, 16384, 49152])
@pytest.mark.parametrize("num_lists", [1, 8, 32, 208, 448, 2048, 16384])
def test_programs_of_score_fill_a_gpu_and_are_not_idle_by_the_thousand(
    num_lists: int, max_blocks: int
) -> None:
    config = score_config(num_lists, 128, 2, 8, max_blocks)
    chunks = -(-max_blocks * 8 // config.chunk_tokens)
    programs = config.splits * num_lists
    assert 1 <= config.splits <= chunks
    # Half of what is aimed at: all programs of a list take equally many chunks, or one less.
    assert programs >= min(1024, num_lists * chunks)
    assert programs < 16384 + num_lists
    each = -(-chunks // config.splits)
    assert config.splits == -(-chunks // each)
