# SPDX-License-Identifier: Apache-2.0
"""Store K and V of new tokens (Triton). Definition: reference/write.py.

One program stores one token of one KV head: K to its page, V to the host pool through mapped
memory, and V to the slot of the hot V cache when the V block is resident. A program that takes a
slot for a V block stores the block's other tokens there, too: theirs may have looked before.
"""

from __future__ import annotations

from enum import Flag

import torch
import triton
import triton.language as tl

from vllm_kcache.cache.hot_cache import EPOCH
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels.dependent import gdc_launch_dependents, gdc_wait
from vllm_kcache.kernels.residency import claim_slot, find_slot

_EPOCH = tl.constexpr(EPOCH)


class WriteParts(Flag):
    """What a call stores. A prefill may store ROW_HOST on a copy stream of its own, and the rest on
    the stream that computes."""

    K = 1
    ROW_HOST = 2
    ROW_SLOT = 4
    ALL = 7


@triton.jit(do_not_specialize=["layer_rows", "num_slots", "allocate_tokens"])
def write_kernel(
    key,
    value,
    slot_mapping,
    k_pages,
    v_pool,
    slots,
    table,
    slot_word,
    state,
    key_stride,
    value_stride,
    page_stride,
    layer_rows,
    num_slots,
    allocate_tokens,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    STORE_K: tl.constexpr,
    STORE_V_HOST: tl.constexpr,
    STORE_V_SLOT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        # In this order: what begins now may take it that all launches before this one have ended.
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    place = tl.load(slot_mapping + token).to(tl.int64)
    if place < 0:
        return
    page = place // PAGE_TOKENS
    offset = place % PAGE_TOKENS
    in_head = tl.arange(0, HEAD_PADDED)
    mask = in_head < HEAD_SIZE
    in_page = (head * PAGE_TOKENS + offset) * HEAD_SIZE + in_head
    if STORE_K:
        k = tl.load(key + token * key_stride + head * HEAD_SIZE + in_head, mask=mask)
        tl.store(k_pages + page * page_stride + in_page, k, mask=mask)
    if STORE_V_HOST or STORE_V_SLOT:
        v = tl.load(value + token * value_stride + head * HEAD_SIZE + in_head, mask=mask)
        if STORE_V_HOST:
            page_values: tl.constexpr = NUM_KV_HEADS * PAGE_TOKENS * HEAD_SIZE
            tl.store(v_pool + page * page_values + in_page, v, mask=mask)
        if STORE_V_SLOT:
            blocks_per_page: tl.constexpr = PAGE_TOKENS // BLOCK_TOKENS
            row = (page * NUM_KV_HEADS + head) * blocks_per_page + offset // BLOCK_TOKENS
            owner = layer_rows + row
            # The epoch of the step that this write begins. The stamp keeps a slot that is written
            # here from being claimed by another program of this kernel.
            epoch = tl.load(state + _EPOCH) + 1
            slot = find_slot(table, slot_word, owner, epoch)
            begins = (slot < 0) & (offset % BLOCK_TOKENS == 0) & (token < allocate_tokens)
            if begins:
                slot = claim_slot(table, slot_word, state, owner, epoch, num_slots)
            if slot >= 0:
                in_slot = (slot.to(tl.int64) * BLOCK_TOKENS + offset % BLOCK_TOKENS) * HEAD_SIZE
                tl.store(slots + in_slot + in_head, v, mask=mask)
                if begins:
                    other = token + 1
                    while (other - token < BLOCK_TOKENS) & (
                        tl.load(slot_mapping + other, mask=other < allocate_tokens, other=-1)
                        == place + (other - token)
                    ):
                        v = tl.load(
                            value + other * value_stride + head * HEAD_SIZE + in_head, mask=mask
                        )
                        in_slot += HEAD_SIZE
                        tl.store(slots + in_slot + in_head, v, mask=mask)
                        other += 1


def write_kv(
    view: LayerView,
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    parts: WriteParts = WriteParts.ALL,
    allocate_tokens: int = 0,
    dependent: bool = False,
) -> None:
    """Store each token's K in its page, its V in its host row and in the hot slot of that row.

    Args:
        view: The layer.
        key, value: [Tk, Hkv, D] model dtype, GPU. May be strided over tokens.
        slot_mapping: [Tk] int64, GPU. -1 marks padding. No slot occurs twice.
        parts: what to store. ROW_SLOT does nothing where the hot cache is off.
        allocate_tokens: of the first so many tokens, those that begin a V block get a slot for it,
            so that the newest tokens never come back over the link. Tokens of one V block must lie
            side by side among them, in order, and no other token of it may be in the same call.
        dependent: launch it as kernels/dependent.py says.
    Graph-safe: a fixed grid, no allocation, no host sync.
    """
    num_tokens, shape, cache = slot_mapping.shape[0], view.shape, view.hot_cache
    if num_tokens == 0:
        return
    for name, tensor in (("key", key), ("value", value)):
        if tensor.stride()[1:] != (shape.head_size, 1):
            raise ValueError(
                f"{name}: has strides {list(tensor.stride())}; the last two must be "
                f"[{shape.head_size}, 1]"
            )
    stores_slot = cache is not None and cache.num_slots > 0 and WriteParts.ROW_SLOT in parts
    unused = slot_mapping  # in place of pointers that are not followed
    write_kernel[(num_tokens, shape.num_kv_heads)](
        key,
        value,
        slot_mapping,
        view.k_pages,
        view.v_pages,
        view.hot_values if stores_slot else unused,
        cache.table if cache is not None else unused,
        cache.slot_word if cache is not None else unused,
        cache.state if cache is not None else unused,
        key.stride(0),
        value.stride(0),
        view.k_pages.stride(0),
        view.first_owner,
        cache.num_slots if cache is not None else 0,
        allocate_tokens,
        NUM_KV_HEADS=shape.num_kv_heads,
        PAGE_TOKENS=shape.page_tokens,
        HEAD_SIZE=shape.head_size,
        HEAD_PADDED=triton.next_power_of_2(shape.head_size),
        BLOCK_TOKENS=shape.block_tokens,
        STORE_K=WriteParts.K in parts,
        STORE_V_HOST=WriteParts.ROW_HOST in parts,
        STORE_V_SLOT=stores_slot,
        DEPENDENT=dependent,
        launch_pdl=dependent,
        num_warps=1,
    )
