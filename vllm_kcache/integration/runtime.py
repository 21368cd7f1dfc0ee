# SPDX-License-Identifier: Apache-2.0
"""The split cache of one worker: its host pool, its counters, and the two ways to attend.

There is one per process. The attention layers reach it through `current()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_kcache.cache.host_pool import HostPool
from vllm_kcache.config import KCacheConfig, KCacheConfigError
from vllm_kcache.integration.counters import Counters
from vllm_kcache.integration.metadata import KCacheMetadata
from vllm_kcache.types import Tail

# Settings that `Runtime.reconfigure` may change; buffers and layers depend on all others.
RECONFIGURABLE = (
    "top_n", "coverage", "mass_threshold", "sink_tokens", "recent_tokens", "tail", "head_combine"
)  # fmt: skip


@dataclass(frozen=True)
class LayerInputs:
    """What a layer brings to its attention.

    Attributes:
        name: The layer whose pages are read; another one where layers share a cache.
        query: [tokens, Hq, D] model dtype, on the device.
        key: [tokens, Hkv, D] model dtype, on the device; None where the layer writes nothing.
        value: [tokens, Hkv, D] model dtype, on the device; None where the layer writes nothing.
        k_pages: [M, Hkv, S, D] model dtype, on the device.
        scale: Factor of the scores.
    """

    name: str
    query: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor | None
    k_pages: torch.Tensor
    scale: float


@dataclass(frozen=True)
class PageShape:
    """Geometry of the split layers, the same in all of them.

    Attributes:
        layer_names: Layers whose V is in the host pool, bottom first.
        num_kv_heads: KV heads of this rank.
        page_tokens: Tokens of a K page.
        head_size: Values per head.
        dtype: Dtype of K and V.
    """

    layer_names: tuple[str, ...]
    num_kv_heads: int
    page_tokens: int
    head_size: int
    dtype: torch.dtype

    @property
    def v_bytes_per_page(self) -> int:
        """Host bytes that one page needs, over all layers."""
        values = self.num_kv_heads * self.page_tokens * self.head_size
        return len(self.layer_names) * values * self.dtype.itemsize


class Runtime:
    """Base of the CPU and GPU runtimes: owns the host pool and the counters.

    Args:
        config: The plugin's settings.
        shape: Geometry of the split layers.
        counters: Where a step's figures go.
        device: Where K pages lie.
    """

    def __init__(
        self, config: KCacheConfig, shape: PageShape, counters: Counters, device: torch.device
    ) -> None:
        self.config = config
        self.shape = shape
        self.counters = counters
        self.device = device
        self.v_block_tokens = config.resolved_v_block_tokens(
            shape.head_size, shape.dtype.itemsize, shape.page_tokens
        )
        self.selection = config.selection(self.v_block_tokens)
        self._started = config
        self.layer_index = {name: index for index, name in enumerate(shape.layer_names)}
        self.pool: HostPool | None = None

    def allocate(self, num_pages: int) -> None:
        """Make the host pool. Replaces a pool made for profiling.

        Args:
            num_pages: Pages of the K cache; V of page b is page b of the pool.

        Raises:
            MemoryError: The host cannot hold the pool; the message says what to change.
        """
        self.close()
        shape = self.shape
        self.pool = HostPool(
            num_layers=len(shape.layer_names),
            num_pages=num_pages,
            num_kv_heads=shape.num_kv_heads,
            page_tokens=shape.page_tokens,
            head_size=shape.head_size,
            dtype=shape.dtype,
            pinned=self.device.type == "cuda",
        )

    def v_pool(self, layer_name: str, num_pages: int) -> torch.Tensor:
        """V of one layer: [M, Hkv, S, D] model dtype, host.

        Args:
            layer_name: The layer.
            num_pages: Pages of the layer's K cache.

        Raises:
            RuntimeError: The pool was made for another number of pages.
        """
        have = None if self.pool is None else self.pool.layer_shape[0]
        if self.pool is None or have != num_pages:
            raise RuntimeError(f"The host V pool has {have} pages, the K cache {num_pages}.")
        return self.pool.layer(self.layer_index[layer_name])

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
        selection = config.selection(self.v_block_tokens)
        # Lists of selected blocks are as long as the cap of the start.
        most = self._started.resolved_top_n
        if most is not None and (selection.top_n is None or selection.top_n > most):
            raise KCacheConfigError(
                f"kcache_config.top_n={config.top_n!r}: this engine's buffers hold lists of up to "
                f"top_n={most}, which it was started with. Start it with a larger one, or none."
            )
        if config.resolved_tail not in self.supported_tails():
            raise KCacheConfigError(
                f"kcache_config.tail={config.resolved_tail!r}: this engine can change to "
                f"{', '.join(self.supported_tails())}; another only if it was started with it"
            )
        self.config, self.selection = config, selection
        return config

    def supported_tails(self) -> tuple[Tail, ...]:
        """What `tail` may be changed to."""
        return ("renormalize", "clip", "drop")

    def run_layer(self, inputs: LayerInputs, step: KCacheMetadata, output: torch.Tensor) -> None:
        """Store K and V of a step's tokens, then attend (see `KCacheImpl.forward`).

        Args:
            inputs: What the layer brings.
            step: The batch.
            output: [tokens, Hq, D] model dtype, on the device, overwritten.
        """
        raise NotImplementedError

    def fill_host_pool(self, std: float) -> None:
        """Overwrite all V with normally distributed values (benchmarks only).

        Args:
            std: Standard deviation.
        """
        if self.pool is None:
            raise RuntimeError("The host V pool has not been made yet.")
        sample = (torch.randn(1 << 26) * std).to(self.shape.dtype)
        for index in range(self.pool.num_layers):
            flat = self.pool.layer(index).flatten()
            for first in range(0, flat.numel(), sample.numel()):
                part = flat[first : first + sample.numel()]
                part.copy_(sample[: part.numel()])

    def close(self) -> None:
        """Free the host pool."""
        if self.pool is not None:
            self.pool.close()
            self.pool = None


_current: Runtime | None = None


def start(runtime: Runtime) -> None:
    """Make this the runtime of the process."""
    global _current
    if _current is not None:
        _current.close()
    _current = runtime


def current() -> Runtime:
    """The runtime of the process.

    Raises:
        RuntimeError: The worker has not started one: attention runs in a worker that is not ours.
    """
    if _current is None:
        raise RuntimeError("The split cache is not running: this worker was not started by kcache.")
    return _current


def stop() -> None:
    """Close the runtime of the process, if there is one."""
    global _current
    if _current is not None:
        _current.close()
        _current = None


def page_shape_of(vllm_config: Any, specs: dict[str, Any], split_layers: list[str]) -> PageShape:
    """Geometry of the split layers, read from vLLM's cache specs.

    Args:
        vllm_config: vLLM's configuration.
        specs: Layer name to cache spec, all layers of this rank.
        split_layers: Names of the layers that use our backend.

    Raises:
        KCacheConfigError: The split layers differ in shape.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    names = sorted((n for n in split_layers if n in specs), key=extract_layer_index)
    geometry = {
        (s.num_kv_heads, s.block_size, s.head_size, s.head_size_v, s.dtype)
        for s in (specs[name] for name in names)
    }
    if len(geometry) != 1:
        raise KCacheConfigError(
            "--kv-backend kcache does not support layers of different shapes: "
            f"{len(geometry)} sets of (KV heads, block size, head size, V head size, dtype) found: "
            f"{sorted(map(str, geometry))}. Serve this model with vLLM's own backend."
        )
    num_kv_heads, page_tokens, head_size, head_size_v, dtype = geometry.pop()
    if head_size != head_size_v:
        raise KCacheConfigError(
            f"--kv-backend kcache does not support head_size_v={head_size_v} beside "
            f"head_size={head_size}. Serve this model with vLLM's own backend."
        )
    return PageShape(tuple(names), num_kv_heads, page_tokens, head_size, dtype)
