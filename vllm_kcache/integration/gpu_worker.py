# SPDX-License-Identifier: Apache-2.0
"""The worker of a GPU: it plans the GPU's memory and frames each step."""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.worker.gpu_worker import Worker

from vllm_kcache.config import KCacheConfig, KCacheConfigError
from vllm_kcache.integration import counters, runtime
from vllm_kcache.integration.gpu_runtime import GPULimits, GPURuntime
from vllm_kcache.integration.worker import GIB, SplitCacheWorker
from vllm_kcache.kernels import extension, self_check
from vllm_kcache.kernels.select import most_blocks

logger = init_logger(__name__)


class KCacheGPUWorker(SplitCacheWorker, Worker):
    """vLLM's GPU worker with the split cache."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self._check_length()
        if self_check.is_wanted():
            self._check_kernels()

    def _check_length(self) -> None:
        """Refuse requests of more V blocks than the selection of this GPU can hold."""
        active = self._gpu_runtime()
        if not extension.available():
            return
        gpu = torch.cuda.get_device_properties(self.device)
        group = active.num_query_heads // active.shape.num_kv_heads
        shared = gpu.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in the stubs
        most = most_blocks(active.selection, group, shared)
        if active.max_blocks > most:
            raise KCacheConfigError(
                f"max_model_len={active.limits.max_model_len}: {active.max_blocks} V blocks of "
                f"{active.v_block_tokens} tokens, and the selection of a {gpu.name} holds {most}. "
                f"Lower --max-model-len to {most * active.v_block_tokens}, raise "
                f"kcache_config.v_block_tokens, or set {extension.SWITCH}=0."
            )

    def _check_kernels(self) -> None:
        """Do not start where this GPU's kernels differ from the reference."""
        active = self._gpu_runtime()
        begin = time.monotonic()
        self_check.check_kernels(active.layer_shape(), self.device)
        # What it took is not what the model needs: vLLM measures next.
        torch.cuda.empty_cache()
        logger.info(
            "KCache: kernels checked against the reference in %.1f s.", time.monotonic() - begin
        )

    def _make_runtime(
        self, config: KCacheConfig, shape: runtime.PageShape, figures: counters.Counters
    ) -> runtime.Runtime:
        scheduler, model = self.vllm_config.scheduler_config, self.vllm_config.model_config
        limits = GPULimits(
            scheduler.max_num_seqs, scheduler.max_num_batched_tokens, model.max_model_len
        )
        heads = model.get_num_attention_heads(self.vllm_config.parallel_config)
        return GPURuntime(config, shape, figures, self.device, heads, limits)

    def _device_pages(self, available: int, page_bytes: int, v_bytes: int) -> int:
        # The hot V cache and the tables come out of the same budget as K pages. Buffers of a fixed
        # size were there when vLLM measured what is left.
        active = self._gpu_runtime()
        left = available - active.plan_hot_cache(max(available, 0))
        pages = left // (page_bytes + active.bytes_per_page())
        if pages < 1:
            raise KCacheConfigError(
                f"kcache: {available / GIB:.2f} GiB of GPU memory are left for K pages and the hot "
                f"V cache ({(available - left) / GIB:.2f} GiB). Lower "
                "--max-num-batched-tokens, --max-num-seqs or kcache_config.hot_cache_gib, or raise "
                "--gpu-memory-utilization."
            )
        return pages

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        active = self._gpu_runtime()
        if not active.hot_slots:
            # With --num-gpu-blocks-override the plan above may not have run.
            specs = self.get_kv_cache_spec()
            page_bytes = sum(spec.page_size_bytes for spec in specs.values())
            active.plan_hot_cache(kv_cache_config.num_blocks * page_bytes)
        active.is_final = True
        super().initialize_from_config(kv_cache_config)

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        # Warm-up wrote to the null block and counted steps that no user asked for.
        active = self._gpu_runtime()
        active.reset_counters()
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        active = self._gpu_runtime()
        active.before_step()
        result = super().execute_model(scheduler_output)
        active.publish_counters()
        return result

    def execute_dummy_batch(self) -> None:
        # It overwrites the slots that V of the step before may still be leaving to.
        self._gpu_runtime().before_step()
        super().execute_dummy_batch()

    def kcache_counters(self) -> list[float]:
        self._gpu_runtime().publish_counters()
        torch.cuda.current_stream().synchronize()
        return super().kcache_counters()

    def _gpu_runtime(self) -> GPURuntime:
        active = runtime.current()
        assert isinstance(active, GPURuntime)
        return active
