# SPDX-License-Identifier: Apache-2.0
"""An engine on a CPU whose layers are split as on a GPU: its worker, its cache, its kernels.

The extension's kernels run in the emulator, those of Triton in Triton's interpreter, streams one
after the other. All else is vLLM's.
"""

from __future__ import annotations

import os
from typing import Any

import torch

LIBRARY = "KCACHE_TEST_LIBRARY"


def use_kernels() -> None:
    """Of engines that this process starts from now on."""
    os.environ["TRITON_INTERPRET"] = "1"
    from vllm.v1.worker.cpu_worker import CPUWorker

    from tests.kernels.split_cache import without_cuda
    from vllm_kcache.integration import counters, cpu_worker
    from vllm_kcache.integration.gpu_worker import KCacheGPUWorker
    from vllm_kcache.kernels import extension, self_check

    class Worker(KCacheGPUWorker, CPUWorker):
        """The worker of a GPU, over vLLM's of a CPU."""

        def initialize_from_config(self, kv_cache_config: Any) -> None:
            super().initialize_from_config(kv_cache_config)
            # What was not written is not a number.
            self.split_cache.hot_cache.slots.fill_(255)

    torch.ops.load_library(os.environ[LIBRARY])
    extension.load = lambda: None  # type: ignore[assignment]
    os.environ[self_check.SWITCH] = "0"
    cpu_worker.KCacheCPUWorker = Worker  # type: ignore[misc]
    without_cuda()
    counters.page_lock = lambda owner, words: None  # type: ignore[assignment]


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """As generate.py's."""
    from tests.integration import generate

    use_kernels()
    return generate.run(spec)


def run_beside_states(spec: dict[str, Any]) -> dict[str, Any]:
    """The same with layers that forget rejected drafts (state_kernels.py)."""
    from tests.integration import state_kernels

    state_kernels.forget_drafts()
    return run(spec)
