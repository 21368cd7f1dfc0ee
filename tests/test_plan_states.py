# SPDX-License-Identifier: Apache-2.0
"""What the planner says of models of which some layers keep a state in place of K and V."""

from __future__ import annotations

import pytest

from tests.test_plan import H200, engine_of, shape_of
from vllm_kcache.config import KCacheConfig
from vllm_kcache.planner.cost import SplitWork, split_step, stock_step
from vllm_kcache.planner.memory import GIB, cache_shape, fit_split, fit_stock, window_pool
from vllm_kcache.planner.plan import Load, Setup, make_plan


def test_a_step_reads_and_writes_states() -> None:
    shape, engine = shape_of("qwen3.5-27b"), engine_of(32768)
    row, states = 2 * 4 * 256 * 2, 2 * 8 * 48 * 3207168
    stock = stock_step(shape, H200, engine, 8, 32768)
    weights = shape.weight_bytes_of_step(8)
    assert stock.hbm_bytes == weights + 8 * 32768 * 16 * row + states
    assert stock.fixed == 64 * H200.layer_seconds
    cache = cache_shape(shape, engine, KCacheConfig.from_user({"top_n": 32, "k_bits": 4}))
    assert (cache.num_layers, cache.block_tokens) == (16, 4)
    split = split_step(shape, H200, engine, 8, 32768, SplitWork(128, 1.0, cache, 64))
    codes, rows = 16 * 8 * 4 * 32768 * 132, 16 * 8 * 4 * 128 // 4 * cache.row.bytes
    assert split.hbm_bytes == pytest.approx(weights + codes + rows + states)
    assert split.cache > states / H200.hbm_bytes_per_s


# One input of the convolution of a layer: 16 keys and queries of 128 each, 48 values of 128.
INPUT = (2 * 16 + 48) * 128 * 2


@pytest.mark.parametrize(
    ("kv_itemsize", "tokens", "cached", "drafts", "states"),
    [
        (None, 784, False, 0, 1),
        (1, 1568, False, 0, 1),
        (None, 784, True, 0, 2),
        # Three more inputs are 61,440 bytes, of which a token has 4,096; and tokens come in 16.
        (None, 800, False, 3, 4),
        (None, 800, True, 3, 5),
    ],
)
def test_blocks_of_stock_beside_states(
    kv_itemsize: int | None, tokens: int, cached: bool, drafts: int, states: int
) -> None:
    """Of four groups of 16 layers three hold states; a block has the tokens that fill as much."""
    shape = shape_of("qwen3.5-27b")
    engine = engine_of(32768, enable_prefix_caching=cached, num_speculative_tokens=drafts)
    fit = fit_stock(shape, engine, H200.gpu_memory_bytes, kv_itemsize)
    assert (fit.full_groups, fit.window_groups, fit.block_tokens) == (1, 3, tokens)
    page = 16 * tokens * 2 * 4 * 256 * (kv_itemsize or 2)
    assert page >= 16 * (shape.state_bytes + drafts * INPUT)
    assert fit.num_blocks == fit.cache_bytes // page
    blocks = -(-32768 // tokens)
    assert fit.requests(32768, 16) == (fit.num_blocks - 1) / (blocks + 3 * states)
    # Of one page: no state of another is there, but those after drafts are.
    assert fit.requests(100, 16) == (fit.num_blocks - 1) / (1 + 3 * (1 + drafts))


@pytest.mark.parametrize(
    ("cached", "drafts", "states"), [(False, 0, 1), (True, 0, 2), (False, 2, 3), (True, 2, 4)]
)
def test_both_pools_fit_beside_states(cached: bool, drafts: int, states: int) -> None:
    """Small pages: a block of states is of one request, whatever its length."""
    shape = shape_of("qwen3.5-27b")
    engine = engine_of(
        131072, max_num_seqs=32, enable_prefix_caching=cached, num_speculative_tokens=drafts
    )
    config = KCacheConfig.from_user({"k_bits": 4})
    fit = fit_split(shape, engine, H200.gpu_memory_bytes, 112 * GIB, config)
    pool = window_pool(shape, engine, config)
    assert pool is not None
    state = 3207168 + drafts * INPUT
    assert (pool.request_blocks, pool.block_bytes) == (states, 48 * state)
    assert fit.window_pool_blocks == 32 * states
    assert fit.limited_by == "host memory"
    assert fit.requests(131072, 16) == (fit.num_blocks - 1) / 8192
    # Of one page each: with prefix caching there is room for more than run at once.
    assert fit.requests(16, 16) == 32 * states / (1 + drafts)
    plan = make_plan(Setup(shape, H200, engine, config, 112 * GIB), Load(131072))
    gib = states * 48 * state / GIB
    assert f"48 of 64 layers keep a state in GPU memory, {gib:.3f} GiB a request" in plan.notes[0]
    assert any("drafts" in note for note in plan.notes) == bool(drafts)
    assert plan.kcache_4.fits > 2 * plan.stock.fits
