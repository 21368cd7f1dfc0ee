# SPDX-License-Identifier: Apache-2.0
"""The check at start (vllm_kcache/kernels/self_check.py) under Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.kernels.self_checking

It passes over kernels that are right, whatever the rule, and names the stage of each fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from vllm_kcache.kernels import decode, self_check
from vllm_kcache.kernels.self_check import KernelError, LayerShape, check_kernels
from vllm_kcache.types import Selection

THRESHOLD = LayerShape(
    3, 1, 64, 16, 8, torch.float32, Selection(None, None, 1, 32, "max", 0.01), "clip"
)
COVERAGE = replace(
    THRESHOLD, selection=Selection(None, 0.9, 1, 32, "sum"), tail="renormalize", dtype=torch.float16
)
FIXED = replace(
    THRESHOLD, head_size=80, v_block_tokens=16, page_tokens=32, tail="drop",
    selection=Selection(5, None, 1, 32, "sum"),
)  # fmt: skip
EVERYTHING = replace(
    COVERAGE, num_query_heads=2, num_kv_heads=2, selection=Selection(None, None, 1, 32, "sum")
)

Function = Callable[..., Any]


def with_argument(place: int, change: Callable[[Any], Any]) -> Callable[[Function], Function]:
    """A function that is handed another argument at that place."""

    def wrap(function: Function) -> Function:
        def faulty(*arguments: Any, **named: Any) -> Any:
            changed = list(arguments)
            changed[place] = change(changed[place])
            return function(*changed, **named)

        return faulty

    return wrap


def shifted_rows(function: Function) -> Function:
    """Fetch, with two rows of a list exchanged."""

    def faulty(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        rows = arguments[6].rows
        rows[0, 0, :2] = rows[0, 0, :2].flip(0)
        rows[1, 0, :2] = rows[1, 0, :2].flip(0)
        return result

    return faulty


def no_scores(step: decode.DecodeStep, first_head: int, last_head: int) -> None:
    """What a benchmark may put in the place of scores."""
    step.block_lse.fill_(0)


# Stage that must be named, where the fault is put, and the fault.
FAULTS: tuple[tuple[str, Any, str, Callable[[Function], Function]], ...] = (
    ("write", self_check, "write_kv", with_argument(1, lambda value: value.flip(0))),
    ("write", self_check, "write_kv", with_argument(2, lambda slots: slots.flip(0))),
    ("score", decode, "launch_score", with_argument(4, lambda scale: 1.01 * scale)),
    ("score", decode, "launch_score", with_argument(3, lambda lengths: (lengths - 1).clamp_min(0))),
    ("select", decode, "launch_select",
     with_argument(3, lambda rule: replace(rule, mass_threshold=0.05))),
    ("select", decode, "launch_select",
     with_argument(3, lambda rule: replace(rule, recent_tokens=1))),
    ("fetch or attend", decode, "launch_fetch", shifted_rows),
    ("fetch or attend", decode, "attend_blocks", with_argument(7, lambda scale: 1.05 * scale)),
    ("fetch or attend", decode, "attend_blocks", with_argument(9, lambda tail: "renormalize")),
)  # fmt: skip


def main() -> None:
    shapes = (THRESHOLD, COVERAGE, FIXED, EVERYTHING)
    for shape in shapes:
        check_kernels(shape, "cpu")
    for stage, module, name, fault in FAULTS:
        sound = getattr(module, name)
        setattr(module, name, fault(sound))
        with pytest.raises(KernelError, match=f"the step '{stage}'"):
            check_kernels(THRESHOLD, "cpu")
        setattr(module, name, sound)
    # A benchmark's replacement of the scores is no fault of the kernels, and stays.
    decode.after_score = no_scores
    check_kernels(THRESHOLD, "cpu")
    assert decode.after_score is no_scores
    print(f"{len(shapes)} shapes pass, {len(FAULTS)} faults are found")


if __name__ == "__main__":
    main()
