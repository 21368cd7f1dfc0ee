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
from vllm_kcache.reference.attend import attend_blocks, attend_rows, estimate_errors
from vllm_kcache.reference.fetch import fetch_blocks, fetch_rows
from vllm_kcache.reference.full import attend_full, attend_full_rows
from vllm_kcache.reference.score import score_blocks, score_codes
from vllm_kcache.reference.select import request_lse, select_blocks
from vllm_kcache.reference.sinks import refine_lse, share_of_tokens
from vllm_kcache.reference.write import write_codes_and_rows, write_kv
from vllm_kcache.types import KStats

# Settings that `SplitCache.reconfigure` may change; buffers and layers depend on all others.
RECONFIGURABLE = (
    "top_n", "coverage", "mass_threshold", "threshold_length", "sink_tokens", "recent_tokens",
    "tail", "head_combine",
)  # fmt: skip


class Figures(Protocol):
    """Where a step's figures go (integration/counters.py)."""

    def add_selection(self, counts: torch.Tensor, mass: torch.Tensor, row_bytes: int) -> None:
        """Count the lists of one layer and step."""

    def add_estimate_errors(self, errors: torch.Tensor) -> None:
        """Count how far estimates were from the truth, for the blocks of one layer and step."""


@dataclass
class Step:
    """One step of an engine, shared by all layers: decodes first, prefills after.

    The first `num_decodes` requests decode one token each; the others prefill. Where drafts are
    verified each of these tokens is a request of its own here.

    Attributes:
        num_decodes: Requests that decode. Under a CUDA graph padded rows count too.
        num_prefills: Requests that prefill.
        max_seq_len: Longest request, tokens; an upper bound.
        query_start_loc: [requests + 1] int32, on the device.
        query_start_loc_cpu: the same on the host.
        seq_lens: [requests] int32, on the device; 0 marks a padded row.
        seq_lens_cpu: [requests] int32, on the host; exact for rows that prefill. May be None where
            none does.
        block_table: [requests, MB] int32, on the device.
        slot_mapping: [tokens] int64, on the device; -1 is padding.
        plan: What the cache works out once per step for all layers.
        spans: [decodes, 2] int32, on the device; None where each brings one token. Of a token, how
            many of its request decode before it and after it in this step, side by side.
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
    spans: torch.Tensor | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class LayerInputs:
    """What a layer brings to its attention in one step.

    Attributes:
        query: [tokens, Hq, D] model dtype, on the device.
        key, value: [tokens, Hkv, D] model dtype, on the device; None where the layer writes
            nothing, because it reads the pages of another.
        scale: Factor of the scores.
        sinks: [Hq], on the device. Learned scores beside those of the tokens; None where the model
            has none.
        soft_cap: Bound of the scaled scores (reference/soft_cap.py); None for none.
    """

    query: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor | None
    scale: float
    sinks: torch.Tensor | None = None
    soft_cap: float | None = None


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
        # Constants of the codes of each layer; measured before the first page is written.
        self.k_stats: list[KStats] = []
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
            k_pages: [M, Hkv, S, D] model dtype, on the device; of fewer elements with codes.

        Raises:
            RuntimeError: The pool was made for another number of pages, or the pages for another
                form of K.
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
        token_bytes = k_pages.shape[3] * k_pages.dtype.itemsize
        if token_bytes != self.shape.k_token_bytes:
            raise RuntimeError(
                f"The K pages have {token_bytes} bytes a token and head, "
                f"k_bits={self.shape.k_bits} needs {self.shape.k_token_bytes}."
            )
        return LayerView(
            layer, self.shape, self.selection, self.config.resolved_tail, k_pages,
            self.pool.layer(layer),
            k_stats=None if self.shape.k_bits == 16 else self.k_stats[layer],
        )  # fmt: skip

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
                `RECONFIGURABLE` keep the engine's values, and may be given only with those, "auto"
                being what it means to this engine (of memory it is what was free at its start,
                which no number repeats).

        Returns:
            The settings in force.

        Raises:
            KCacheConfigError: A value is not accepted, or this engine was not built for it. Nothing
                has changed then.
        """
        started = self._started.to_json_dict()
        fixed = {key: value for key, value in started.items() if key not in RECONFIGURABLE}
        config = KCacheConfig.from_user({**fixed, **settings})
        asked, runs_with = self._settings_of_start(config), self._settings_of_start(self._started)
        for key in settings:
            if key not in RECONFIGURABLE and asked[key] != runs_with[key]:
                raise KCacheConfigError(
                    f"kcache_config.{key}={settings[key]!r}: needs a new engine; this one runs "
                    f"with {runs_with[key]!r}. Changed while it runs can be: "
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

    def _settings_of_start(self, config: KCacheConfig) -> dict[str, Any]:
        """What cannot change while this engine runs, each value in one form only.

        Raises:
            KCacheConfigError: V blocks of so many tokens do not divide a page.
        """
        shape, dense = self.shape, config.dense_layers
        values = {key: getattr(config, key) for key in KCacheConfig.model_fields}
        if not isinstance(dense, int):
            layers = tuple(sorted(set(dense)))
            dense = len(layers) if layers == tuple(range(len(layers))) else layers
        values |= {
            "k_bits": config.resolved_k_bits,
            "host_dtype": config.resolved_host_dtype(shape.dtype),
            "v_block_tokens": config.resolved_v_block_tokens(
                shape.head_size, shape.dtype.itemsize, shape.page_tokens
            ),
            "dense_layers": dense,
        }
        if config.prefill == "auto":
            values["prefill"] = self.prefill_name
        return values

    @property
    def prefill_name(self) -> str:
        """The kernel of exact prefill, as the setting names it."""
        return "torch"

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
        self._write(view, inputs, step.slot_mapping)
        decodes = step.num_decodes
        if decodes:
            self._decode(view, inputs, step, out[:decodes])
        if step.num_prefills:
            self._prefill(view, inputs, step, out)

    def _write(self, view: LayerView, inputs: LayerInputs, slots: torch.Tensor) -> None:
        if inputs.key is None or inputs.value is None:
            return
        key, value = inputs.key[: slots.shape[0]], inputs.value[: slots.shape[0]]
        if view.k_stats is None:
            write_kv(key, value, slots, view.k_pages, view.v_pages)
            return
        write_codes_and_rows(
            key, value, slots, view.code_pages, view.host_rows, self.shape.row, view.k_stats
        )

    def _prefill(self, view: LayerView, inputs: LayerInputs, step: Step, out: torch.Tensor) -> None:
        """Exact attention of prompt chunks to themselves and to everything before them."""
        decodes = step.num_decodes
        first = int(step.query_start_loc_cpu[decodes])
        last = int(step.query_start_loc_cpu[decodes + step.num_prefills])
        batch = (
            step.block_table[decodes:], step.query_start_loc_cpu[decodes:] - first,
            step.seq_lens[decodes:], inputs.scale, out[first:last],
        )  # fmt: skip
        query = inputs.query[first:last]
        if view.k_stats is None:
            attend_full(query, view.k_pages, view.v_pages, *batch, inputs.sinks, inputs.soft_cap)
            return
        chunk = None
        if inputs.key is not None and inputs.value is not None:
            chunk = inputs.key[first:last], inputs.value[first:last]
        attend_full_rows(
            query, view.host_rows, self.shape.row, view.k_stats, self.shape.page_tokens, chunk,
            *batch, inputs.sinks, inputs.soft_cap,
        )  # fmt: skip

    def _decode(self, view: LayerView, inputs: LayerInputs, step: Step, out: torch.Tensor) -> None:
        """Score, select, fetch, attend: one query per request."""
        decodes, shape, tokens = step.num_decodes, self.shape, self.shape.block_tokens
        query, stats, scale = inputs.query[:decodes], view.k_stats, inputs.scale
        cap = inputs.soft_cap
        table, seq_lens = step.block_table[:decodes], step.seq_lens[:decodes]
        batch = (table, seq_lens, scale, tokens)
        max_blocks = shape.max_blocks(int(seq_lens.max()))
        if stats is None:
            block_lse = score_blocks(query, view.k_pages, *batch, max_blocks, soft_cap=cap)
        else:
            block_lse = score_codes(query, view.code_pages, stats, *batch, max_blocks, soft_cap=cap)
        selected = select_blocks(
            block_lse, seq_lens, shape.num_kv_heads, tokens, view.selection,
            estimated=stats is not None,
        )  # fmt: skip
        if stats is None:
            fetched = fetch_blocks(selected, table, view.v_pages, tokens)
            attend_blocks(
                query, view.k_pages, view.v_pages, fetched, selected, *batch, view.tail, out=out,
                clip=view.selection.clips(seq_lens), soft_cap=cap,
            )  # fmt: skip
        else:
            fetched = fetch_rows(
                selected, table, view.host_rows, shape.num_kv_heads, shape.page_tokens // tokens
            )
            refined = block_lse.new_zeros((*block_lse.shape[:2], selected.blocks.shape[2]))
            attend_rows(
                query, view.host_rows, shape.row, stats, fetched, selected, seq_lens, scale,
                view.tail, out=out, clip=view.selection.clips(seq_lens),
                refined=refined, soft_cap=cap,
            )  # fmt: skip
            self.figures.add_estimate_errors(estimate_errors(block_lse, refined, selected))
            block_lse = refine_lse(block_lse, refined, selected)
        if inputs.sinks is not None:
            lse = request_lse(block_lse, seq_lens, tokens)
            out.mul_(share_of_tokens(lse, inputs.sinks)[..., None])
        self.figures.add_selection(selected.counts, selected.mass, shape.row.bytes)
