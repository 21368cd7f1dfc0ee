# SPDX-License-Identifier: Apache-2.0
"""Workers: they size the cache by both memories, make the host pool and watch the backend."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.attention.attention import Attention
from vllm.platforms import current_platform

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.cache.host_memory import host_budget_bytes, too_little_for_one_request
from vllm_kcache.config import KCacheConfig, KCacheConfigError
from vllm_kcache.integration import counters, pools, refusals
from vllm_kcache.integration.backend import KCacheBackend
from vllm_kcache.integration.calibration import calibrate
from vllm_kcache.integration.layers import (
    activate_backend,
    chunk_of,
    is_dense_layer,
)
from vllm_kcache.integration.settings import engines_on_host, settings_of
from vllm_kcache.memory import StepLimits, WindowPool, what_limits
from vllm_kcache.split_cache import SplitCache

logger = init_logger(__name__)

# The configuration names CUSTOM; this process must know what that is before the model is built.
activate_backend()

GIB = 2**30


class SplitCacheWorker:
    """What both workers add to vLLM's. Mixed in before vLLM's worker class."""

    vllm_config: Any
    device: torch.device
    rank: int
    split_cache: SplitCache
    counters: counters.Counters
    # Host bytes for rows as they were before any rank of this machine took its share.
    _first_host_budget: int | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, then make sure that every layer runs the split cache."""
        self.kcache_config = _settings(self.vllm_config)
        KCacheBackend.k_bits = self.kcache_config.resolved_k_bits
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        names = split_layers(self.vllm_config, self.kcache_config)
        # The executor does the same when the model is loaded, and sizes the pages by it.
        current_platform.update_block_size_for_backend(self.vllm_config)
        specs = self.get_kv_cache_spec()  # type: ignore[attr-defined]
        shape = cache_shape_of(self.vllm_config, self.kcache_config, specs, names)
        engine = self.vllm_config.parallel_config.data_parallel_index
        path = counters.path_of(self.vllm_config.instance_id, engine, self.rank)
        self.counters = counters.Counters(path)
        self.split_cache = self._make_cache(shape)
        layers = get_layers_from_vllm_config(self.vllm_config, Attention)
        for name, layer in layers.items():
            owner = layer.kv_sharing_target_layer_name or name
            if owner in names:
                layer.impl.bind(self.split_cache, names.index(owner))
        if shape.k_bits == 4:
            runner = self.model_runner  # type: ignore[attr-defined]
            self.split_cache.k_stats = calibrate(runner, self.vllm_config, names, self.device)
            if self.vllm_config.load_config.load_format == "dummy":
                logger.warning(
                    "KCache: load_format 'dummy' with k_bits 4: K was measured of random weights. "
                    "Do not put others in their place: start an engine with those, or set "
                    "kcache_config.k_bits to 16."
                )

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, where nothing was measured of the weights that are there.

        Raises:
            KCacheConfigError: There are K codes.
        """
        if self.split_cache.shape.k_bits == 4:
            refusals.refuse("reload_weights")
        super().reload_weights(*args, **kwargs)  # type: ignore[misc]

    def _make_cache(self, shape: CacheShape) -> SplitCache:
        raise NotImplementedError

    def determine_available_memory(self) -> int:
        """Bytes for pages: what vLLM finds, or less where the host cannot hold as many rows.

        Beside window layers: those of both pools together, the same on all ranks.
        """
        with pools.measuring():
            available = super().determine_available_memory()  # type: ignore[misc]
        page_bytes, window = self._page_bytes()
        row_bytes = self.split_cache.shape.host_page_bytes
        budget = self._first_host_budget = self._host_budget()
        host_bytes_per_page = self._host_bytes_per_page(page_bytes, row_bytes)
        host_pages = budget // host_bytes_per_page
        self._check_one_request(host_pages, host_bytes_per_page)
        if window is None:
            pages = self._device_pages(available, page_bytes, host_pages)
            self._log_plan(pages, page_bytes, host_pages)
            return pages * page_bytes
        pages = self._device_pages(
            available - window.fixed_bytes, page_bytes, host_pages, window.bytes_beside_page
        )
        if window.holds_most(pages):
            pages = self._device_pages(available - window.most_bytes, page_bytes, host_pages)
        self._check_one_request_fits(pages, available, window)
        self._log_plan(pages, page_bytes, host_pages, window)
        # The engine would take the least blocks of the ranks, and knows of no pages beside them.
        return _least_of_ranks(pools.bytes_asked(window, pages), self.vllm_config)

    def _page_bytes(self) -> tuple[int, WindowPool | None]:
        """Bytes of a page of all layers that attend to the whole context, and what those with a
        window take besides."""
        specs = self.get_kv_cache_spec()  # type: ignore[attr-defined]
        window = pools.window_pool(self.vllm_config, specs)
        if window is not None:
            return window.page_bytes, window
        return sum(spec.page_size_bytes for spec in specs.values()), None

    def _log_plan(
        self, pages: int, page_bytes: int, host_pages: int, window: WindowPool | None = None
    ) -> None:
        """Say how many requests fit, what bounds them, and what would let more in."""
        shape, model_len = self.split_cache.shape, self.vllm_config.model_config.max_model_len
        scheduler = self.vllm_config.scheduler_config
        limits = StepLimits(scheduler.max_num_seqs, scheduler.max_num_batched_tokens, model_len)
        useful = limits.useful_pages(shape.page_tokens)
        device = "CPU" if self.vllm_config.device_config.device_type == "cpu" else "GPU"
        fit = [
            (pages - 1) / count if window is None else window.requests(pages, count)
            for count in (-(-model_len // shape.page_tokens), -(-4096 // shape.page_tokens))
        ]
        logger.info(
            "KCache: %s %.2f GiB on the device, %s %.2f GiB on the host: %d blocks. At once fit "
            "%.1f requests of max_model_len=%d, %.1f of 4096 tokens.",
            "K codes" if shape.k_bits == 4 else "K pages",
            pages * page_bytes / GIB,
            "K and V" if shape.row.has_keys else "V",
            pages * shape.host_page_bytes / GIB,
            pages,
            fit[0],
            model_len,
            fit[1],
        )
        if window is not None:
            blocks = window.blocks_for(pages)
            logger.info(
                "KCache: layers with a window or a state %.2f GiB on the device: %d blocks, of "
                "%.1f requests.",
                blocks * window.block_bytes / GIB,
                blocks,
                (blocks - window.step_blocks) / window.request_blocks,
            )
        limit, remedy = what_limits(pages, host_pages, useful, shape, device)
        logger.info("KCache: requests are limited by %s. %s", limit, remedy)

    def _device_pages(
        self, available: int, page_bytes: int, host_pages: int, bytes_beside_page: int = 0
    ) -> int:
        """Blocks, and what goes with them in the device's memory."""
        return min(available // (page_bytes + bytes_beside_page), host_pages)

    def _check_one_request_fits(self, pages: int, available: int, window: WindowPool) -> None:
        """Refuse a device that cannot hold one request in both pools: vLLM knows of one."""
        needed = window.longest_pages + 1
        if pages >= needed or self.vllm_config.cache_config.num_gpu_blocks_override is not None:
            return
        least = window.bytes_for(needed)
        raise KCacheConfigError(
            f"kcache: one request of max_model_len={self.vllm_config.model_config.max_model_len} "
            f"needs more than {least / GIB:.2f} GiB for its K pages and the blocks of window "
            f"layers, and {max(0, available) / GIB:.2f} GiB are left. Lower --max-model-len or "
            "--max-num-batched-tokens, or raise --gpu-memory-utilization (or "
            "--kv-cache-memory-bytes, where that is given)."
        )

    def _host_budget(self) -> int:
        """Host bytes that this rank may pin for rows."""
        ranks = self.vllm_config.parallel_config.local_world_size
        engines = engines_on_host(self.vllm_config)
        return host_budget_bytes(self.kcache_config.host_memory_gib, ranks, engines)

    def _host_bytes_per_page(self, page_bytes: int, row_bytes: int) -> int:
        """What one page takes of that budget."""
        return row_bytes

    def _check_one_request(self, pages_host: int, host_bytes_per_page: int) -> None:
        """Refuse a host pool that cannot hold one request of max_model_len.

        vLLM checks the pages of both sides later, and would ask for GPU memory.
        """
        cache, model = self.vllm_config.cache_config, self.vllm_config.model_config
        # At -1 vLLM lowers max_model_len to what fits. One block it keeps for itself.
        tokens = 1 if model.original_max_model_len == -1 else model.max_model_len
        pages = -(-tokens // self.split_cache.shape.page_tokens) + 1
        if cache.num_gpu_blocks_override is not None or pages_host >= pages:
            return
        ranks = self.vllm_config.parallel_config.local_world_size
        needed = pages * host_bytes_per_page * ranks * engines_on_host(self.vllm_config)
        raise KCacheConfigError(
            too_little_for_one_request(self.kcache_config.host_memory_gib, tokens, needed)
        )

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Allocate the K pages, then the host pool of as many pages."""
        pages = pools.own_pool_pages(kv_cache_config)
        if pages is None:
            if len(kv_cache_config.kv_cache_groups) != 1:
                refusals.refuse("kv_cache_groups", len(kv_cache_config.kv_cache_groups))
            pages = kv_cache_config.num_blocks
        self._check_host_memory(pages, kv_cache_config.num_blocks)
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]
        self.split_cache.allocate(pages)
        self.counters["host_pool_blocks"] = pages
        self.counters["host_pool_bytes"] = pages * self.split_cache.shape.host_page_bytes

    def _check_host_memory(self, pages: int, blocks: int | None = None) -> None:
        """num_gpu_blocks_override goes past `determine_available_memory`: look again.

        At the budget of that time: meanwhile another rank may have taken its share, which must not
        count against this one's.
        """
        needed = pages * self.split_cache.shape.host_page_bytes
        budget = self._first_host_budget
        if budget is None:
            budget = self._host_budget()
        if needed > budget:
            many = "that many blocks" if blocks in (None, pages) else f"{pages} pages beside them"
            raise KCacheConfigError(
                f"num_gpu_blocks_override={blocks or pages}: the rows of {many} need "
                f"{needed / GIB:.2f} GiB of host memory, and this rank may use "
                f"{budget / GIB:.2f} GiB. Lower --num-gpu-blocks-override or raise "
                "kcache_config.host_memory_gib."
            )

    def kcache_counters(self) -> list[float]:
        """Figures of this rank (see `vllm_kcache.metrics`)."""
        return self.counters.read().tolist()

    def kcache_reconfigure(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Select and attend by other settings from the next step on (see `SplitCache.reconfigure`).

        Callers use `integration.reconfigure.reconfigure`, which also sees to the prefix cache.

        Raises:
            KCacheConfigError: CUDA graphs hold the present selection, or a setting is refused.
        """
        config = self.vllm_config
        if config.device_config.device_type != "cpu" and not config.model_config.enforce_eager:
            raise KCacheConfigError(
                "kcache_config cannot change while the engine runs: its CUDA graphs hold the "
                "selection. Start it with enforce_eager=True, or start another engine."
            )
        return self.split_cache.reconfigure(settings).to_json_dict()

    def shutdown(self) -> None:
        """Stop the worker and free the host pool."""
        super().shutdown()  # type: ignore[misc]
        if hasattr(self, "split_cache"):
            self.split_cache.close()


def _least_of_ranks(value: int, vllm_config: Any) -> int:
    """The least that a rank of this engine has."""
    if vllm_config.parallel_config.tensor_parallel_size == 1:
        return value
    least = torch.tensor(value)
    group = get_tp_group().cpu_group
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group)
    return int(least)


def _settings(vllm_config: Any) -> KCacheConfig:
    config = settings_of(vllm_config)
    if config is None:
        raise RuntimeError("This worker needs additional_config['kcache'].")
    return config


def cache_shape_of(
    vllm_config: Any, config: KCacheConfig, specs: dict[str, Any], names: list[str]
) -> CacheShape:
    """Geometry of the split layers, read from vLLM's cache specs.

    Args:
        vllm_config: vLLM's configuration.
        config: The plugin's settings.
        specs: Layer name to cache spec, all layers of this rank.
        names: The split layers.

    Raises:
        KCacheConfigError: The split layers differ in shape, or the V block does not fit a page.
    """
    geometry = {
        (s.num_kv_heads, s.block_size, s.head_size, s.head_size_v, s.dtype)
        for s in (specs[name] for name in names)
    }
    if len(geometry) != 1:
        # (KV heads, block size, head size, V head size, dtype)
        refusals.refuse("layer_shapes", "; ".join(sorted(map(str, geometry))))
    num_kv_heads, page_tokens, head_size, head_size_v, dtype = geometry.pop()
    if head_size != head_size_v:
        refusals.refuse("v_head_size", f"head_size_v={head_size_v} beside head_size={head_size}")
    return CacheShape(
        num_layers=len(names),
        num_query_heads=vllm_config.model_config.get_num_attention_heads(
            vllm_config.parallel_config
        ),
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        page_tokens=page_tokens,
        block_tokens=config.resolved_v_block_tokens(head_size, dtype.itemsize, page_tokens),
        dtype=dtype,
        k_bits=config.resolved_k_bits,
        host_dtype=config.resolved_host_dtype(dtype),
    )


def split_layers(vllm_config: Any, config: KCacheConfig) -> list[str]:
    """Names of the layers that run the split cache, bottom first, after checking every layer's
    backend.

    Raises:
        RuntimeError: A layer that should run the split cache runs another attention.
        KCacheConfigError: A layer changes our attention, or differs from the others.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    names: list[str] = []
    query_heads: set[int] = set()
    for name, layer in get_layers_from_vllm_config(vllm_config, Attention).items():
        backend = layer.get_attn_backend()
        is_ours = backend is KCacheBackend
        if issubclass(backend, KCacheBackend) and not is_ours:
            # vLLM derives such classes to change what is attended, as for bidirectional prompts.
            refusals.refuse("derived_backend", f"{backend.__name__} of {name}")
        has_window = layer.sliding_window is not None or chunk_of(layer) is not None
        is_draft = layer.is_draft_layer
        if is_draft and has_window:
            refusals.refuse("draft_windows", name)
        if is_draft and layer.kv_sharing_target_layer_name is not None:
            refusals.refuse("draft_shares", f"{name} that of {layer.kv_sharing_target_layer_name}")
        if has_window:
            # The model's number of heads may be that of its window layers.
            query_heads.add(
                vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
            )
        # Numbers of dense layers are those of the model that is served.
        is_dense = not is_draft and is_dense_layer(name, config, num_layers)
        if is_ours == (has_window or is_dense or is_draft):
            kind = "draft" if is_draft else "window" if has_window else "dense"
            stock = f"vLLM own attention ({kind} layer)"
            raise RuntimeError(
                f"Layer {name} runs {layer.get_attn_backend().__name__}, expected "
                f"{'KCacheBackend' if not is_ours else stock}."
            )
        if is_ours and layer.kv_sharing_target_layer_name is not None:
            if vllm_config.device_config.device_type != "cpu":
                target = layer.kv_sharing_target_layer_name
                refusals.refuse("shared_cache", f"{name} that of {target}")
        elif is_ours:
            names.append(name)
            query_heads.add(layer.num_heads)
    if len(query_heads) > 1:
        refusals.refuse("layer_query_heads", ", ".join(map(str, sorted(query_heads))))
    if not names:
        raise KCacheConfigError(
            "kcache_config.dense_layers: every layer of this model is dense or has a window, so "
            "there is nothing to split. List fewer layers."
        )
    return sorted(names, key=extract_layer_index)
