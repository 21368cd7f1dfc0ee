# SPDX-License-Identifier: Apache-2.0
"""Store K and V of new tokens. The definition of this step."""

from __future__ import annotations

import torch

from vllm_kcache.cache.formats import RowFormat, code_bytes
from vllm_kcache.reference.codes import quantise_int8, transform_keys, write_codes
from vllm_kcache.types import KStats


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
    real, pages, offsets = _places(slot_mapping, k_pages.shape[2])
    k_pages[pages, :, offsets] = key[real]
    v_pool[pages, :, offsets] = value[real]


def write_codes_and_rows(
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    code_pages: torch.Tensor,
    host_rows: torch.Tensor,
    row: RowFormat,
    stats: KStats,
) -> None:
    """Store each token's K code in its page, and its K and V in its row of the host pool.

    Args:
        key, value, slot_mapping: as for `write_kv`.
        code_pages: [M, Hkv, S * (Dp / 2 + 4)] uint8. Written. May be strided over M.
        host_rows: [M * Hkv * S / T, row bytes] uint8, host. Written.
        row: What a row holds.
        stats: Constants of the layer's codes.
    """
    page_tokens = code_pages.shape[-1] // code_bytes(row.head_size)
    real, pages, offsets = _places(slot_mapping, page_tokens)
    key, value = key[real], value[real]
    transformed = transform_keys(key, stats)
    write_codes(code_pages, row.head_size, pages, offsets, transformed)
    num_kv_heads = code_pages.shape[1]
    heads = torch.arange(num_kv_heads, device=pages.device)
    in_page = torch.div(offsets, row.block_tokens, rounding_mode="floor")
    rows = (pages[:, None] * num_kv_heads + heads) * (page_tokens // row.block_tokens)
    at = rows + in_page[:, None], (offsets % row.block_tokens)[:, None]
    if row.host_dtype == "int8":
        key_scales, value_scales = row.scales(host_rows)
        key, key_scales[at] = quantise_int8(transformed)
        value, value_scales[at] = quantise_int8(value.to(transformed.dtype))
    row.keys(host_rows)[at] = key
    row.values(host_rows)[at] = value


def _places(
    slot_mapping: torch.Tensor, page_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which tokens are stored, [Tk] bool, and the page and the offset of each of those, int64."""
    real = slot_mapping >= 0
    slots = slot_mapping[real].long()
    return real, torch.div(slots, page_tokens, rounding_mode="floor"), slots % page_tokens
