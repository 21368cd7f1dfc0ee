# SPDX-License-Identifier: Apache-2.0
"""One split layer as its kernels take it: where its pages, rows and hot slots lie, and its rule."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.cache.hot_cache import HotCache
from vllm_kcache.types import KStats, Selection, Tail


@dataclass(frozen=True)
class LayerView:
    """Everything of a layer that stays from step to step.

    Attributes:
        index: The layer's number in the host pool and in the hot cache's table.
        shape: Geometry.
        selection, tail: The rule, and what happens to the mass that is not selected.
        k_pages: [M, Hkv, S, D] model dtype, GPU (host on the CPU). May be strided over M. With
            k_bits 4 [M, Hkv, S, C] of as many bytes as codes have: see `code_pages`.
        host_rows: [M * Hkv * S / T, row bytes] uint8, host (mapped for the GPU). Row
            `(page * Hkv + head) * (S / T) + offset / T`.
        hot_cache: Rows in GPU memory; None on the CPU.
        packed: The same for the extension (`kcache::layer_view`); None on the CPU.
        k_stats: Constants of the layer's K codes, on its device; None with k_bits 16.
    """

    index: int
    shape: CacheShape
    selection: Selection
    tail: Tail
    k_pages: torch.Tensor
    host_rows: torch.Tensor
    hot_cache: HotCache | None = None
    packed: torch.Tensor | None = None
    k_stats: KStats | None = None

    # Each is made once: prompts ask for them at every layer, and a view of a tensor takes some us.
    @functools.cached_property
    def code_pages(self) -> torch.Tensor:
        """The K pages as bytes: [M, Hkv, S * (Dp / 2 + 4)] uint8, GPU; the same memory. Of a page
        and head the codes of all tokens, [S, Dp / 2], then scale and zero, [S, 2] float16."""
        return self.k_pages.view(torch.uint8).flatten(2)

    @functools.cached_property
    def v_pages(self) -> torch.Tensor:
        """V of host rows without K as pages: [M, Hkv, S, D] model dtype, host; the same memory."""
        shape = self.shape
        pages = (-1, shape.num_kv_heads, shape.page_tokens, shape.head_size)
        return self.host_rows.view(shape.dtype).view(pages)

    @functools.cached_property
    def hot_values(self) -> torch.Tensor:
        """V of the hot slots: [R, T, D] model dtype, GPU."""
        assert self.hot_cache is not None
        return self.shape.row.values(self.hot_cache.slots)

    @functools.cached_property
    def first_owner(self) -> int:
        """Flat index into the hot cache's table of the layer's first row."""
        return 0 if self.hot_cache is None else self.index * self.hot_cache.rows_per_layer
