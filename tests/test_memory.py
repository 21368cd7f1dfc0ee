# SPDX-License-Identifier: Apache-2.0
"""What vllm_kcache/memory.py plans is what is allocated."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

import pytest
import torch

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.cache.hot_cache import COUNTER_WORDS, STATE_WORDS, HotCache
from vllm_kcache.config import KCacheConfig
from vllm_kcache.kernels.workspace import DecodeWorkspace, workspace_buffers
from vllm_kcache.memory import (
    GROUP_REQUESTS,
    WORKSPACE_BYTES,
    GPUMemory,
    StepLimits,
    WindowPool,
    what_limits,
)
from vllm_kcache.types import Selection

SHAPES = (
    CacheShape(2, 8, 2, 64, 16, 8, torch.bfloat16),
    CacheShape(3, 9, 3, 64, 32, 4, torch.float32),
    CacheShape(1, 4, 4, 80, 16, 16, torch.float16),
)
SETTINGS = ({}, {"top_n": 16}, {"top_n": "all"}, {"coverage": 0.9})


def bytes_of(holder: object) -> int:
    """Of all tensors that an object has."""
    values = (getattr(holder, field.name) for field in fields(holder))  # type: ignore[arg-type]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def planned(shape: CacheShape, settings: dict, limits: StepLimits) -> GPUMemory:
    config = KCacheConfig.from_user(settings)
    return GPUMemory(shape, config.selection(shape.block_tokens), limits)


@pytest.mark.parametrize(("shape", "settings"), list(itertools.product(SHAPES, SETTINGS)))
def test_buffers_are_as_planned(shape: CacheShape, settings: dict) -> None:
    memory = planned(shape, settings, StepLimits(7, 128, 1000))
    workspace = DecodeWorkspace.make(
        shape, memory.selection, memory.group_requests, memory.max_blocks, "cpu"
    )
    scratch = 3 * memory.scratch_tokens + 128
    assert memory.fixed_bytes == bytes_of(workspace) + scratch * shape.token_bytes


@pytest.mark.parametrize("slots", [0, 1, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_slots_and_tables_are_as_planned(shape: CacheShape, slots: int) -> None:
    memory = planned(shape, {}, StepLimits(7, 128, 1000))
    pages = 11
    rows = pages * shape.rows_per_page
    cache = HotCache.make(slots, shape.num_layers, rows, shape.row.bytes, "cpu")
    words = 4 * STATE_WORDS + 8 * COUNTER_WORDS
    # Beside the table, 4 bytes for each token slot of a step that prefills with context.
    tables = pages * (memory.page_bytes - 4 * shape.page_tokens)
    assert bytes_of(cache) == slots * memory.slot_bytes + tables + words
    k_page, gib = shape.host_page_bytes, slots * memory.slot_bytes / 2**30
    available = slots * memory.slot_bytes + pages * (k_page + memory.page_bytes)
    assert memory.plan(available, k_page, 10**6, gib) == (pages, slots)
    assert memory.plan(available - 1, k_page, 10**6, gib) == (pages - 1, slots)


def test_what_is_left_is_hot_cache() -> None:
    shape = SHAPES[0]
    memory = planned(shape, {}, StepLimits(7, 128, 1000))
    page = shape.host_page_bytes + memory.page_bytes
    useful = memory.limits.useful_pages(shape.page_tokens)
    assert useful == 7 * 63 + 1
    rows = shape.num_layers * shape.rows_per_page
    for available, host_pages in ((10**6, 10**6), (10**6, 30), (10**9, 10**6), (0, 5), (-5, 5)):
        pages, slots = memory.plan(available, shape.host_page_bytes, host_pages, "auto")
        assert pages <= min(host_pages, useful)
        assert pages * page + slots * memory.slot_bytes <= max(0, available)
        if pages < min(host_pages, useful):
            # The GPU decides, and the hot cache has its share.
            assert slots * memory.slot_bytes >= 0.06 * available
        elif slots < pages * rows:
            assert available - pages * page - slots * memory.slot_bytes < memory.slot_bytes
    assert memory.plan(10**9, shape.host_page_bytes, 30, "auto") == (30, 30 * rows)
    assert memory.plan(10**6, shape.host_page_bytes, 30, 0) == (30, 0)


@pytest.mark.parametrize("max_requests", [1000, 3])
@pytest.mark.parametrize("page_bytes", [90, 7000])
@pytest.mark.parametrize(
    ("request_blocks", "request_pages", "longest"),
    [(17, 1000, 4096), (33, 64, 64), (5, 5, 9), (1, 1, 1), (66, 7, 8)],
)
def test_window_blocks_and_pages(
    request_blocks: int, request_pages: int, longest: int, page_bytes: int, max_requests: int
) -> None:
    pool = WindowPool(1000, page_bytes, request_blocks, 9, request_pages, longest, max_requests)
    for requests in (1, 2, 5, 7):
        pages = 1 + requests * request_pages
        assert pool.holds_most(pages) == (requests >= max_requests)
        held = min(requests, max_requests)
        assert pool.blocks_for(pages) == 9 + held * request_blocks
        assert pool.requests(pages, request_pages) == held
        assert pool.requests(pages, 2 * request_pages) == min(requests / 2, held)
        # A short one takes as much of the window layers.
        assert pool.requests(pages, 1) == held
        # Where blocks are given, whatever there may be of requests.
        assert pool.pages_for(9 + requests * request_blocks) == max(pages, 1 + longest)
    for pages in range(1 + longest, 1 + 9 * longest, 3):
        blocks = pool.blocks_for(pages)
        assert pool.bytes_for(pages) == 1000 * blocks + page_bytes * pages
        assert pool.divide(pool.bytes_for(pages)) == (blocks, pages)
        assert 1000 * blocks <= pool.most_bytes
        if blocks > 9 + request_blocks:
            assert 1000 * blocks <= pool.fixed_bytes + pages * pool.bytes_beside_page
    # A cache too small for one request is refused elsewhere, and has room for it.
    assert pool.pages_for(0) == 1 + longest
    assert pool.divide(0) == (9 + request_blocks, 1 + longest)


@pytest.mark.parametrize(("window", "longest"), [(1024, 131072), (1024, 4096), (4096, 2048)])
@pytest.mark.parametrize("page_bytes", [1000, 100_000])
def test_short_and_long_requests_lose_the_same_share(
    window: int, longest: int, page_bytes: int
) -> None:
    """Against one pool that could hold what any request needs."""
    tokens, block_bytes = 16, 400_000
    limits = StepLimits(10**9, 8192, longest)
    pool = WindowPool.plan([(window, tokens)], block_bytes, page_bytes, tokens, limits, 2)
    whole = 10**12

    def elastic(pages: int) -> float:
        return whole / (pool.request_blocks * block_bytes + pages * page_bytes)

    pages = whole // (page_bytes + pool.bytes_beside_page)
    shortest = min(window, longest) // tokens
    shares = [
        pool.requests(pages, length) / elastic(length)
        for length in (shortest, (shortest + pool.longest_pages) // 2, pool.longest_pages)
    ]
    assert shares[0] == pytest.approx(shares[2], rel=0.02)
    assert shares[1] >= min(shares[0], shares[2]) * 0.999
    assert 0.3 < shares[0] <= 1.001


def test_the_hot_cache_has_no_share_of_window_layers() -> None:
    shape = SHAPES[0]
    memory = planned(shape, {}, StepLimits(10**4, 128, 1000))
    page, beside = shape.host_page_bytes, 10 * shape.host_page_bytes
    pages, slots = memory.plan(10**9, page, 10**6, "auto", beside)
    hot, own = slots * memory.slot_bytes, pages * (page + memory.page_bytes)
    assert 10**9 - page - beside < hot + own + pages * beside <= 10**9
    assert hot == pytest.approx(0.07 * (hot + own), rel=0.01)


def test_groups_are_as_large_as_their_buffers_allow() -> None:
    """64 query heads, 8 KV heads: at 32K the cap of 64 decides, at 128K the bytes."""
    shape = CacheShape(32, 64, 8, 128, 16, 8, torch.bfloat16)
    for length, fewer in ((32768, False), (131072, True)):
        memory = planned(shape, {}, StepLimits(256, 8192, length))
        assert (memory.group_requests < GROUP_REQUESTS) == fewer
        assert memory._workspace_bytes(memory.group_requests) <= WORKSPACE_BYTES
        if fewer:
            assert memory._workspace_bytes(memory.group_requests + 1) > WORKSPACE_BYTES
    few = replace(memory, limits=StepLimits(3, 8192, 4096))
    assert few.group_requests == 3
    assert replace(few, limits=StepLimits(3, 8192, 4096, 5)).group_requests == 15


def test_tokens_of_a_request_are_in_one_group() -> None:
    """As many requests as without drafts, where their buffers allow; else whole requests."""
    shape = replace(SHAPES[0], k_bits=4, host_dtype="int8", dtype=torch.bfloat16)
    for length, decode_tokens, fewer in ((4096, 4, False), (262144, 3, True)):
        memory = planned(shape, {}, StepLimits(256, 8192, length, decode_tokens))
        assert memory.group_requests % decode_tokens == 0
        assert (memory.group_requests < decode_tokens * GROUP_REQUESTS) == fewer
        assert memory._workspace_bytes(memory.group_requests) <= WORKSPACE_BYTES
    # Lists of several tokens are as long as all of theirs.
    rule = Selection(5, None, 1, 8, "sum")
    for host_dtype, columns in (("int8", 20), ("model", 5)):
        coded = replace(shape, host_dtype=host_dtype)
        assert workspace_buffers(coded, rule, 1, 100, 4)["blocks"][0] == (
            columns * coded.num_kv_heads
        )


def test_what_says_where_drafts_lie_is_taken_off() -> None:
    plain, drafts = (planned(SHAPES[0], {}, StepLimits(7, 128, 1000, n)) for n in (1, 4))
    assert plain.row_table_bytes == 0
    assert drafts.row_table_bytes > 7 * 4 * 63 * 4
    given = (SHAPES[0].host_page_bytes, 10**6, "auto")
    assert drafts.plan(10**6 + drafts.row_table_bytes, *given) == plain.plan(10**6, *given)


def test_drafts_do_not_take_the_hot_cache_of_a_given_number_of_pages() -> None:
    """Their rows once took more than 64 pages have, and nothing was hot."""
    shape = CacheShape(32, 32, 8, 128, 16, 8, torch.bfloat16, 4, "int8")
    plain, drafts = (planned(shape, {}, StepLimits(256, 8192, 131072, n)) for n in (1, 5))
    page = shape.k_token_bytes * shape.num_kv_heads * shape.page_tokens * shape.num_layers
    assert drafts.row_table_bytes > 64 * page
    slots = [memory.least_slots(page, 64, "auto") for memory in (plain, drafts)]
    assert slots[0] == slots[1] > 1000


@pytest.mark.parametrize(
    ("pages", "host_pages", "changes", "limit", "remedy"),
    [
        (30, 30, {}, "host memory", "a larger kcache_config.host_memory_gib, lets"),
        (30, 30, {"k_bits": 4}, "host memory", "gib, or kcache_config.host_dtype int8, lets"),
        (30, 30, {"k_bits": 4, "host_dtype": "int8"}, "host memory", "host_memory_gib, lets"),
        (30, 31, {}, "GPU memory", "is given), or kcache_config.k_bits 4, lets"),
        (30, 31, {"k_bits": 4}, "GPU memory", "is given) lets"),
        (100, 100, {}, "max_num_seqs", "Only a larger --max-num-seqs"),
        (100, 101, {"k_bits": 4}, "max_num_seqs", "Only a larger --max-num-seqs"),
    ],
)
def test_what_limits_names_what_is_left_to_change(
    pages: int, host_pages: int, changes: dict, limit: str, remedy: str
) -> None:
    found, text = what_limits(pages, host_pages, 100, replace(SHAPES[0], **changes))
    assert found == limit
    assert remedy in text


def test_pages_of_a_cpu_are_in_its_memory() -> None:
    assert what_limits(30, 31, 100, SHAPES[0], "CPU")[0] == "CPU memory"
