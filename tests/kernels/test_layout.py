# SPDX-License-Identifier: Apache-2.0
"""Which layout a decode step gets. Without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.kernels.attend_plan import RowsConfig, most_parts, rows_config
from vllm_kcache.kernels.decode import plan_followers
from vllm_kcache.kernels.workspace import Followers

LLAMA = CacheShape(32, 32, 8, 128, 16, 8, torch.bfloat16)
WIDE = CacheShape(32, 16, 8, 256, 16, 4, torch.bfloat16)


@pytest.mark.parametrize("shape", [LLAMA, WIDE], ids=["heads of 128", "heads of 256"])
@pytest.mark.parametrize("tokens", [32 << 10, 64 << 10, (64 << 10) + 1, 128 << 10, 1 << 20])
def test_a_large_batch_is_followed_at_any_length(shape: CacheShape, tokens: int) -> None:
    """A graph is captured for max_model_len: the longest there may be must not have another layout
    than what was measured (D3)."""
    followers = plan_followers(shape, 16, shape.max_blocks(tokens), 132)
    assert followers == Followers(48, 32)


def test_what_is_not_followed() -> None:
    """Few lists, little K, a GPU of one multiprocessor; and half of a small one stays free."""
    blocks = LLAMA.max_blocks(1 << 17)
    assert plan_followers(LLAMA, 11, blocks, 132) is None
    assert plan_followers(LLAMA, 16, LLAMA.max_blocks(1024), 132) is None
    assert plan_followers(LLAMA, 16, blocks, 1) is None
    assert plan_followers(replace(LLAMA, k_bits=4), 64, blocks, 132) is None
    assert plan_followers(LLAMA, 16, blocks, 20) == Followers(10, 10)


def test_lists_of_several_tokens_share_one_wave() -> None:
    """26 and one request of four tokens: as many thread blocks as an H200 has room for, of four
    warps and of eight; of 40 requests twice as many. Query heads of one tile leave room for two of
    eight, larger heads for one, in which four warps take the same query heads."""
    coded = replace(LLAMA, k_bits=4, host_dtype="int8")
    assert rows_config(coded, 26 * 4 * 8, 4096, 132, 4) == RowsConfig(264, 2)
    assert rows_config(coded, 40 * 4 * 8, 4096, 132, 4) == RowsConfig(528, 2)
    assert rows_config(coded, 4 * 8, 4096, 132, 4) == RowsConfig(132, 4)
    llama_2 = replace(coded, num_query_heads=32, num_kv_heads=32)
    assert rows_config(llama_2, 4 * 32, 2048, 132, 4) == RowsConfig(264, 4)
    wide = replace(WIDE, k_bits=4, host_dtype="int8")
    assert rows_config(wide, 4 * 8, 4096, 132, 4) == RowsConfig(132, 2)


@pytest.mark.parametrize("together", [2, 3, 4, 8])
def test_parts_of_lists_of_several_tokens_have_room(together: int) -> None:
    """Of any number of rows, on any GPU."""
    coded = replace(LLAMA, k_bits=4, host_dtype="int8", num_query_heads=16)
    for rows in range(1, 600, 7):
        lists = rows * coded.num_kv_heads
        for multiprocessors in (1, 20, 132, 300):
            splits = rows_config(coded, lists, 4096, multiprocessors, together).splits
            assert splits >= 1
            assert splits * together <= most_parts(lists)
