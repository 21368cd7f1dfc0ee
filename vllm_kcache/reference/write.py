# SPDX-License-Identifier: Apache-2.0
"""Store K and V of new tokens. The definition of this step."""

from __future__ import annotations

import torch


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_pages: torch.Tensor,
    v_pool: torch.Tensor,
) -> None:
    """Store each token's K in its page and its V in the host pool, write-through.

    Token i goes to page `slot // S` at offset `slot % S`.

    Args:
        key: [Tk, Hkv, D] model dtype. May be strided.
        value: [Tk, Hkv, D] model dtype. May be strided.
        slot_mapping: [Tk] int64 (or int32). -1 marks padding, which is not stored. No slot
            occurs twice.
        k_pages: [M, Hkv, S, D] model dtype. Written. May be strided over M.
        v_pool: [M, Hkv, S, D] model dtype, host (mapped, for a GPU), contiguous. Written.
    """
    real = slot_mapping >= 0
    slots = slot_mapping[real]
    page_tokens = k_pages.shape[2]
    pages = torch.div(slots, page_tokens, rounding_mode="floor").long()
    offsets = (slots % page_tokens).long()
    k_pages[pages, :, offsets] = key[real]
    v_pool[pages, :, offsets] = value[real]
