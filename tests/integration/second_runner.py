# SPDX-License-Identifier: Apache-2.0
"""vLLM's second runner, which is a GPU's, on a CPU: imported before vLLM, in a process of its own.

Its Triton kernels run in Triton's interpreter. vLLM takes Triton on a CPU where that has a back end
for it, so it is shown one.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any


def _interpret_kernels() -> None:
    """Those of vLLM."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends
    from triton.runtime.interpreter import InterpreterBuilder

    from tests.kernels.interpreter import patch_once_a_launch

    patch_once_a_launch()
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def as_bool(mask: Any) -> Any:
        # `a & b` of a scalar and a block is no mask to the interpreter.
        mask.data = mask.data.astype(bool)
        return mask

    InterpreterBuilder.create_masked_load = lambda self, pointers, mask, *others: load(
        self, pointers, as_bool(mask), *others
    )
    InterpreterBuilder.create_masked_store = lambda self, pointers, value, mask, *others: store(
        self, pointers, value, as_bool(mask), *others
    )


def _schedule_ahead() -> None:
    """Asynchronous scheduling, for which vLLM has no use on a CPU."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def check_and_keep(vllm_config: Any) -> None:
        ahead = vllm_config.scheduler_config.async_scheduling
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = ahead

    CpuPlatform.check_and_update_config = staticmethod(check_and_keep)


os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
_interpret_kernels()
_schedule_ahead()
