# SPDX-License-Identifier: Apache-2.0
"""Metrics of the split cache: at /metrics of a server, and through `metrics(llm)` offline."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from prometheus_client import REGISTRY
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_kcache.integration import counters, features
from vllm_kcache.integration.patches import PatchRecord, wrap
from vllm_kcache.integration.settings import settings_of

PREFIX = "vllm_kcache_"
_COUNTERS = {
    "fetched_bytes": "Bytes of V, with k_bits 4 of K and V, that decode steps read from the host.",
    "decode_layer_steps": "Layers of decode steps through the selection (CPU; graphs count none).",
    "eager_decode_steps": "Decode steps on a GPU that ran outside the CUDA graphs.",
    "hot_cache_hits": "Selected V blocks found in the hot cache.",
    "hot_cache_misses": "Selected V blocks fetched into the hot cache.",
    "direct_host_reads": "Selected V blocks read from host memory by attention itself.",
}

_SEVERAL_RECORD = PatchRecord(
    target="prometheus_client.multiprocess.MultiProcessCollector.collect",
    why="Of several API server processes, /metrics shows only what metrics of files left there.",
    how="The figures of this package, which come from files of its workers, are appended.",
    upstream="vLLM gives plugins no way to add a collector (0.32.0).",
    until="vLLM lets plugins add one.",
)


class _Engine:
    """What the server knows of one engine.

    Args:
        one_pool: Whether all layers share one pool of blocks, so that its usage is that of the host
            pool.
    """

    def __init__(self, instance: str, index: int, ranks: int, one_pool: bool = True) -> None:
        self.instance = instance
        self.index = index
        self.ranks = ranks
        self.one_pool = one_pool
        self.usage = 0.0

    def figures(self) -> np.ndarray:
        return counters.summed(counters.read_all(self.instance, self.index, self.ranks))


class KCacheCollector:
    """Reads the workers' counters when the server is scraped.

    Args:
        knows_usage: Whether this process hears from the engines how full they are at every step:
            not where several API server processes take turns.
    """

    def __init__(self, knows_usage: bool = True) -> None:
        self.engines: dict[int, _Engine] = {}
        self.knows_usage = knows_usage

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are made at scrape time, so that registering never reads a file."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One family per metric, one sample per engine."""
        values = {engine.index: engine.figures() for engine in self.engines.values()}
        yield self._host_pool(values)
        for name, text in _COUNTERS.items():
            family = CounterMetricFamily(PREFIX + name, text, labels=["engine"])
            for index, array in values.items():
                family.add_metric([str(index)], _scalar(array, name))
            yield family
        selected = SummaryMetricFamily(
            PREFIX + "selected_blocks",
            "V blocks selected, per request, KV head, layer and decode step.",
            labels=["engine"],
        )
        dropped = HistogramMetricFamily(
            PREFIX + "dropped_mass",
            "Softmax mass not selected, per request, KV head, layer and decode step.",
            labels=["engine"],
        )
        estimates = HistogramMetricFamily(
            PREFIX + "estimate_error",
            "|estimate - refined| of the log-sum-exp of a selected V block, per query head, with "
            "k_bits 4; on a GPU of a sample.",
            labels=["engine"],
        )
        for index, array in values.items():
            selected.add_metric(
                [str(index)],
                count_value=int(_scalar(array, "selected_lists")),
                sum_value=_scalar(array, "selected_blocks"),
            )
            # Only the buckets are kept, so there is no sum to publish.
            labels = [str(index)]
            counted = counters.dropped_mass(array)
            # The last bound is 1, the largest mass there is.
            bounds = (*counters.DROPPED_BOUNDS[:-1], np.inf)
            dropped.add_metric(labels, _cumulative(bounds, counted), sum_value=None)
            counted = counters.estimate_errors(array)
            bounds = counters.ESTIMATE_BOUNDS
            estimates.add_metric(labels, _cumulative(bounds, counted), sum_value=None)
        yield selected
        yield dropped
        yield estimates

    def _host_pool(self, values: dict[int, np.ndarray]) -> Metric:
        family = GaugeMetricFamily(
            PREFIX + "host_pool_blocks",
            "Blocks of the host pool: total, and in use by requests or the prefix cache's users.",
            labels=["engine", "state"],
        )
        for index, array in values.items():
            total = _scalar(array, "host_pool_blocks")
            family.add_metric([str(index), "total"], total)
            if not self.knows_usage or not self.engines[index].one_pool:
                continue
            # vLLM keeps one block for itself and reports usage of the others.
            used = round(self.engines[index].usage * max(total - 1, 0))
            family.add_metric([str(index), "used"], used)
        return family


def _scalar(array: np.ndarray, name: str) -> float:
    return float(array[counters.SCALARS.index(name)])


def _cumulative(bounds: tuple[float, ...], counted: np.ndarray) -> list[tuple[str, float]]:
    labels = ["+Inf" if bound == np.inf else f"{bound:.6g}" for bound in bounds]
    return list(zip(labels, np.cumsum(counted).tolist(), strict=True))


_collector: KCacheCollector | None = None


def _shared_collector(num_processes: int) -> KCacheCollector:
    global _collector
    if _collector is None:
        _collector = KCacheCollector(knows_usage=num_processes == 1)
        # Set by vLLM for several processes, or by a user, and then for one as well.
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            wrap(MultiProcessCollector, "collect", _followed_by(_collector), _SEVERAL_RECORD)
        else:
            REGISTRY.register(_collector)
    return _collector


def _followed_by(collector: KCacheCollector) -> Callable[[Callable], Callable]:
    def make(original: Callable) -> Callable:
        def collect(self: MultiProcessCollector) -> Iterator[Metric]:
            yield from original(self)
            yield from collector.collect()

        return collect

    return make


class KCacheStatLogger(StatLoggerBase):
    """Entry point `vllm.stat_logger_plugins`: publishes the figures of one engine.

    Does nothing when the server runs without the plugin's backend.
    """

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._engine: _Engine | None = None
        if settings_of(vllm_config) is None:
            return
        parallel = vllm_config.parallel_config
        one_pool = not features.has_second_pool(vllm_config)
        self._engine = _Engine(vllm_config.instance_id, engine_index, parallel.world_size, one_pool)
        _shared_collector(parallel._api_process_count).engines[engine_index] = self._engine

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
        The counters by name, summed over ranks; `dropped_mass`, pairs of (upper bound, lists);
        `estimate_error`, pairs of (upper bound, blocks and query heads);
        and `mean_selected_blocks`, per request, KV head, layer and decode step.

    Raises:
        RuntimeError: The LLM runs without the kcache backend.
    """
    if settings_of(llm.llm_engine.vllm_config) is None:
        raise RuntimeError("metrics(llm): this LLM runs without kv_backend='kcache'.")
    arrays = [np.array(values) for values in llm.collective_rpc("kcache_counters")]
    total = counters.summed(arrays)
    result: dict[str, Any] = {name: _scalar(total, name) for name in counters.SCALARS}
    result["mean_selected_blocks"] = result["selected_blocks"] / max(result["selected_lists"], 1)
    for name, bounds, counted in (
        ("dropped_mass", counters.DROPPED_BOUNDS, counters.dropped_mass(total)),
        ("estimate_error", counters.ESTIMATE_BOUNDS, counters.estimate_errors(total)),
    ):
        result[name] = list(zip(bounds, map(int, counted), strict=True))
    return result
