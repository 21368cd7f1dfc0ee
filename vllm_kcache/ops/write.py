# SPDX-License-Identifier: Apache-2.0
"""Step 1 of a decode, and of a prefill: store K and V of the new tokens."""

from __future__ import annotations

from typing import Any

import torch

from vllm_kcache.ops import checks
from vllm_kcache.ops.dispatch import implementation


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_pages: torch.Tensor,
    v_pool: torch.Tensor,
    hot_cache: Any | None = None,
    layer: int = 0,
) -> None:
    """Store each token's K in its page and its V in the host pool, write-through.

    Token i goes to page `slot // S` at offset `slot % S`. Where its V block is resident in the hot
    cache, the slot there is updated by the same call, so a copy is never older than the host pool.

    Args:
        key: [Tk, Hkv, D] model dtype, GPU. May be strided.
        value: [Tk, Hkv, D] model dtype, GPU. May be strided.
        slot_mapping: [Tk] int64 (or int32), GPU. -1 marks padding, which is not stored. No slot
            occurs twice.
        k_pages: [M, Hkv, S, D] model dtype, GPU. Written. May be strided over M.
        v_pool: [M, Hkv, S, D] model dtype, host (mapped, for a GPU), contiguous. Written.
        hot_cache: the hot V cache of this GPU, or None.
        layer: which layer `k_pages` and `v_pool` belong to, as the hot cache names it.
    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, by name.

    Aliasing: writes k_pages, v_pool and hot_cache in place. On a GPU: current stream, graph-safe.
    Definition: reference/write.py.
    """
    checks.check_pages("k_pages", k_pages, None)
    checks.check_v_pool(v_pool, k_pages)
    _, num_kv_heads, _, head_size = k_pages.shape
    for name, tensor in (("key", key), ("value", value)):
        shape = {"Tk": slot_mapping.shape[0], "Hkv": num_kv_heads, "D": head_size}
        checks.check_tensor(name, tensor, shape, (k_pages.dtype,), k_pages.device)
    _check_slot_mapping(slot_mapping, k_pages.device)
    implementation("write", k_pages.device).write_kv(
        key, value, slot_mapping, k_pages, v_pool, hot_cache, layer
    )


def update_page_means(
    v_pool: torch.Tensor, slot_mapping: torch.Tensor, v_page_means: torch.Tensor
) -> None:
    """Recompute the mean V of the pages that a write touched, for the tail "mean".

    The mean runs over the filled tokens of a page. Tokens are written in order in a page, so those
    are the tokens up to the last one written by the call that `slot_mapping` belongs to.

    Args:
        v_pool: [M, Hkv, S, D] model dtype, host, contiguous. After `write_kv`.
        slot_mapping: [Tk] int64 (or int32), beside `v_page_means`. -1 marks padding.
        v_page_means: [M, Hkv, D] float32 (float64 for a float64 model). Written.
    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, by name.

    Definition: reference/write.py.
    """
    checks.check_host_pool(v_pool)
    num_pages, num_kv_heads, _, head_size = v_pool.shape
    shape = {"M": num_pages, "Hkv": num_kv_heads, "D": head_size}
    checks.check_tensor(
        "v_page_means", v_page_means, shape, checks.accumulation_dtypes(v_pool.dtype), None
    )
    _check_slot_mapping(slot_mapping, v_page_means.device)
    implementation("write", v_page_means.device).update_page_means(
        v_pool, slot_mapping, v_page_means
    )


def _check_slot_mapping(slot_mapping: torch.Tensor, device: torch.device) -> None:
    checks.check_tensor(
        "slot_mapping", slot_mapping, {"Tk": None}, (torch.int64, torch.int32), device
    )
