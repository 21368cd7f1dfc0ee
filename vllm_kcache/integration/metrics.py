# SPDX-License-Identifier: Apache-2.0
"""Metrics of the split cache: at /metrics of a server, and through `metrics(llm)` offline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from prometheus_client import REGISTRY
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_kcache.integration import counters
from vllm_kcache.integration.settings import settings_of

PREFIX = "vllm_kcache_"
_COUNTERS = {
    "fetched_bytes": "Bytes of V read from host memory by decode steps.",
    "decode_layer_steps": "Layers of decode steps attended through the selection.",
    "eager_decode_steps": "Decode steps on a GPU that ran outside the CUDA graphs.",
    "hot_cache_hits": "Selected V blocks found in the hot V cache.",
    "hot_cache_misses": "Selected V blocks fetched into the hot V cache.",
    "direct_host_reads": "Selected V blocks read from host memory by attention itself.",
}
_HISTOGRAMS = {
    "selected_blocks": "V blocks selected, per request, KV head, layer and decode step.",
    "dropped_mass": "Softmax mass not selected, per request, KV head, layer and decode step.",
}


class _Engine:
    """What the server knows of one engine."""

    def __init__(self, instance_id: str, index: int, num_blocks: int) -> None:
        self.instance_id = instance_id
        self.index = index
        self.num_blocks = num_blocks
        self.usage = 0.0


class KCacheCollector:
    """Reads the workers' counters when the server is scraped."""

    def __init__(self) -> None:
        self.engines: dict[int, _Engine] = {}

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are made at scrape time, so that registering never reads a file."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One family per metric, one sample per engine."""
        values = {
            engine.index: counters.summed(counters.read_all(engine.instance_id, engine.index))
            for engine in self.engines.values()
        }
        yield self._host_pool(values)
        for name, text in _COUNTERS.items():
            family = CounterMetricFamily(PREFIX + name, text, labels=["engine"])
            for index, array in values.items():
                family.add_metric([str(index)], array[counters.SCALARS.index(name)])
            yield family
        for name, text in _HISTOGRAMS.items():
            family = HistogramMetricFamily(PREFIX + name, text, labels=["engine"])
            for index, array in values.items():
                total = array[counters.SCALARS.index(f"{name}_sum")]
                family.add_metric([str(index)], _cumulative(array, name), sum_value=total)
            yield family

    def _host_pool(self, values: dict[int, np.ndarray]) -> Metric:
        family = GaugeMetricFamily(
            PREFIX + "host_pool_blocks",
            "Blocks of the host V pool: total, and in use by requests or the prefix cache's users.",
            labels=["engine", "state"],
        )
        at = counters.SCALARS.index("host_pool_blocks")
        for index, array in values.items():
            total = array[at]
            # vLLM keeps one block for itself and reports usage of the others.
            used = round(self.engines[index].usage * max(total - 1, 0))
            family.add_metric([str(index), "total"], total)
            family.add_metric([str(index), "used"], used)
        return family


def _cumulative(array: np.ndarray, name: str) -> list[tuple[str, float]]:
    bounds, counts = counters.histograms(array)[name]
    labels = [*map(str, map(float, bounds)), "+Inf"]
    return list(zip(labels, np.cumsum(counts).tolist(), strict=True))


_collector: KCacheCollector | None = None


def _shared_collector() -> KCacheCollector:
    global _collector
    if _collector is None:
        _collector = KCacheCollector()
        REGISTRY.register(_collector)
    return _collector


class KCacheStatLogger(StatLoggerBase):
    """Entry point `vllm.stat_logger_plugins`: publishes the figures of one engine.

    Does nothing when the server runs without the plugin's backend.
    """

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._engine: _Engine | None = None
        if settings_of(vllm_config) is None:
            return
        self._engine = _Engine(vllm_config.instance_id, engine_index, 0)
        _shared_collector().engines[engine_index] = self._engine

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if self._engine is not None and scheduler_stats is not None:
            self._engine.usage = scheduler_stats.kv_cache_usage

    def log_engine_initialized(self) -> None:
        """Nothing to say: the worker logs its pool."""


def metrics(llm: Any) -> dict[str, Any]:
    """Figures of the split cache behind an offline `LLM`, since it started.

    Args:
        llm: A `vllm.LLM` made with `kv_backend="kcache"`.

    Returns:
        The counters by name, summed over ranks; `host_pool_blocks` (total) and
        `host_pool_blocks_used`; `selected_blocks` and `dropped_mass` as {"mean", "count", "buckets"},
        buckets being (upper bound, count) pairs.

    Raises:
        RuntimeError: The LLM runs without the kcache backend.
    """
    if settings_of(llm.llm_engine.vllm_config) is None:
        raise RuntimeError("metrics(llm): this LLM runs without kv_backend='kcache'.")
    arrays = [np.array(values) for values in llm.collective_rpc("kcache_counters")]
    total = counters.summed(arrays)
    result: dict[str, Any] = {
        name: float(total[counters.SCALARS.index(name)])
        for name in counters.SCALARS
        if not name.endswith("_sum")
    }
    for name, (bounds, counts) in counters.histograms(total).items():
        samples = int(counts.sum())
        mean = float(total[counters.SCALARS.index(f"{name}_sum")]) / max(samples, 1)
        edges = [*map(float, bounds), float("inf")]
        result[name] = {
            "mean": mean,
            "count": samples,
            "buckets": list(zip(edges, map(int, counts), strict=True)),
        }
    return result
