# SPDX-License-Identifier: Apache-2.0
"""The worker of the CPU: the reference inside the real engine."""

from __future__ import annotations

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kcache.config import KCacheConfig
from vllm_kcache.integration import counters, runtime
from vllm_kcache.integration.cpu_runtime import CPURuntime
from vllm_kcache.integration.worker import SplitCacheWorker


class KCacheCPUWorker(SplitCacheWorker, CPUWorker):
    """vLLM's CPU worker with the split cache: the reference, for tests and trials."""

    def _make_runtime(
        self, config: KCacheConfig, shape: runtime.PageShape, figures: counters.Counters
    ) -> runtime.Runtime:
        return CPURuntime(config, shape, figures, torch.device("cpu"))

    def _device_pages(self, available: int, page_bytes: int, v_bytes: int) -> int:
        # Without an explicit size vLLM offers the whole machine to K; V lives in the same RAM.
        if self.vllm_config.cache_config.kv_cache_memory_bytes is None:
            return available // (page_bytes + v_bytes)
        return available // page_bytes

    def _host_bytes_per_page(self, page_bytes: int, v_bytes: int) -> int:
        # "auto" is a share of all that is left, and K pages will be in the same memory.
        return page_bytes + v_bytes if self.kcache_config.host_memory_gib == "auto" else v_bytes
