# SPDX-License-Identifier: Apache-2.0
"""GPU and host memory of an engine against the plan, measured in the process of that engine.

prefill.py prints the comparison. The plan:

- GPU: what `vllm-kcache plan` says the engine takes: `gpu_memory_utilization` times the GPU's
  memory, and less of it where so few requests are let in that the split cache has no use for the
  rest. Compared is the most that was in use, caching allocator and context included. The engine
  must be alone on its GPU.
- Blocks: those that `vllm-kcache plan` predicts from the shape alone, against those that were made.
- Host: the pool of V. Compared is the growth of the process's peak resident memory since before
  the engine was made, less what the same engine without the split cache grew by, if that was
  measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vllm_kcache.cache.host_memory import AUTO_SHARE, host_memory
from vllm_kcache.config import KCacheConfig
from vllm_kcache.planner.memory import Engine, fit_split, fit_stock
from vllm_kcache.planner.shape import read_shape

GIB = 2**30
WITHIN = 0.03
MOST_HOST_OVER_POOL = 1.05


def host_bytes() -> dict[str, int]:
    """Resident memory of this process now and at its peak, and what of it is locked."""
    names = {"VmRSS": "resident", "VmHWM": "peak", "VmLck": "locked", "VmPin": "pinned"}
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in names:
            found[names[name]] = int(rest.split()[0]) * 1024
    return found


def host_budget() -> int:
    """Host bytes that the split cache may take for V when nothing is set."""
    return int(host_memory().available_bytes * AUTO_SHARE)


def gpu_bytes() -> dict[str, int] | None:
    """Memory of the GPU, in all and at the peak of its use; None without one."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    # What the caching allocator has given back since its peak was in use then.
    given_back = torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved()
    return {
        "total": total,
        "peak": total - free + given_back,
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved(),
    }


def measure_memory(
    llm: Any,
    model: str,
    config: KCacheConfig | None,
    before: dict[str, int],
    budget_bytes: int,
) -> dict[str, Any]:
    """What an engine in this process takes, beside its plan.

    Args:
        llm: A `vllm.LLM` in this process that has done its work.
        model: Folder of its config.json.
        config: Settings of the split cache; None for stock vLLM.
        before: `host_bytes` from before the engine was made, vLLM being imported.
        budget_bytes: `host_budget` from then.
    """
    vllm_config = llm.llm_engine.vllm_config
    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    result: dict[str, Any] = {
        "host": {"before": before, "after": host_bytes()},
        "gpu": gpu_bytes(),
        "num_blocks": cache.num_gpu_blocks,
    }
    if config is not None:
        import vllm_kcache

        result["host_pool_bytes"] = int(vllm_kcache.metrics(llm)["host_pool_bytes"])
    if result["gpu"] is None:
        return result
    total = result["gpu"]["total"]
    engine = Engine(
        max_model_len=vllm_config.model_config.max_model_len,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        block_size=cache.block_size,
        gpu_memory_utilization=cache.gpu_memory_utilization,
    )
    shape = read_shape(model, "bfloat16")
    if config is None:
        fit = fit_stock(shape, engine, total)
    else:
        fit = fit_split(shape, engine, total, budget_bytes, config)
    result["plan"] = {
        "gpu_bytes": fit.gpu_bytes,
        "num_blocks": fit.num_blocks,
        "host_bytes": fit.host_bytes,
    }
    return result


def against_plan(
    memory: dict[str, Any], stock: dict[str, Any] | None = None
) -> dict[str, tuple[float, bool]]:
    """Measured over planned, by what was measured, and whether it is within bounds.

    Args:
        memory: From `measure_memory`.
        stock: The same of stock vLLM with the same arguments, where there is one.
    """
    result = {}
    if memory["gpu"] is not None:
        plan = memory["plan"]
        peak = memory["gpu"]["peak"] / plan["gpu_bytes"]
        blocks = memory["num_blocks"] / plan["num_blocks"]
        result["GPU memory"] = (peak, abs(peak - 1) <= WITHIN)
        result["blocks"] = (blocks, abs(blocks - 1) <= WITHIN)
    pool = memory.get("host_pool_bytes")
    if pool:
        grown = _growth(memory) - (_growth(stock) if stock else 0)
        result["host memory"] = (grown / pool, grown / pool <= MOST_HOST_OVER_POOL)
    return result


def _growth(memory: dict[str, Any]) -> int:
    host = memory["host"]
    return host["after"]["peak"] - host["before"]["peak"]


def lines_against_plan(
    name: str, memory: dict[str, Any], stock: dict[str, Any] | None = None
) -> list[str]:
    """One line for each comparison; what is out of bounds says so."""
    lines = []
    for what, (ratio, within) in against_plan(memory, stock).items():
        most = MOST_HOST_OVER_POOL if what == "host memory" else None
        bound = f"at most {most} of the pool" if most else f"within {WITHIN:.0%} of the plan"
        verdict = "" if within else "  OUT OF BOUNDS"
        lines.append(f"{name:8s} {what:12s} {ratio:6.3f} of the plan ({bound}){verdict}")
    return lines
