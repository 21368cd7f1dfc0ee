# SPDX-License-Identifier: Apache-2.0
"""csrc/fetch.cu and the copies of waves against their definition, without a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.checks import sums_of_chunks
from tests.kernels.lists import assert_fetched, check_fetch, chosen, make_hot_cache, scored
from tests.shapes import ODD_SHAPES, Shape, build_case
from vllm_kcache.cache.hot_cache import HotCache
from vllm_kcache.kernels.fetch import fetch_blocks
from vllm_kcache.kernels.select import selection_arguments
from vllm_kcache.types import Selected, Selection

pytestmark = pytest.mark.usefixtures("emulated")

LONG = Shape((5000, 0, 37), 2, 2, 64, 16, 8)
# The extension copies 16 bytes at a time.
SHAPES = [shape for shape in (*ODD_SHAPES, LONG) if shape.v_block_tokens * shape.head_size % 4 == 0]


@pytest.mark.parametrize("num_slots", [None, 5, 4096], ids=["no cache", "small", "large"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lists_are_found(shape: Shape, num_slots: int | None) -> None:
    check_fetch(build_case(shape, sharpness=1.0), num_slots, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    check_fetch(build_case(ODD_SHAPES[6], dtype), 64, "cpu")


@pytest.mark.parametrize(
    "rule", [Selection(None, 0.9, 1, 8, "sum"), Selection(None, None, 1, 8, "max", 0.004)], ids=str
)
def test_waves_list_their_misses_and_copies_bring_them(rule: Selection) -> None:
    """Two waves of KV heads: each lists what it misses, and a launch of its own copies that."""
    case = build_case(LONG, sharpness=1.0)
    shape = case.shape
    sums = sums_of_chunks(scored(case), [-(-tokens // 8) for tokens in shape.seq_lens], 16)
    listed = chosen(case, rule)
    cache = make_hot_cache(case, 4096, "cpu")
    cache.begin_epoch()
    places = (len(shape.seq_lens), shape.num_kv_heads, shape.max_blocks)
    blocks = torch.full(places, -99, dtype=torch.int32)
    rows = torch.full(places, -99, dtype=torch.int32)
    counts, mass = torch.full(places[:2], -99, dtype=torch.int32), torch.full(places[:2], torch.nan)
    misses = torch.full((blocks[:, 0].numel(), 2), -99, dtype=torch.int32)
    cache.slots.fill_(torch.nan)
    for wave, head in enumerate(range(shape.num_kv_heads)):
        torch.ops.kcache.select_fetch(
            scored(case), case.seq_lens, shape.v_block_tokens, *selection_arguments(rule), head, 1,
            blocks, counts, mass, None, sums, 16, case.block_table, case.v_pool, 1, rows,
            cache.slots, cache.table, cache.slot_word, cache.state, cache.counters, misses, wave,
            False,
        )  # fmt: skip
        torch.ops.kcache.copy_misses(
            misses, cache.state, wave, case.v_pool, shape.v_block_tokens, cache.slots, 3
        )
    assert torch.equal(counts, listed.counts)
    listing = torch.arange(shape.max_blocks) < counts[..., None]
    wide = Selected(blocks.masked_fill(~listing, -1), counts, mass)
    assert torch.equal(wide.blocks[..., : listed.blocks.shape[2]], listed.blocks)
    assert_fetched(rows.masked_fill(~listing, -1), cache.slots, wide, case)
    assert cache.read_counters().misses == int(counts.sum())


def test_a_slot_that_another_block_owns_is_no_hit() -> None:
    """The table still sends a block to a slot that has just been taken: its bytes are not its."""
    case = build_case(ODD_SHAPES[6])
    tokens = case.shape.v_block_tokens
    listed, cache = chosen(case), make_hot_cache(case, 4096, "cpu")
    for expected_hits in (0, int(listed.counts.sum()) - 1):
        fetched = fetch_blocks(listed, case.block_table, case.v_pool, tokens, cache, 1)
        assert_fetched(fetched.rows, fetched.v_rows, listed, case)
        assert cache.read_counters(reset=True).hits == expected_hits
        slot = int(fetched.rows[0, 0, 0])
        cache.slots[slot] = torch.nan
        cache.slot_word[slot] += 7 << 32


def test_bytes_of_a_v_block_must_be_whole_vectors() -> None:
    case = build_case(Shape((9,), 1, 1, 3, 16, 2))
    cache = HotCache.make(4, 2, case.v_pool.numel() // 6, 2, 3, torch.float32, "cpu")
    lists = torch.zeros((1, 1, 5), dtype=torch.int32), torch.ones((1, 1), dtype=torch.int32)
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        torch.ops.kcache.fetch_blocks(
            *lists, case.block_table, case.v_pool, 2, 0, True, torch.empty_like(lists[0]),
            cache.slots, cache.table, cache.slot_word, cache.state, cache.counters,
        )  # fmt: skip
