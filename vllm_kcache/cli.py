# SPDX-License-Identifier: Apache-2.0
"""`vllm-kcache plan` and `vllm-kcache check`.

`plan` predicts, and needs neither vLLM nor a GPU. `check` makes vLLM's own configuration of the
model on this machine and lists what a start would refuse, without loading weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from typing import Any

from vllm_kcache.cache.host_memory import AUTO_SHARE, host_memory
from vllm_kcache.config import KCacheConfig, KCacheConfigError
from vllm_kcache.plan import Load, Plan, Prediction, Setup, make_plan
from vllm_kcache.plan_cost import HARDWARE, Hardware
from vllm_kcache.plan_memory import GIB, Engine
from vllm_kcache.plan_shape import DTYPE_BYTES, PlanError, read_shape

GB = 1e9


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `vllm-kcache` command.

    Returns:
        0; of `check`, 1 when something would be refused. Bad arguments end with 2.
    """
    parser = argparse.ArgumentParser(
        prog="vllm-kcache", description="Plan and check the split K/V cache of vLLM."
    )
    commands = parser.add_subparsers(required=True, metavar="{plan,check}")
    _add_plan(commands)
    _add_check(commands)
    # `check` hands on every flag that it does not know: they are vLLM's.
    parsed, others = parser.parse_known_args(arguments)
    if others and parsed.run is not _check:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    try:
        return parsed.run(parsed, others)
    except (PlanError, KCacheConfigError) as error:
        print(f"vllm-kcache: error: {error}", file=sys.stderr)
        return 2


# plan


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="predict what fits and how fast it decodes, against stock vLLM",
        description="Predict what fits and how fast it decodes, against stock vLLM.",
    )
    plan.set_defaults(run=_plan)
    plan.add_argument("model", help="folder with a config.json, or a model in the local cache")
    load = plan.add_argument_group("load")
    load.add_argument("--context", type=int, help="tokens of a request (default: the model's most)")
    load.add_argument("--requests", type=int, help="requests at once (default: all that fit)")
    load.add_argument(
        "--selected-tokens", type=float, help="tokens a head that are attended (default: estimated)"
    )
    load.add_argument(
        "--hit-rate", type=float, help="hit rate of the hot V cache, 0 to 1 (default: estimated)"
    )
    machine = plan.add_argument_group("machine")
    machine.add_argument("--gpu", choices=HARDWARE, default="h100")
    machine.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of one GPU")
    machine.add_argument(
        "--hbm-bandwidth", type=float, metavar="GB/S", help="of kernels that read GPU memory"
    )
    machine.add_argument(
        "--pcie-bandwidth", type=float, metavar="GB/S", help="of copies from pinned host memory"
    )
    machine.add_argument(
        "--host-memory",
        type=float,
        metavar="GIB",
        help="host memory for V of all ranks (default: kcache_config.host_memory_gib, or "
        f"{AUTO_SHARE:.0%}% of what this machine has available)",
    )
    engine = plan.add_argument_group("engine, as in vLLM")
    engine.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    engine.add_argument("--tensor-parallel-size", type=int, default=1)
    engine.add_argument("--max-model-len", type=int, help="default: the model's most")
    engine.add_argument("--max-num-seqs", type=int, default=256)
    engine.add_argument("--max-num-batched-tokens", type=int, default=8192)
    engine.add_argument("--block-size", type=int, default=16)
    engine.add_argument("--dtype", choices=DTYPE_BYTES, default="auto")
    engine.add_argument("--weight-bits", type=int, help="bits of a quantised weight")
    settings = plan.add_argument_group("split cache")
    settings.add_argument("--kcache-config", help="settings as JSON")
    settings.add_argument("--top-n", help='V blocks per KV head, or "all"')
    settings.add_argument("--coverage", type=float)
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _plan(parsed: argparse.Namespace, others: list[str]) -> int:
    shape = read_shape(parsed.model, parsed.dtype, parsed.weight_bits)
    config = _settings(parsed)
    longest = parsed.max_model_len
    if longest is None:
        longest = max(shape.max_position, parsed.context or 0)
    engine = Engine(
        max_model_len=_at_least_one("max-model-len", longest),
        max_num_seqs=_at_least_one("max-num-seqs", parsed.max_num_seqs),
        max_num_batched_tokens=_at_least_one(
            "max-num-batched-tokens", parsed.max_num_batched_tokens
        ),
        block_size=_at_least_one("block-size", parsed.block_size),
        gpu_memory_utilization=parsed.gpu_memory_utilization,
        tensor_parallel_size=_at_least_one("tensor-parallel-size", parsed.tensor_parallel_size),
    )
    if not 0 < engine.gpu_memory_utilization <= 1:
        raise PlanError(
            f"--gpu-memory-utilization={engine.gpu_memory_utilization}: must be above 0 and at "
            "most 1"
        )
    setup = Setup(shape, _hardware(parsed), engine, config, _host_budget(parsed, config))
    context = longest if parsed.context is None else parsed.context
    load = Load(context, parsed.requests, parsed.selected_tokens, parsed.hit_rate)
    plan = make_plan(setup, load)
    print(json.dumps(plan.to_json_dict(), indent=2) if parsed.json else table(plan))
    return 0


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise PlanError(f"--{name}={value}: must be at least 1")
    return value


def _settings(parsed: argparse.Namespace) -> KCacheConfig:
    settings = KCacheConfig.from_user(parsed.kcache_config).to_json_dict()
    if parsed.top_n is not None:
        settings["top_n"] = int(parsed.top_n) if parsed.top_n.isdigit() else parsed.top_n
    if parsed.coverage is not None:
        settings["coverage"] = parsed.coverage
    config = KCacheConfig.from_user(settings)
    if config.resolved_k_bits != 16:
        raise PlanError(f"kcache_config.k_bits={config.k_bits!r}: not planned yet; only 16 is")
    return config


def _hardware(parsed: argparse.Namespace) -> Hardware:
    known = HARDWARE[parsed.gpu]
    given = {
        "gpu_memory_bytes": (parsed.gpu_memory, GIB),
        "hbm_bytes_per_s": (parsed.hbm_bandwidth, GB),
        "pcie_bytes_per_s": (parsed.pcie_bandwidth, GB),
    }
    changes = {}
    for name, (value, unit) in given.items():
        if value is None:
            continue
        if not value > 0:
            raise PlanError(f"{name}: {value} must be above 0")
        changes[name] = value * unit
    return dataclasses.replace(known, **changes)


def _host_budget(parsed: argparse.Namespace, config: KCacheConfig) -> float:
    if parsed.host_memory is not None:
        if not parsed.host_memory > 0:
            raise PlanError(f"--host-memory={parsed.host_memory}: must be above 0")
        return parsed.host_memory * GIB
    if config.host_memory_gib != "auto":
        return float(config.host_memory_gib) * GIB
    return host_memory().available_bytes * AUTO_SHARE


def table(plan: Plan) -> str:
    """The plan for people."""
    setup, engines = plan.setup, (plan.stock, plan.stock_fp8, plan.kcache)
    hardware, engine = setup.hardware, setup.engine
    ranks = f" x {engine.tensor_parallel_size}" if engine.tensor_parallel_size > 1 else ""
    gpu = f"{hardware.gpu_memory_bytes / GIB:.1f} GiB, {hardware.hbm_bytes_per_s / GB:.0f} GB/s"
    host = f"host memory for V {setup.host_budget_bytes / GIB:.1f} GiB"
    work = f"{plan.selected_tokens:.0f} attended a head, hit rate {plan.hit_rate:.2f}"
    lines = [
        f"{setup.shape.name} on {hardware.name}{ranks}: {gpu}",
        f"link {hardware.pcie_bytes_per_s / GB:.1f} GB/s; {host}",
        f"context {plan.load.context} tokens, {work}",
        "",
        _row("", ["stock", "stock fp8", "kcache"]),
    ]
    rows: list[tuple[str, list[str]]] = [
        ("blocks", [f"{one.fit.num_blocks}" for one in engines]),
        ("requests that fit", [f"{one.fits}" for one in engines]),
        ("requests of the step", [f"{one.requests}" for one in engines]),
        ("GPU memory read, GB/step", [f"{one.cost.hbm_bytes / GB:.1f}" for one in engines]),
        ("PCIe, GB/step", [f"{one.cost.pcie_bytes / GB:.2f}" for one in engines]),
        ("step, ms", [f"{one.step_ms:.1f}" for one in engines]),
        ("tokens/s", [f"{one.tokens_per_second:.0f}" for one in engines]),
        ("kcache against it", [f"{plan.speed_up(one):.2f}x" for one in engines[:2]]),
    ]
    lines += [_row(name, cells) for name, cells in rows]
    lines += ["", f"kcache step: {_parts(plan.kcache)}"]
    lines.append(f"host memory: {plan.kcache.fit.host_bytes / GIB:.1f} GiB of V")
    lines.append(f"one request alone: {plan.single_request_ratio:.2f}x stock")
    even = plan.break_even_context
    lines.append(
        "pays (more tokens/s than stock): "
        + (f"from {even} tokens of context" if even else "at no context up to the longest")
    )
    lines.append(f"limited by: {plan.limited_by}")
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def _row(name: str, cells: list[str]) -> str:
    return f"{name:26s}" + "".join(f"{cell:>12s}" for cell in cells)


def _parts(split: Prediction) -> str:
    cost = split.cost
    parts = {
        "weights": cost.weights,
        "score": cost.cache,
        "exposed fetch": max(0.0, cost.fetch + cost.select),
        "attend": cost.attend,
        "launches and the rest": cost.launches + cost.fixed,
    }
    shown = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in parts.items())
    return f"{shown} ms; {cost.fetch_hidden * 1e3:.1f} ms of fetch beside scoring"


# check


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="list what a start would refuse, without loading weights",
        description="List what a start with --kv-backend kcache would refuse, without loading "
        "weights. Takes every engine flag of vllm serve.",
    )
    check.set_defaults(run=_check)
    check.add_argument("model", help="model, as for vllm serve")
    check.add_argument("--json", action="store_true", help="print a JSON list instead of lines")


def _check(parsed: argparse.Namespace, others: list[str]) -> int:
    # vLLM logs to stdout, which is for the answer; it reads these when it is imported.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm_kcache.integration.check import notes, problems
    except ImportError as error:
        raise PlanError(f"check needs vLLM, which does not import: {error}") from None
    found = problems(parsed.model, others)
    if parsed.json:
        print(json.dumps(found, indent=2))
    else:
        for text in notes(parsed.model, others):
            print(f"note: {text}")
        for text in found:
            print(f"refused: {text}")
        print(f"{parsed.model}: {_count(found)}")
    return 1 if found else 0


def _count(found: list[str]) -> str:
    if not found:
        return "nothing would be refused"
    return f"{len(found)} refusal{'s' if len(found) > 1 else ''}"


if __name__ == "__main__":
    sys.exit(main())
