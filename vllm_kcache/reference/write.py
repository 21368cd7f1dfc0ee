# SPDX-License-Identifier: Apache-2.0
"""Store K and V of new tokens. Definition of `ops.write_kv`."""

from __future__ import annotations

import torch


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_pages: torch.Tensor,
    v_pool: torch.Tensor,
    hot_cache: object | None = None,
    layer: int = 0,
) -> None:
    """Store each token's K in its page and its V in the host pool. See `ops.write_kv`.

    Without a hot cache there is no slot to update: `layer` names its pages and is not used.
    """
    if hot_cache is not None:
        raise ValueError("hot_cache: the CPU has no hot V cache; accepted: None")
    real = slot_mapping >= 0
    slots = slot_mapping[real]
    page_tokens = k_pages.shape[2]
    pages = torch.div(slots, page_tokens, rounding_mode="floor").long()
    offsets = (slots % page_tokens).long()
    k_pages[pages, :, offsets] = key[real]
    v_pool[pages, :, offsets] = value[real]


def update_page_means(
    v_pool: torch.Tensor, slot_mapping: torch.Tensor, v_page_means: torch.Tensor
) -> None:
    """Recompute the mean V of the pages that a write touched. See `ops.update_page_means`."""
    slots = slot_mapping[slot_mapping >= 0].long()
    if slots.numel() == 0:
        return
    page_tokens = v_pool.shape[2]
    pages, which = torch.unique(slots // page_tokens, return_inverse=True)
    # Tokens of a page are written in order, so what lies before the last one written is filled.
    filled = torch.zeros_like(pages).scatter_reduce_(0, which, slots % page_tokens + 1, "amax")
    values = v_pool[pages].to(v_page_means.dtype)
    unwritten = torch.arange(page_tokens, device=v_pool.device) >= filled[:, None]
    values.masked_fill_(unwritten[:, None, :, None], 0.0)
    v_page_means[pages] = values.sum(2) / filled[:, None, None]
