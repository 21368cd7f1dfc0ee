# SPDX-License-Identifier: Apache-2.0
"""From positions in a request to places in the pools: shared by the reference steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Elements of K (or V) gathered at once. Requests are worked on together up to this size, which
# keeps short requests from paying the overhead of torch one by one, and the scratch in the caches
# of the CPU. One longer request is always worked on whole.
GROUP_ELEMENTS = 1 << 21


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for every model dtype; float64 stays float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def request_groups(sizes: list[int], element_cost: int) -> Iterator[tuple[int, int, int]]:
    """Cut requests into runs of neighbours that are padded to the longest and worked on together.

    Args:
        sizes: pages or V blocks of each request; 0 for a padded row.
        element_cost: elements gathered for one unit of size.
    Yields:
        (first request, one past the last, largest size) with at least one unit of size.
    """
    first = largest = 0
    for request, size in enumerate(sizes):
        grown = max(largest, size)
        if request > first and (request + 1 - first) * grown * element_cost > GROUP_ELEMENTS:
            if largest:
                yield first, request, largest
            first, grown = request, size
        largest = grown
    if largest:
        yield first, len(sizes), largest


def physical_pages(
    block_table: torch.Tensor, logical_pages: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """Page ids of logical pages: [g, ...] int64. Where not `valid`, page 0.

    Columns of `block_table` past a row's length hold anything, so they must not be used as ids.

    Args:
        block_table: [g, MB] int32.
        logical_pages, valid: [g, ...], position of a page in its request, and whether it is one.
    """
    flat = logical_pages.flatten(1).clamp(0, block_table.shape[1] - 1)
    pages = block_table.gather(1, flat).view_as(logical_pages)
    return torch.where(valid, pages, 0).long()


def physical_v_blocks(
    blocks: torch.Tensor, block_table: torch.Tensor, num_kv_heads: int, blocks_per_page: int
) -> torch.Tensor:
    """Physical V blocks of selected logical V blocks: [g, Hkv, N] int64; padding is page 0.

    Args:
        blocks: [g, Hkv, N] int32, padded with -1.
        block_table: [g, MB] int32.
        blocks_per_page: S / T.
    """
    logical_pages = torch.div(blocks.clamp_min(0), blocks_per_page, rounding_mode="floor").long()
    pages = physical_pages(block_table, logical_pages, blocks >= 0)
    heads = torch.arange(num_kv_heads, device=blocks.device)[:, None]
    return (pages * num_kv_heads + heads) * blocks_per_page + blocks.clamp_min(0) % blocks_per_page


def gather_v_blocks(pool: torch.Tensor, rows: torch.Tensor, v_block_tokens: int) -> torch.Tensor:
    """The V blocks (or the same tokens of K) at `rows`: [*rows.shape, T, D], a copy.

    Args:
        pool: [M, Hkv, S, D], possibly strided over M; the last three dims contiguous.
        rows: int64, physical V blocks.
    """
    _, num_kv_heads, page_tokens, head_size = pool.shape
    if pool.is_contiguous():
        blocks = pool.view(-1, v_block_tokens, head_size)
        return blocks.index_select(0, rows.flatten()).view(*rows.shape, v_block_tokens, head_size)
    per_page = num_kv_heads * page_tokens // v_block_tokens
    in_page = pool.view(pool.shape[0], per_page, v_block_tokens, head_size)
    return in_page[torch.div(rows, per_page, rounding_mode="floor"), rows % per_page]
