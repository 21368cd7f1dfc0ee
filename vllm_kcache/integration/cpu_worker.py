# SPDX-License-Identifier: Apache-2.0
"""The worker of the CPU: the reference inside the real engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.integration.worker import SplitCacheWorker
from vllm_kcache.split_cache import CPUSplitCache, SplitCache


class KCacheCPUWorker(SplitCacheWorker, CPUWorker):
    """vLLM's CPU worker with the split cache: the reference, for tests and trials."""

    def _make_cache(self, shape: CacheShape) -> SplitCache:
        return CPUSplitCache(self.kcache_config, shape, self.counters, torch.device("cpu"))

    def _device_pages(
        self, available: int, page_bytes: int, host_pages: int, bytes_beside_page: int = 0
    ) -> int:
        # Without an explicit size vLLM offers the whole machine to K; rows live in the same RAM.
        each = page_bytes + bytes_beside_page
        if self.vllm_config.cache_config.kv_cache_memory_bytes is None:
            each += self.split_cache.shape.host_page_bytes
        return min(available // each, host_pages)

    def _host_bytes_per_page(self, page_bytes: int, row_bytes: int) -> int:
        # "auto" is a share of all that is left, and pages will be in the same memory.
        return page_bytes + row_bytes if self.kcache_config.host_memory_gib == "auto" else row_bytes

    def sample_tokens(self, grammar_output: Any) -> Any:
        """As vLLM's, whose first runner would fail at a seeded request whose prompt goes on after
        this step.

        It samples for such a request all the same, and turns its generator back: that of a CPU
        cannot be. Beside states with prefix caching, most prompts take two steps.
        """
        if self.use_v2_model_runner:
            return super().sample_tokens(grammar_output)
        runner = self.model_runner
        batch = runner.input_batch
        unfinished = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs])
        aside = {i: batch.generators.pop(i) for i in unfinished if i in batch.generators}
        try:
            return super().sample_tokens(grammar_output)
        finally:
            batch.generators.update(aside)
