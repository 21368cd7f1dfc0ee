# SPDX-License-Identifier: Apache-2.0
"""A plan as text."""

from __future__ import annotations

from vllm_kcache.planner.memory import GIB
from vllm_kcache.planner.plan import SHORT_REQUEST, Plan, SplitPrediction

GB = 1e9


def table(plan: Plan) -> str:
    """The plan for people."""
    setup, splits = plan.setup, (plan.kcache_16, plan.kcache_4)
    engines, stock = (plan.stock, plan.stock_fp8, *splits), ["", ""]
    hardware, engine = setup.hardware, setup.engine
    ranks = f" x {engine.tensor_parallel_size}" if engine.tensor_parallel_size > 1 else ""
    gpu = f"{hardware.gpu_memory_bytes / GIB:.1f} GiB, {hardware.hbm_bytes_per_s / GB:.0f} GB/s"
    host = f"host memory for rows {setup.host_budget_bytes / GIB:.1f} GiB"
    work = f"{plan.kcache_16.selected_tokens:.0f} attended a head"
    rows = [
        ("", [one.engine for one in engines]),
        ("blocks", [f"{one.fit.num_blocks}" for one in engines]),
        (f"fit, of {engine.max_model_len} tokens", [f"{one.fits_longest:.1f}" for one in engines]),
        (f"fit, of {SHORT_REQUEST} tokens", [f"{one.fits_short:.1f}" for one in engines]),
        ("requests that fit", [f"{one.fits}" for one in engines]),
        ("requests of the step", [f"{one.requests}" for one in engines]),
        ("GPU memory read, GB/step", [f"{one.cost.hbm_bytes / GB:.1f}" for one in engines]),
        ("PCIe, GB/step", [f"{one.cost.pcie_bytes / GB:.2f}" for one in engines]),
        ("step, ms", [f"{one.step_ms:.1f}" for one in engines]),
        ("tokens/s", [f"{one.tokens_per_second:.0f}" for one in engines]),
        ("against stock", [*stock, *(f"{one.speed_up_over_stock:.2f}x" for one in splits)]),
        ("against stock fp8", [*stock, *(f"{one.speed_up_over_stock_fp8:.2f}x" for one in splits)]),
        (
            "one request, to stock",
            [*stock, *(f"{one.single_request_ratio:.2f}x" for one in splits)],
        ),
        ("GPU memory taken, GiB", [f"{one.fit.gpu_bytes / GIB:.1f}" for one in engines]),
        ("hot cache, GiB", [*stock, *(f"{one.fit.hot_cache_bytes / GIB:.1f}" for one in splits)]),
        ("hit rate", [*stock, *(f"{one.hit_rate:.2f}" for one in splits)]),
        ("rows on the host, GiB", [*stock, *(f"{one.fit.host_bytes / GIB:.1f}" for one in splits)]),
    ]
    return "\n".join(
        [
            f"{setup.shape.name} on {hardware.name}{ranks}: {gpu}",
            f"link {hardware.pcie_bytes_per_s / GB:.1f} GB/s; {host}",
            f"context {plan.load.context} tokens, {work}",
            "",
            *(f"{name:26s}" + "".join(f"{cell:>12s}" for cell in cells) for name, cells in rows),
            *(line for split in splits for line in _split_lines(split)),
            "",
            *(f"note: {note}" for note in plan.notes),
        ]
    )


def _split_lines(split: SplitPrediction) -> list[str]:
    cost, even = split.cost, split.break_even_context
    parts = {
        "weights": cost.weights,
        "score": cost.cache,
        "exposed fetch": cost.fetch,
        "attend": cost.attend,
        "launches and the rest": cost.launches + cost.fixed,
    }
    step = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in parts.items())
    return [
        "",
        f"{split.engine} step: {step} ms; {cost.fetch_hidden * 1e3:.1f} ms of fetch beside scoring",
        "pays (more tokens/s than stock): "
        + (f"from {even} tokens of context" if even else "at no context up to the longest"),
        f"limited by: {split.limited_by}",
        *split.remedies,
    ]
