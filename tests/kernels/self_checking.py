# SPDX-License-Identifier: Apache-2.0
"""The check at start (vllm_kcache/kernels/self_check.py) under Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.csrc.interpreted LIBRARY tests.kernels.self_checking

It passes over kernels that are right, whatever the rule, and names the stage of each fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.kernels import attend, decode, self_check
from vllm_kcache.kernels.select import BLOCK_BITS
from vllm_kcache.kernels.self_check import KernelError, check_kernels
from vllm_kcache.reference import codes, score
from vllm_kcache.types import KStats, Selection

SHAPE = CacheShape(1, 3, 1, 64, 16, 8, torch.float32)
THRESHOLD = (SHAPE, Selection(None, None, 1, 32, "max", 0.01), "clip")
COVERAGE = (
    replace(SHAPE, dtype=torch.float16), Selection(None, 0.9, 1, 32, "sum"), "renormalize"
)  # fmt: skip
FIXED = (
    replace(SHAPE, head_size=80, block_tokens=16, page_tokens=32),
    Selection(5, None, 1, 32, "sum"),
    "renormalize",
)
EVERYTHING = (
    replace(SHAPE, num_query_heads=2, num_kv_heads=2, dtype=torch.float16),
    Selection(None, None, 1, 32, "sum"),
    "renormalize",
)
# Where tokens of a request have one list.
JOINT = (
    CacheShape(1, 4, 2, 64, 16, 8, torch.float16, 4, "int8"),
    Selection(None, None, 1, 32, "max", 0.01),
    "clip",
)
CODED = (
    CacheShape(1, 4, 2, 64, 16, 8, torch.float16, 4, "int8"),
    Selection(None, None, 1, 8, "max", 0.02),
    "clip",
)

# Most tokens of a request in a step.
DRAFTED = 4

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


def of_batch(**changes: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A change of the batch that a step is handed."""
    return lambda batch: replace(
        batch, **{name: change(getattr(batch, name)) for name, change in changes.items()}
    )


def shifted_rows(function: Function) -> Function:
    """Select and fetch, with two rows of each list exchanged."""

    def faulty(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        rows = arguments[1].rows
        rows[0, 0, :2] = rows[0, 0, :2].flip(0)
        rows[1, 0, :2] = rows[1, 0, :2].flip(0)
        return result

    return faulty


def wrong_tokens(function: Function) -> Function:
    """Select and fetch, where a list says that others of its tokens selected the blocks."""

    def faulty(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        arguments[1].selected.blocks[0] ^= 3 << BLOCK_BITS
        arguments[1].selected.blocks[1] ^= 3 << BLOCK_BITS
        return result

    return faulty


def for_all(selected: Any) -> Any:
    """Lists of which each block was selected by all tokens."""
    return replace(selected, blocks=selected.blocks | (1 << DRAFTED) - 1 << BLOCK_BITS)


def other_query(function: Function) -> Function:
    """Scores from codes, after which attention has another q'."""

    def faulty(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        arguments[3].mul_(1.01)
        return result

    return faulty


def one_by_one(function: Function) -> Function:
    """The write that begins a step, last token first: the others of a V block that is begun come
    before its slot is there."""

    def faulty(view: Any, key: Any, value: Any, slots: Any, **named: Any) -> None:
        for token in reversed(range(len(slots))):
            own = slice(token, token + 1)
            function(view, key[own], value[own], slots[own], **{**named, "allocate_tokens": 1})

    return lambda *given, **named: (faulty if "allocate_tokens" in named else function)(
        *given, **named
    )


def another_rule(**changes: Any) -> Callable[[Any], Any]:
    """A change of the rule in the view that selection is handed."""

    def change(view: Any) -> Any:
        view = replace(view, selection=replace(view.selection, **changes))
        return replace(view, packed=self_check.packed_view(view))

    return change


def other_scores(lists: Any) -> Any:
    """Lists that are selected by the scores of their neighbours."""
    return replace(lists, block_lse=lists.block_lse.roll(1, 2))


def when(condition: Callable[[dict[str, Any]], bool], fault: Function) -> Function:
    """The fault only in calls whose keywords meet the condition: one specialisation is broken."""

    def wrap(function: Function) -> Function:
        faulty = fault(function)
        return lambda *arguments, **named: (faulty if condition(named) else function)(
            *arguments, **named
        )

    return wrap


less = of_batch(seq_lens=lambda lengths: (lengths - 1).clamp_min(0))
scaled = of_batch(scale=lambda scale: 1.05 * scale)
# Stage that must be named, where the fault is put, and the fault.
FAULTS: tuple[tuple[str, Any, str, Callable[[Function], Function]], ...] = (
    ("write", self_check, "write_kv", with_argument(2, lambda value: value.flip(0))),
    ("write", self_check, "write_kv", with_argument(3, lambda slots: slots.flip(0))),
    # Only the write that begins a step.
    ("write", self_check, "write_kv",
     when(lambda named: "allocate_tokens" in named, with_argument(2, lambda value: 2 * value))),
    ("score", decode, "score_blocks", with_argument(1, scaled)),
    ("score", decode, "score_blocks", with_argument(1, less)),
    # Only the kernel behind a write, only the one before it, only the one that signals.
    ("score", decode, "score_blocks",
     when(lambda named: named["after_write"], with_argument(1, scaled))),
    ("score", decode, "score_blocks",
     when(lambda named: not named["after_write"], with_argument(1, scaled))),
    ("score", decode, "score_blocks",
     when(lambda named: "signal" in named, with_argument(1, scaled))),
    ("select", self_check, "decode_step", with_argument(0, another_rule(mass_threshold=0.05))),
    ("select", self_check, "decode_step", with_argument(0, another_rule(recent_tokens=1))),
    ("select", decode, "select_and_fetch", with_argument(1, other_scores)),
    ("select", decode, "follow_scores", with_argument(1, other_scores)),
    ("fetch or attend", decode, "select_and_fetch", shifted_rows),
    ("fetch or attend", decode, "attend_blocks", with_argument(1, scaled)),
    ("fetch or attend", decode, "attend_blocks",
     with_argument(0, lambda view: replace(view, tail="renormalize"))),
)  # fmt: skip
# The same, of what is seen with several tokens of a request alone.
FAULTS_OF_DRAFTS: tuple[tuple[str, Any, str, Callable[[Function], Function]], ...] = (
    ("fetch or attend", self_check, "write_kv", one_by_one),
    ("score", decode, "score_blocks",
     with_argument(1, of_batch(spans=lambda spans: (spans - 1).clamp_min(0)))),
)  # fmt: skip

# Where tokens of a request have one list.
FAULTS_OF_JOINT_LISTS: tuple[tuple[str, Any, str, Callable[[Function], Function]], ...] = (
    ("score", decode, "score_codes", other_query),
    ("select", decode, "select_and_fetch", wrong_tokens),
    ("select", decode, "select_and_fetch", with_argument(1, other_scores)),
    ("fetch or attend", decode, "select_and_fetch", shifted_rows),
    ("fetch or attend", decode, "attend_blocks", with_argument(2, for_all)),
    ("fetch or attend", decode, "attend_blocks", with_argument(1, less)),
    ("attend", attend, "attend_blocks", with_argument(1, less)),
)  # fmt: skip


def without_drafts(fault: Function) -> Function:
    """The fault only in batches where each row is a request of its own."""

    def wrap(function: Function) -> Function:
        faulty = fault(function)

        def sometimes(view: Any, batch: Any, *arguments: Any, **named: Any) -> Any:
            alone = batch.scored_together(view.shape.group) == 1
            return (faulty if alone else function)(view, batch, *arguments, **named)

        return sometimes

    return wrap


# What an engine with drafts runs where a batch has none.
FAULTS_WITHOUT_DRAFTS = (
    (THRESHOLD, "score", decode, "score_blocks", without_drafts(with_argument(1, less))),
    (JOINT, "score", decode, "score_codes", without_drafts(with_argument(1, less))),
    (JOINT, "fetch or attend", decode, "attend_blocks", without_drafts(with_argument(1, less))),
)  # fmt: skip

# Where layers have sinks and a cap, with K itself in the pages and with codes.
no_cap, no_sinks = of_batch(soft_cap=lambda cap: None), of_batch(sinks=lambda sinks: None)
SPECIAL_FAULTS = (
    (THRESHOLD, "score", decode, "score_blocks", no_cap),
    (CODED, "score", decode, "score_codes", no_cap),
    *((layer, "fetch or attend", decode, "attend_blocks", fault)
      for layer in (THRESHOLD, CODED) for fault in (no_cap, no_sinks)),
    # Only in the launch of lists in several parts.
    (CODED, "attend", self_check.attend, "attend_blocks", no_sinks),
)  # fmt: skip


# Of its random q' in float32 one value lies in the middle of two steps, nearly.
NEAR_A_TIE = (
    CacheShape(1, 13, 1, 256, 16, 8, torch.bfloat16, 4, "int8"), THRESHOLD[1], "clip"
)  # fmt: skip


def check_rounding() -> None:
    """Kernels are right whose q' differs from the reference's in its last bits: a GPU fuses
    products and sums."""
    sound, modules = codes.transform_query, (self_check, score)

    def in_another_order(query: torch.Tensor, stats: KStats) -> tuple[torch.Tensor, ...]:
        transformed, bias = sound(query.double(), stats)
        return transformed.float(), bias.float()

    for module in modules:
        setattr(module, "transform_query", in_another_order)  # noqa: B010
    check_kernels(*NEAR_A_TIE, "cpu")
    for module in modules:
        setattr(module, "transform_query", sound)  # noqa: B010


def main() -> None:
    check_rounding()
    layers = (THRESHOLD, COVERAGE, FIXED, EVERYTHING)
    for layer in layers:
        check_kernels(*layer, "cpu")
    for layer in (THRESHOLD, JOINT):
        check_kernels(*layer, "cpu", DRAFTED)
    special = {"has_sinks": True, "soft_cap": 2.0}
    for layer in (THRESHOLD, CODED):
        check_kernels(*layer, "cpu", **special)
    drafted = {"decode_tokens": DRAFTED}
    drafted_with_sinks = {**drafted, "has_sinks": True}
    check_kernels(*JOINT, "cpu", **drafted_with_sinks)
    cases = [
        *((THRESHOLD, *fault, {}) for fault in FAULTS),
        *((THRESHOLD, *fault, drafted) for fault in FAULTS_OF_DRAFTS),
        *((JOINT, *fault, drafted) for fault in FAULTS_OF_JOINT_LISTS),
        *((*fault, drafted) for fault in FAULTS_WITHOUT_DRAFTS),
        *((*fault[:4], with_argument(1, fault[4]), special) for fault in SPECIAL_FAULTS),
        (JOINT, "fetch or attend", decode, "attend_blocks", with_argument(1, no_sinks),
         drafted_with_sinks),
    ]  # fmt: skip
    for layer, stage, module, name, fault, options in cases:
        sound = getattr(module, name)
        setattr(module, name, fault(sound))
        with pytest.raises(KernelError, match=f"the step '{stage}'"):
            check_kernels(*layer, "cpu", **options)
        setattr(module, name, sound)
    print(f"{len(layers) + 1} layers pass, {len(cases)} faults are found")


if __name__ == "__main__":
    main()
