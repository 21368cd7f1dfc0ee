# SPDX-License-Identifier: Apache-2.0
"""Find selected V blocks in the hot V cache and bring the misses. Definition: reference/fetch.py.

The compiled extension looks lists up with many threads and copies with many rows in flight; the
Triton kernel here does the same one V block at a time, for machines without the extension.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_kcache.cache.hot_cache import COUNTER_NAMES, EPOCH, HotCache
from vllm_kcache.kernels import extension
from vllm_kcache.kernels.residency import claim_slot, find_slot
from vllm_kcache.types import Fetched, Selected

_EPOCH = tl.constexpr(EPOCH)
_HITS = tl.constexpr(COUNTER_NAMES.index("hits"))
_MISSES = tl.constexpr(COUNTER_NAMES.index("misses"))
_DIRECT = tl.constexpr(COUNTER_NAMES.index("direct"))


@triton.jit(do_not_specialize=["layer_rows", "num_slots", "columns", "first_head"])
def fetch_kernel(
    blocks,
    counts,
    block_table,
    v_pool,
    rows,
    slots,
    table,
    slot_word,
    state,
    counters,
    table_stride,
    layer_rows,
    num_slots,
    columns,
    first_head,
    NUM_KV_HEADS: tl.constexpr,
    BLOCKS_PER_PAGE: tl.constexpr,
    ROW_VALUES: tl.constexpr,
    ROW_PADDED: tl.constexpr,
    HOT: tl.constexpr,
):
    head = first_head + tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    list_id = request * NUM_KV_HEADS + head
    count = tl.load(counts + list_id)
    in_row = tl.arange(0, ROW_PADDED)
    row_mask = in_row < ROW_VALUES
    hits = tl.full((), 0, tl.int64)
    misses = tl.full((), 0, tl.int64)
    direct = tl.full((), 0, tl.int64)
    for column in range(tl.program_id(0), columns, tl.num_programs(0)):
        place = list_id * columns + column
        result = tl.full((), -1, tl.int32)
        if column < count:
            block = tl.load(blocks + place)
            page = tl.load(block_table + request * table_stride + block // BLOCKS_PER_PAGE)
            physical = (page.to(tl.int64) * NUM_KV_HEADS + head) * BLOCKS_PER_PAGE + (
                block % BLOCKS_PER_PAGE
            )
            copy = True
            if HOT:
                epoch = tl.load(state + _EPOCH)
                owner = layer_rows + physical
                result = find_slot(table, slot_word, owner, epoch)
                copy = result < 0
                if copy:
                    result = claim_slot(table, slot_word, state, owner, epoch, num_slots)
                    if result >= 0:
                        misses += 1
                    else:
                        direct += 1
                else:
                    hits += 1
            else:
                # A staging row for each place in the lists, while there are rows.
                result = tl.where(place < num_slots, place, -1).to(tl.int32)
            if result < 0:
                result = (-2 - physical).to(tl.int32)
            elif copy:
                value = tl.load(v_pool + physical * ROW_VALUES + in_row, mask=row_mask)
                tl.store(slots + result.to(tl.int64) * ROW_VALUES + in_row, value, mask=row_mask)
        tl.store(rows + place, result)
    if HOT:
        tl.atomic_add(counters + _HITS, hits)
        tl.atomic_add(counters + _MISSES, misses)
        tl.atomic_add(counters + _DIRECT, direct)


def fetch_blocks(
    selected: Selected,
    block_table: torch.Tensor,
    v_pool: torch.Tensor,
    v_block_tokens: int,
    hot_cache: HotCache | None = None,
    layer: int = 0,
    out: Fetched | None = None,
) -> Fetched:
    """Look up and copy. See `ops.fetch_blocks`; this call is an epoch of the hot cache.

    Without a hot cache each place in the lists has a staging row of its own, place
    `(b * Hkv + h) * N + n`; places past the rows of `out.v_rows` are read straight from the host.
    Graph-safe when `out` is given.
    """
    head_size = v_pool.shape[3]
    if out is None:
        rows = torch.empty_like(selected.blocks)
        shape = (rows.numel(), v_block_tokens, head_size)
        v_rows = (
            hot_cache.slots
            if hot_cache is not None
            else torch.empty(shape, dtype=v_pool.dtype, device=rows.device)
        )
        out = Fetched(rows, v_rows)
    elif hot_cache is not None and out.v_rows.data_ptr() != hot_cache.slots.data_ptr():
        raise ValueError("out.v_rows: must be hot_cache.slots when there is a hot cache")
    if hot_cache is not None:
        check_geometry(hot_cache, v_pool, v_block_tokens, layer)
        hot_cache.begin_epoch()
    if selected.blocks.numel() == 0:
        return out
    if extension.available():
        launch_lookup_extension(
            selected, block_table, v_pool, v_block_tokens, hot_cache, layer, out
        )
    else:
        launch_fetch(selected, block_table, v_pool, v_block_tokens, hot_cache, layer, out)
    return out


def check_geometry(
    hot_cache: HotCache, v_pool: torch.Tensor, v_block_tokens: int, layer: int
) -> None:
    """Raise ValueError when a hot cache was made for another pool, V block or number of layers."""
    num_pages, num_kv_heads, page_tokens, head_size = v_pool.shape
    if hot_cache.slots.shape[1:] != (v_block_tokens, head_size):
        raise ValueError(
            f"hot_cache.slots: has shape {list(hot_cache.slots.shape)}; must be "
            f"[R, T={v_block_tokens}, D={head_size}]"
        )
    rows = num_pages * num_kv_heads * page_tokens // v_block_tokens
    if hot_cache.rows_per_layer != rows:
        raise ValueError(
            f"hot_cache.table: has {hot_cache.rows_per_layer} rows a layer; this pool has {rows}"
        )
    if not 0 <= layer < hot_cache.table.shape[0]:
        raise ValueError(f"layer={layer}: must be 0 to {hot_cache.table.shape[0] - 1}")


def launch_fetch(
    selected: Selected,
    block_table: torch.Tensor,
    v_pool: torch.Tensor,
    v_block_tokens: int,
    hot_cache: HotCache | None,
    layer: int,
    out: Fetched,
    *,
    first_head: int = 0,
    num_heads: int | None = None,
) -> None:
    """Look up and copy a range of KV heads with the Triton kernel, on the current stream."""
    num_requests, num_kv_heads, columns = selected.blocks.shape
    page_tokens, head_size = v_pool.shape[2:]
    num_heads = num_kv_heads - first_head if num_heads is None else num_heads
    row_values = v_block_tokens * head_size
    programs = max(1, min(columns, 4096 // max(1, num_requests * num_heads)))
    unused = selected.counts
    fetch_kernel[(programs, num_heads, num_requests)](
        selected.blocks,
        selected.counts,
        block_table,
        v_pool,
        out.rows,
        out.v_rows,
        hot_cache.table if hot_cache is not None else unused,
        hot_cache.slot_word if hot_cache is not None else unused,
        hot_cache.state if hot_cache is not None else unused,
        hot_cache.counters if hot_cache is not None else unused,
        block_table.stride(0),
        layer * hot_cache.rows_per_layer if hot_cache is not None else 0,
        out.v_rows.shape[0],
        columns,
        first_head,
        NUM_KV_HEADS=num_kv_heads,
        BLOCKS_PER_PAGE=page_tokens // v_block_tokens,
        ROW_VALUES=row_values,
        ROW_PADDED=triton.next_power_of_2(row_values),
        HOT=hot_cache is not None,
        # Each warp loads a scalar for itself. Two warps of a program could see a slot before and
        # after another program's change, and part ways.
        num_warps=1,
    )


def launch_lookup_extension(
    selected: Selected,
    block_table: torch.Tensor,
    v_pool: torch.Tensor,
    v_block_tokens: int,
    hot_cache: HotCache | None,
    layer: int,
    out: Fetched,
) -> None:
    """Look up all lists with the extension, copying the misses in the same launch."""
    no_cache = selected.counts.new_empty(0)
    torch.ops.kcache.fetch_blocks(
        selected.blocks,
        selected.counts,
        block_table,
        v_pool,
        v_block_tokens,
        layer,
        hot_cache is not None,
        out.rows,
        out.v_rows,
        hot_cache.table if hot_cache is not None else no_cache,
        hot_cache.slot_word if hot_cache is not None else no_cache.long(),
        hot_cache.state if hot_cache is not None else no_cache,
        hot_cache.counters if hot_cache is not None else no_cache.long(),
    )
