# SPDX-License-Identifier: Apache-2.0
"""A plan as text."""

from __future__ import annotations

from vllm_kcache.planner.memory import GIB
from vllm_kcache.planner.plan import Plan

GB = 1e9


def table(plan: Plan) -> str:
    """The plan for people."""
    setup, engines = plan.setup, (plan.stock, plan.stock_fp8, plan.kcache)
    hardware, engine, cost = setup.hardware, setup.engine, plan.kcache.cost
    ranks = f" x {engine.tensor_parallel_size}" if engine.tensor_parallel_size > 1 else ""
    gpu = f"{hardware.gpu_memory_bytes / GIB:.1f} GiB, {hardware.hbm_bytes_per_s / GB:.0f} GB/s"
    host = f"host memory for V {setup.host_budget_bytes / GIB:.1f} GiB"
    work = f"{plan.selected_tokens:.0f} attended a head, hit rate {plan.hit_rate:.2f}"
    even = plan.break_even_context
    rows = [
        ("", [one.engine for one in engines]),
        ("blocks", [f"{one.fit.num_blocks}" for one in engines]),
        ("requests that fit", [f"{one.fits}" for one in engines]),
        ("requests of the step", [f"{one.requests}" for one in engines]),
        ("GPU memory read, GB/step", [f"{one.cost.hbm_bytes / GB:.1f}" for one in engines]),
        ("PCIe, GB/step", [f"{one.cost.pcie_bytes / GB:.2f}" for one in engines]),
        ("step, ms", [f"{one.step_ms:.1f}" for one in engines]),
        ("tokens/s", [f"{one.tokens_per_second:.0f}" for one in engines]),
        ("kcache against it", [f"{plan.speed_up(one):.2f}x" for one in engines[:2]]),
    ]
    parts = {
        "weights": cost.weights,
        "score": cost.cache,
        "exposed fetch": cost.fetch,
        "attend": cost.attend,
        "launches and the rest": cost.launches + cost.fixed,
    }
    return "\n".join(
        [
            f"{setup.shape.name} on {hardware.name}{ranks}: {gpu}",
            f"link {hardware.pcie_bytes_per_s / GB:.1f} GB/s; {host}",
            f"context {plan.load.context} tokens, {work}",
            "",
            *(f"{name:26s}" + "".join(f"{cell:>12s}" for cell in cells) for name, cells in rows),
            "",
            "kcache step: "
            + ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in parts.items())
            + f" ms; {cost.fetch_hidden * 1e3:.1f} ms of fetch beside scoring",
            f"host memory: {plan.kcache.fit.host_bytes / GIB:.1f} GiB of V",
            f"one request alone: {plan.single_request_ratio:.2f}x stock",
            "pays (more tokens/s than stock): "
            + (f"from {even} tokens of context" if even else "at no context up to the longest"),
            f"limited by: {plan.limited_by}",
            *(f"note: {note}" for note in plan.notes),
        ]
    )
