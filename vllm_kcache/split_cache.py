# SPDX-License-Identifier: Apache-2.0
"""The split cache of one worker, and its form on the CPU: the reference steps, run by an engine.

On the CPU both memories are the same RAM, so nothing is saved; it is the definition of correct, the
test bed, and a way to try the settings of a model without a GPU. On a GPU: split_cache_gpu.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.cache.host_pool import HostPool
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.config import KCacheConfig, KCacheConfigError
from vllm_kcache.reference.attend import attend_blocks
from vllm_kcache.reference.fetch import fetch_blocks
from vllm_kcache.reference.full import attend_full
from vllm_kcache.reference.score import score_blocks
from vllm_kcache.reference.select import select_blocks
from vllm_kcache.reference.write import write_kv

# Settings that `SplitCache.reconfigure` may change; buffers and layers depend on all others.
RECONFIGURABLE = (
    "top_n", "coverage", "mass_threshold", "sink_tokens", "recent_tokens", "tail", "head_combine"
)  # fmt: skip


class Figures(Protocol):
    """Where a step's figures go (integration/counters.py)."""

    def add_selection(self, counts: torch.Tensor, mass: torch.Tensor, row_bytes: int) -> None:
        """Count the lists of one layer and step."""


@dataclass
class Step:
    """One step of an engine, shared by all layers: decodes first, prefills after.

    The first `num_decodes` requests decode one token each; the others prefill.

    Attributes:
        num_decodes: Requests that decode. Under a CUDA graph padded rows count too.
        num_prefills: Requests that prefill.
        max_seq_len: Longest request, tokens; an upper bound.
        query_start_loc: [requests + 1] int32, on the device.
        query_start_loc_cpu: the same on the host.
        seq_lens: [requests] int32, on the device; 0 marks a padded row.
        seq_lens_cpu: [requests] int32, on the host; exact for rows that prefill.
        block_table: [requests, MB] int32, on the device.
        slot_mapping: [tokens] int64, on the device; -1 is padding.
        plan: What the cache works out once per step for all layers.
    """

    num_decodes: int
    num_prefills: int
    max_seq_len: int
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor | None
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    plan: Any = field(default=None, kw_only=True)


@dataclass(frozen=True)
class LayerInputs:
    """What a layer brings to its attention in one step.

    Attributes:
        query: [tokens, Hq, D] model dtype, on the device.
        key, value: [tokens, Hkv, D] model dtype, on the device; None where the layer writes
            nothing, because it reads the pages of another.
        scale: Factor of the scores.
    """

    query: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor | None
    scale: float


class SplitCache:
    """K pages of the device and rows of the host as one cache, for the split layers of one worker.

    It owns the host pool; vLLM owns the K pages and hands them over with each call.

    Args:
        config: The plugin's settings.
        shape: Geometry of the split layers.
        figures: Where a step's figures go.
        device: Where K pages lie.
    """

    def __init__(
        self, config: KCacheConfig, shape: CacheShape, figures: Figures, device: torch.device
    ) -> None:
        self.config = self._started = config
        self.shape = shape
        self.figures = figures
        self.device = device
        self.selection = config.selection(shape.block_tokens)
        self.pool: HostPool | None = None
        self._views: dict[int, LayerView] = {}

    def allocate(self, num_pages: int) -> None:
        """Make the host pool. Replaces one made for profiling.

        Args:
            num_pages: M, pages of the K cache; V of page b lies in the rows of page b of the pool.

        Raises:
            MemoryError: The host cannot hold the pool; the message says what to change.
        """
        self.close()
        self.pool = HostPool(
            self.shape.num_layers,
            num_pages * self.shape.rows_per_page,
            self.shape.row.bytes,
            pinned=self.device.type == "cuda",
        )

    def view(self, layer: int, k_pages: torch.Tensor) -> LayerView:
        """A layer as its kernels take it.

        Args:
            layer: Its number among the split layers, bottom first.
            k_pages: [M, Hkv, S, D] model dtype, on the device.

        Raises:
            RuntimeError: The pool was made for another number of pages.
        """
        view = self._views.get(layer)
        # While vLLM measures the memory of graphs the pages are others, maybe at the same address.
        if view is None or (view.k_pages.data_ptr(), view.k_pages.shape) != (
            k_pages.data_ptr(),
            k_pages.shape,
        ):
            view = self._views[layer] = self._make_view(layer, k_pages)
        return view

    def _make_view(self, layer: int, k_pages: torch.Tensor) -> LayerView:
        rows = k_pages.shape[0] * self.shape.rows_per_page
        if self.pool is None or self.pool.num_rows != rows:
            have = None if self.pool is None else self.pool.num_rows
            raise RuntimeError(f"The host pool has {have} rows a layer, the K pages need {rows}.")
        host_rows = self.pool.layer(layer)
        tail = self.config.resolved_tail
        return LayerView(layer, self.shape, self.selection, tail, k_pages, host_rows)

    def attend(
        self, layer: int, k_pages: torch.Tensor, inputs: LayerInputs, step: Step, out: torch.Tensor
    ) -> None:
        """Store K and V of a step's tokens, then attend: decodes through the selection, prefills
        exactly.

        Args:
            layer: Number of the layer whose pages these are.
            k_pages: [M, Hkv, S, D] model dtype, on the device.
            inputs: What the layer brings.
            step: The batch.
            out: [tokens, Hq, D] model dtype, on the device, overwritten.
        """
        raise NotImplementedError

    def reconfigure(self, settings: dict[str, Any]) -> KCacheConfig:
        """Select and attend by other settings from the next step on.

        Args:
            settings: As for a new engine: what is not given takes its default. Keys outside
                `RECONFIGURABLE` keep the engine's values, and may be given only with those.

        Returns:
            The settings in force.

        Raises:
            KCacheConfigError: A value is not accepted, or this engine was not built for it. Nothing
                has changed then.
        """
        started = self._started.to_json_dict()
        fixed = {key: value for key, value in started.items() if key not in RECONFIGURABLE}
        config = KCacheConfig.from_user({**fixed, **settings})
        for key in settings:
            if key not in RECONFIGURABLE and getattr(config, key) != getattr(self._started, key):
                raise KCacheConfigError(
                    f"kcache_config.{key}={settings[key]!r}: needs a new engine; this one runs "
                    f"with {getattr(self._started, key)!r}. Changed while it runs can be: "
                    f"{', '.join(RECONFIGURABLE)}"
                )
        selection = config.selection(self.shape.block_tokens)
        # Lists of selected blocks are as long as the cap of the start.
        most = self._started.resolved_top_n
        if most is not None and (selection.top_n is None or selection.top_n > most):
            raise KCacheConfigError(
                f"kcache_config.top_n={config.top_n!r}: this engine's buffers hold lists of up to "
                f"top_n={most}, which it was started with. Start it with a larger one, or none."
            )
        self._check_tail(config)
        self.config, self.selection = config, selection
        self._views.clear()
        return config

    def _check_tail(self, config: KCacheConfig) -> None:
        """Refuse a tail that this engine has no buffers for."""

    def close(self) -> None:
        """Free the host pool."""
        self._views.clear()
        if self.pool is not None:
            self.pool.close()
            self.pool = None


class CPUSplitCache(SplitCache):
    """The split cache in plain torch."""

    def attend(
        self, layer: int, k_pages: torch.Tensor, inputs: LayerInputs, step: Step, out: torch.Tensor
    ) -> None:
        view = self.view(layer, k_pages)
        if inputs.key is not None and inputs.value is not None:
            tokens = step.slot_mapping.shape[0]
            write_kv(
                inputs.key[:tokens], inputs.value[:tokens], step.slot_mapping, k_pages, view.v_pages
            )
        decodes = step.num_decodes
        if decodes:
            self._decode(view, inputs, step, out[:decodes])
        if step.num_prefills:
            first = int(step.query_start_loc_cpu[decodes])
            last = int(step.query_start_loc_cpu[decodes + step.num_prefills])
            attend_full(
                inputs.query[first:last],
                k_pages,
                view.v_pages,
                step.block_table[decodes:],
                step.query_start_loc_cpu[decodes:] - first,
                step.seq_lens[decodes:],
                inputs.scale,
                out=out[first:last],
            )

    def _decode(self, view: LayerView, inputs: LayerInputs, step: Step, out: torch.Tensor) -> None:
        """Score, select, fetch, attend: one query per request."""
        decodes, shape, tokens = step.num_decodes, self.shape, self.shape.block_tokens
        query = inputs.query[:decodes]
        table, seq_lens = step.block_table[:decodes], step.seq_lens[:decodes]
        batch = (table, seq_lens, inputs.scale, tokens)
        max_blocks = shape.max_blocks(int(seq_lens.max()))
        block_lse = score_blocks(query, view.k_pages, *batch, max_blocks)
        selected = select_blocks(block_lse, seq_lens, shape.num_kv_heads, tokens, view.selection)
        fetched = fetch_blocks(selected, table, view.v_pages, tokens)
        attend_blocks(
            query, view.k_pages, view.v_pages, fetched, selected, *batch, view.tail, out=out,
            clip=view.selection.clip,
        )  # fmt: skip
        self.figures.add_selection(selected.counts, selected.mass, shape.row.bytes)
