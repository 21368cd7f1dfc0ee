# SPDX-License-Identifier: Apache-2.0
"""`vllm-kcache plan` and `vllm-kcache check`.

`plan` predicts, and needs neither vLLM nor a GPU. `check` makes vLLM's own configuration of the
model on this machine and lists what a start would refuse, without loading weights.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import reprlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from vllm_kcache.cache.host_memory import AUTO_SHARE, HostMemoryError, host_memory
from vllm_kcache.config import KCacheConfig, KCacheConfigError
from vllm_kcache.planner.cost import HARDWARE, Hardware
from vllm_kcache.planner.memory import GIB, Engine
from vllm_kcache.planner.plan import ENDLESS_BYTES, Load, Setup, make_plan
from vllm_kcache.planner.report import GB, table
from vllm_kcache.planner.shape import DTYPE_BYTES, MOST_WEIGHT_BITS, PlanError, read_shape


class _Parser(argparse.ArgumentParser):
    """Wrong arguments are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise PlanError(message)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `vllm-kcache` command.

    Returns:
        0; of `check`, 1 when something would be refused; 2, with one line on stderr, when there is
        no answer: wrong arguments, a model that is not found or not readable, a load that does not
        fit. With --json stdout is valid JSON in each case, {"error": the line} with 2.
    """
    given = sys.argv[1:] if arguments is None else arguments
    try:
        parsed, others = _parser().parse_known_args(given)
        # `check` hands on every flag that it does not know: they are vLLM's.
        if others and parsed.run is not _check:
            raise PlanError(f"unrecognized arguments: {' '.join(others)}")
        return parsed.run(parsed, others)
    except (PlanError, KCacheConfigError, HostMemoryError) as error:
        message = _one_line(str(error))
        if "--json" in given:
            print(json.dumps({"error": message}))
        print(f"vllm-kcache: error: {message}", file=sys.stderr)
        return 2


def _one_line(text: str) -> str:
    """Without line breaks, and without what UTF-8 cannot write."""
    return " ".join(text.split()).encode(errors="backslashreplace").decode()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vllm-kcache", description="Plan and check the split K/V cache of vLLM.")
    commands = parser.add_subparsers(required=True, metavar="{plan,check}")
    _add_plan(commands)
    _add_check(commands)
    return parser


# plan


def _between(kind: Callable[[str], float], least: float, most: float) -> Callable[[str], Any]:
    """The type of an argument that is a number in these bounds."""

    def number(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= (value := kind(text)) <= most:
                return value
        whole = "whole " if kind is int else ""
        raise argparse.ArgumentTypeError(
            f"{reprlib.repr(text)} must be a {whole}number from {least:g} to {most:g}"
        )

    return number


_COUNT = _between(int, 1, 10**9)
_POSITIVE = _between(float, 1e-6, 1e9)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="predict what fits and how fast it decodes, against stock vLLM",
        description="Predict what fits and how fast it decodes, against stock vLLM.",
    )
    plan.set_defaults(run=_plan)
    plan.add_argument("model", help="folder with a config.json, or a model in the local cache")
    load = plan.add_argument_group("load")
    load.add_argument("--context", type=_COUNT, help="tokens of a request (default: the most)")
    load.add_argument("--requests", type=_COUNT, help="requests at once (default: all that fit)")
    load.add_argument(
        "--selected-tokens", type=_POSITIVE, help="tokens a head attended (default: estimated)"
    )
    load.add_argument(
        "--hit-rate",
        type=_between(float, 0, 1),
        help="hit rate of the hot cache, 0 to 1 (default: estimated)",
    )
    machine = plan.add_argument_group("machine")
    machine.add_argument("--gpu", choices=HARDWARE, default="h100")
    machine.add_argument("--gpu-memory", type=_POSITIVE, metavar="GIB", help="memory of one GPU")
    machine.add_argument(
        "--hbm-bandwidth", type=_POSITIVE, metavar="GB/S", help="of kernels that read GPU memory"
    )
    machine.add_argument(
        "--pcie-bandwidth", type=_POSITIVE, metavar="GB/S", help="of copies from pinned memory"
    )
    machine.add_argument(
        "--host-memory",
        type=_POSITIVE,
        metavar="GIB",
        help="host memory for rows of all ranks (default: kcache_config.host_memory_gib, or "
        f"{AUTO_SHARE:.0%}% of what this machine has available)",
    )
    _add_engine(plan)
    settings = plan.add_argument_group("split cache")
    settings.add_argument("--kcache-config", help="settings as JSON")
    settings.add_argument("--top-n", help='V blocks per KV head, or "all"')
    settings.add_argument("--coverage", type=float)
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_engine(plan: argparse.ArgumentParser) -> None:
    engine = plan.add_argument_group("engine, as in vLLM")
    engine.add_argument("--gpu-memory-utilization", type=_between(float, 1e-6, 1), default=0.9)
    engine.add_argument("--tensor-parallel-size", type=_COUNT, default=1)
    engine.add_argument("--max-model-len", type=_COUNT, help="default: the model's most")
    engine.add_argument("--max-num-seqs", type=_COUNT, default=256)
    engine.add_argument("--max-num-batched-tokens", type=_COUNT, default=8192)
    engine.add_argument("--block-size", type=_COUNT, default=16)
    engine.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True
    )
    engine.add_argument(
        "--num-speculative-tokens",
        type=_between(int, 0, 1000),
        default=0,
        help="most drafts of a request in a step, as in --speculative-config",
    )
    engine.add_argument("--dtype", choices=DTYPE_BYTES, default="auto")
    engine.add_argument(
        "--weight-bits",
        type=_between(int, 1, MOST_WEIGHT_BITS),
        help="bits of a quantised weight",
    )


def _plan(parsed: argparse.Namespace, others: list[str]) -> int:
    shape = read_shape(parsed.model, parsed.dtype, parsed.weight_bits)
    config = _settings(parsed)
    longest = parsed.max_model_len or max(shape.max_position, parsed.context or 0)
    engine = Engine(
        longest,
        parsed.max_num_seqs,
        parsed.max_num_batched_tokens,
        parsed.block_size,
        parsed.gpu_memory_utilization,
        parsed.tensor_parallel_size,
        parsed.num_speculative_tokens,
        parsed.enable_prefix_caching,
    )
    setup = Setup(shape, _hardware(parsed), engine, config, _host_budget(parsed, config))
    load = Load(parsed.context or longest, parsed.requests, parsed.selected_tokens, parsed.hit_rate)
    plan = make_plan(setup, load)
    print(
        json.dumps(plan.to_json_dict(), indent=2, allow_nan=False) if parsed.json else table(plan)
    )
    return 0


def _settings(parsed: argparse.Namespace) -> KCacheConfig:
    settings = KCacheConfig.from_user(parsed.kcache_config).to_json_dict()
    if parsed.top_n is not None:
        settings["top_n"] = parsed.top_n
        with contextlib.suppress(ValueError):
            settings["top_n"] = int(parsed.top_n)
    if parsed.coverage is not None:
        settings["coverage"] = parsed.coverage
    return KCacheConfig.from_user(settings)


def _hardware(parsed: argparse.Namespace) -> Hardware:
    given = {
        "gpu_memory_bytes": (parsed.gpu_memory, GIB),
        "hbm_bytes_per_s": (parsed.hbm_bandwidth, GB),
        "pcie_bytes_per_s": (parsed.pcie_bandwidth, GB),
    }
    changes = {name: value * unit for name, (value, unit) in given.items() if value is not None}
    return dataclasses.replace(HARDWARE[parsed.gpu], **changes)


def _host_budget(parsed: argparse.Namespace, config: KCacheConfig) -> float:
    given = parsed.host_memory or config.host_memory_gib
    if given != "auto":
        return min(float(given) * GIB, ENDLESS_BYTES)
    try:
        return host_memory().available_bytes * AUTO_SHARE
    except OSError as error:
        raise PlanError(f"{error.filename}: {error.strerror}. Give --host-memory.") from None


# check


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="list what a start would refuse, without loading weights",
        description="List what a start with --kv-backend kcache would refuse, without loading "
        "weights. Takes every engine flag of vllm serve.",
        # A flag of vLLM's must not be taken for a short form of one of ours.
        allow_abbrev=False,
    )
    check.set_defaults(run=_check)
    check.add_argument("model", help="model, as for vllm serve; before the flags")
    check.add_argument("--json", action="store_true", help="print JSON instead of lines")


def _check(parsed: argparse.Namespace, others: list[str]) -> int:
    # vLLM logs to stdout, which is for the answer; it reads these when it is imported.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm_kcache.integration.check import notes, problems
    except ImportError as error:
        raise PlanError(f"check needs vLLM, which does not import: {error}") from None
    found = [_one_line(text) for text in problems(parsed.model, others)]
    noted = [_one_line(text) for text in notes(parsed.model, others)]
    if parsed.json:
        print(json.dumps({"refused": found, "notes": noted}, indent=2))
    else:
        for text in found:
            print(f"refused: {text}")
        for text in noted:
            print(f"note: {text}")
        count = f"{len(found) or 'no'} refusal{'' if len(found) == 1 else 's'}"
        print(f"{_one_line(parsed.model)}: {count if found else 'nothing would be refused'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
