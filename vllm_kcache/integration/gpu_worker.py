# SPDX-License-Identifier: Apache-2.0
"""The worker of a GPU: it plans the GPU's memory and frames each step."""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention.attention import Attention
from vllm.v1.worker.gpu_worker import Worker

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.config import KCacheConfigError
from vllm_kcache.integration import pools, prefill
from vllm_kcache.integration.backend import KCacheImpl
from vllm_kcache.integration.worker import GIB, SplitCacheWorker
from vllm_kcache.kernels import extension, self_check
from vllm_kcache.kernels.select import MOST_BLOCKS
from vllm_kcache.memory import StepLimits
from vllm_kcache.split_cache_gpu import GPUSplitCache

logger = init_logger(__name__)

# Steps from one look at the figures to the next, for what is worth a warning.
LOOK_EVERY = 256


class KCacheGPUWorker(SplitCacheWorker, Worker):
    """vLLM's GPU worker with the split cache."""

    split_cache: GPUSplitCache
    _published = 0

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        extension.load()
        super().load_model(*args, **kwargs)
        # The GPU writes its counts where the API server reads them, so that they are there when a
        # step's tokens are, and no step has to come to fetch those of the step before.
        self._counter_words = self.counters.gpu_words(self.split_cache.shape.row.bytes)
        self.counters.lock(self, self._counter_words)
        if self_check.is_wanted():
            self._check_kernels()

    def _check_kernels(self) -> None:
        """Do not start where this GPU's kernels differ from the reference."""
        cache = self.split_cache
        begin = time.monotonic()
        sinks, caps = self._sinks_and_caps()
        self_check.check_kernels(
            cache.shape, cache.selection, cache.config.resolved_tail, self.device,
            cache.memory.limits.decode_tokens, has_sinks=sinks, soft_cap=max(caps, default=None),
        )  # fmt: skip
        # What it took is not what the model needs: vLLM measures next.
        torch.cuda.empty_cache()
        logger.info(
            "KCache: kernels checked against the reference in %.1f s.", time.monotonic() - begin
        )

    def _sinks_and_caps(self) -> tuple[bool, set[float]]:
        """Whether split layers have learned sinks, and the bounds of their scores."""
        layers = get_layers_from_vllm_config(self.vllm_config, Attention).values()
        impls = [layer.impl for layer in layers if isinstance(layer.impl, KCacheImpl)]
        sinks = any(impl.sinks is not None for impl in impls)
        return sinks, {impl.soft_cap for impl in impls if impl.soft_cap is not None}

    def _make_cache(self, shape: CacheShape) -> GPUSplitCache:
        scheduler, model = self.vllm_config.scheduler_config, self.vllm_config.model_config
        limits = StepLimits(
            scheduler.max_num_seqs, scheduler.max_num_batched_tokens, model.max_model_len,
            1 + self.vllm_config.num_speculative_tokens,
        )  # fmt: skip
        blocks = shape.max_blocks(limits.max_model_len)
        if blocks > MOST_BLOCKS:
            raise KCacheConfigError(
                f"max_model_len={limits.max_model_len}: {blocks} V blocks of {shape.block_tokens} "
                f"tokens, and a request may have {MOST_BLOCKS}. Lower --max-model-len to "
                f"{MOST_BLOCKS * shape.block_tokens} or raise kcache_config.v_block_tokens."
            )
        capped = bool(self._sinks_and_caps()[1])
        kernels = prefill.choose(self.kcache_config.prefill, shape.head_size, shape.dtype, capped)
        logger.info("KCache: prompts attend through %s.", kernels.name)
        return GPUSplitCache(self.kcache_config, shape, self.counters, self.device, limits, kernels)

    def _device_pages(
        self, available: int, page_bytes: int, host_pages: int, bytes_beside_page: int = 0
    ) -> int:
        # The hot cache and the tables come out of the same budget as K pages. Buffers of a fixed
        # size were there when vLLM measured what is left.
        memory, setting = self.split_cache.memory, self.kcache_config.hot_cache_gib
        pages, slots = memory.plan(available, page_bytes, host_pages, setting, bytes_beside_page)
        if pages < 1:
            # A size that is given is taken as it is, whatever a step needs.
            remedy = (
                "Lower --max-num-batched-tokens, --max-num-seqs or kcache_config.hot_cache_gib, or "
                "raise --gpu-memory-utilization."
                if self.vllm_config.cache_config.kv_cache_memory_bytes is None
                else "Lower kcache_config.hot_cache_gib, or raise --kv-cache-memory-bytes."
            )
            raise KCacheConfigError(
                f"kcache: {available / GIB:.2f} GiB of GPU memory are left for pages and the hot "
                f"cache ({slots} rows of {self.split_cache.shape.row.bytes} bytes). {remedy}"
            )
        self.split_cache.hot_slots = slots
        return pages

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        cache = self.split_cache
        if cache.hot_slots is None:
            # With --num-gpu-blocks-override the plan above may not have run: the least share.
            page_bytes, _ = self._page_bytes()
            blocks = pools.own_pool_pages(kv_cache_config) or kv_cache_config.num_blocks
            cache.hot_slots = cache.memory.least_slots(
                page_bytes, blocks, self.kcache_config.hot_cache_gib
            )
        cache.is_final = True
        super().initialize_from_config(kv_cache_config)

    def compile_or_warm_up_model(self) -> Any:
        with pools.ids_of_both(self.model_runner.kv_cache_config):
            times = super().compile_or_warm_up_model()
        # Warm-up wrote to the null block and counted steps that no user asked for.
        cache = self.split_cache
        if cache.hot_cache is not None:
            cache.hot_cache.counters.zero_()
        cache.eager_decode_steps = 0
        self._publish_counters()
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        self.split_cache.before_step(self._begins_with_a_decode(scheduler_output))
        result = super().execute_model(scheduler_output)
        self._publish_counters()
        return result

    def _begins_with_a_decode(self, scheduler_output: Any) -> bool:
        """Whether a request may decode in the step that gives it pages of the prefix cache."""
        # To vLLM's second runner those that go on are new requests, whose last token of old ones
        # prefills; to the first it decodes.
        if scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            return True
        # Beside states the second has every last token of a prompt decode.
        few = 1 + self.vllm_config.num_speculative_tokens
        tokens = scheduler_output.num_scheduled_tokens
        return self.vllm_config.model_config.is_hybrid and any(
            new.num_computed_tokens > 0 and tokens[new.req_id] <= few
            for new in scheduler_output.scheduled_new_reqs
        )

    def execute_dummy_batch(self) -> None:
        # It overwrites the slots that V of the step before may still be leaving to.
        self.split_cache.before_step()
        super().execute_dummy_batch()

    def _publish_counters(self) -> None:
        """Have the GPU write the kernels' counters to the shared file, behind what is queued."""
        cache = self.split_cache
        if cache.hot_cache is not None:
            self._counter_words.copy_(cache.hot_cache.counters, non_blocking=True)
        self._published += 1
        if self._published % LOOK_EVERY == 0:
            # By what the steps before have left there.
            self.counters.warn_of_estimates()
        self.counters["eager_decode_steps"] = cache.eager_decode_steps

    def kcache_counters(self) -> list[float]:
        self._publish_counters()
        torch.cuda.current_stream().synchronize()
        return super().kcache_counters()
