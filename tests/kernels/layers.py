# SPDX-License-Identifier: Apache-2.0
"""A case of tests/shapes.py as the kernels take it: a layer's view, a batch, a workspace."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tests.reference.coded import Coded
from tests.shapes import Case
from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.cache.hot_cache import HotCache
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels.select import packed_view
from vllm_kcache.kernels.workspace import DecodeBatch, DecodeWorkspace
from vllm_kcache.types import KStats, Selection, Tail


def cache_shape(case: Case, num_layers: int = 2) -> CacheShape:
    """Geometry of the case's layers."""
    shape = case.shape
    return CacheShape(
        num_layers, shape.num_heads, shape.num_kv_heads, shape.head_size, shape.page_tokens,
        shape.v_block_tokens, case.query.dtype,
    )  # fmt: skip


def host_rows(v_pool: torch.Tensor, shape: CacheShape) -> torch.Tensor:
    """V pages [M, Hkv, S, D] as rows, the same memory."""
    return v_pool.view(-1, shape.block_tokens * shape.head_size).view(torch.uint8)


@dataclass(frozen=True)
class Layer:
    """One layer with a batch.

    Attributes:
        view: with poisoned nothing: pages and rows are those of the case.
        batch: its requests.
        workspace: for that batch, floats poisoned.
    """

    view: LayerView
    batch: DecodeBatch
    workspace: DecodeWorkspace

    @property
    def cache(self) -> HotCache:
        assert self.view.hot_cache is not None
        return self.view.hot_cache

    def with_cache(self, cache: HotCache) -> Layer:
        """The same over another hot cache."""
        view = replace(self.view, hot_cache=cache)
        return replace(self, view=replace(view, packed=packed_view(view)))


def layer_of(
    case: Case,
    selection: Selection,
    tail: Tail = "renormalize",
    num_slots: int = 64,
    device: str = "cpu",
    index: int = 1,
) -> Layer:
    """The case as layer 1 of two, on the device."""
    shape = cache_shape(case)
    v_pool = case.v_pool if device == "cpu" else case.v_pool.pin_memory()
    rows = host_rows(v_pool, shape)
    cache = HotCache.make(num_slots, 2, rows.shape[0], shape.row.bytes, device)
    view = LayerView(index, shape, selection, tail, case.k_pages.to(device), rows, hot_cache=cache)
    view = replace(view, packed=packed_view(view))
    return _with_batch(case, view, device)


def code_layer_of(
    coded: Coded, selection: Selection, tail: Tail, num_slots: int, device: str = "cpu"
) -> Layer:
    """Coded pages and rows of a case as layer 1 of two, on the device."""
    case = coded.case
    shape = replace(cache_shape(case), k_bits=4, host_dtype=coded.row.host_dtype)
    rows = coded.host_rows if device == "cpu" else coded.host_rows.pin_memory()
    cache = HotCache.make(num_slots, 2, rows.shape[0], shape.row.bytes, device)
    stats = KStats(coded.stats.mean.to(device), coded.stats.deviation.to(device))
    view = LayerView(
        1, shape, selection, tail, coded.code_pages.to(device), rows, hot_cache=cache, k_stats=stats
    )
    view = replace(view, packed=packed_view(view))
    return _with_batch(case, view, device)


def _with_batch(case: Case, view: LayerView, device: str) -> Layer:
    batch = DecodeBatch(
        case.query.to(device), case.block_table.to(device), case.seq_lens.to(device), case.scale,
        case.shape.max_blocks,
    )  # fmt: skip
    return Layer(view, batch, poisoned_workspace(view, batch))


def poisoned_workspace(view: LayerView, batch: DecodeBatch) -> DecodeWorkspace:
    """One that the batch just fits."""
    workspace = DecodeWorkspace.make(
        view.shape, view.selection, max(1, batch.num_requests), batch.max_blocks,
        batch.query.device, batch.most_tokens,
    )  # fmt: skip
    for name in (
        "block_lse", "chunk_lse", "chunk_max", "mass", "lse", "dropped", "code_query", "code_bias",
        "sums", "weights",
    ):  # fmt: skip
        getattr(workspace, name).fill_(torch.nan)
    for name in ("blocks", "rows", "counts"):
        getattr(workspace, name).fill_(-99)
    return workspace
