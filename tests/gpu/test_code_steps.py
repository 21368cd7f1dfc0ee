# SPDX-License-Identifier: Apache-2.0
"""Whole decode steps with K codes on a GPU: the cases of tests/kernels/code_steps.py, more dtypes,
requests of thousands of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels import attend_rows, joint_steps
from tests.kernels.code_steps import (
    ESTIMATE_CASES,
    ESTIMATED,
    HOW_OFTEN_CASES,
    RULES,
    SHAPES,
    SOFT_CAP,
    check_estimate_errors,
    check_how_often,
    check_step,
    check_write,
)
from tests.shapes import Shape
from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.kernels import attend
from vllm_kcache.kernels.self_check import check_kernels
from vllm_kcache.types import Selection

pytestmark = pytest.mark.gpu

LONG = Shape((9_001, 40, 5_003), 2, 4, 128, 16, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("host_dtype", ["model", "int8"])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, LONG], ids=str)
def test_steps(shape: Shape, rule: Selection, host_dtype: str) -> None:
    check_step(shape, host_dtype, rule, 256, "cuda")
    check_step(shape, host_dtype, rule, 3, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("host_dtype", ["model", "int8"])
def test_steps_of_each_dtype(host_dtype: str, dtype: torch.dtype) -> None:
    for rule in RULES[:2]:
        check_step(SHAPES[2], host_dtype, rule, 64, "cuda", dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("host_dtype", ["model", "int8"])
@pytest.mark.parametrize("shape", [*SHAPES, LONG], ids=str)
def test_steps_with_a_soft_cap(shape: Shape, host_dtype: str, dtype: torch.dtype) -> None:
    for rule in RULES[:2]:
        check_step(shape, host_dtype, rule, 256, "cuda", dtype, SOFT_CAP)


@pytest.mark.parametrize("host_dtype", ["model", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_written(shape: Shape, host_dtype: str) -> None:
    check_write(shape, host_dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("host_dtype", ["model", "int8"])
@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_the_check_at_start(tokens: int, host_dtype: str, dtype: torch.dtype) -> None:
    for rule, tail in ((RULES[0], "renormalize"), (RULES[1], "clip")):
        shape = CacheShape(1, 8, 2, 128, 16, 8, dtype, 4, host_dtype)
        check_kernels(shape, rule, tail, "cuda", tokens)


@pytest.mark.parametrize("dtype", joint_steps.DTYPES, ids=str)
@pytest.mark.parametrize("rule", joint_steps.RULES, ids=str)
@pytest.mark.parametrize("shape", [*joint_steps.SHAPES, joint_steps.LONG], ids=str)
def test_tokens_of_a_request_with_one_list(
    shape: Shape, rule: Selection, dtype: torch.dtype
) -> None:
    for num_slots in (1 << 14, 3, 0):
        joint_steps.check_step(shape, rule, dtype, num_slots, "cuda")


@pytest.mark.parametrize("rule", joint_steps.RULES[:2], ids=str)
@pytest.mark.parametrize(("shape", "most_tokens"), joint_steps.FEW, ids=str)
def test_few_tokens_with_one_list(shape: Shape, most_tokens: int, rule: Selection) -> None:
    joint_steps.check_step(shape, rule, torch.bfloat16, 1 << 14, "cuda", most_tokens)


@pytest.mark.parametrize("rule", joint_steps.RULES[:2], ids=str)
def test_many_lists_of_several_tokens(rule: Selection) -> None:
    """More than there are multiprocessors: thread blocks of four warps, two on each."""
    joint_steps.check_step(joint_steps.MANY, rule, torch.bfloat16, 1 << 14, "cuda")


def test_a_captured_step_of_several_tokens() -> None:
    """On lengths that it was not captured with."""

    def captured(step: joint_steps.Step) -> joint_steps.Step:
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    joint_steps.check_changing_lengths("cuda", captured)


@pytest.mark.parametrize(("shape", "rule"), joint_steps.WITH_SINKS, ids=str)
@pytest.mark.parametrize("dtype", joint_steps.DTYPES, ids=str)
def test_sinks_beside_one_list(shape: Shape, rule: Selection, dtype: torch.dtype) -> None:
    joint_steps.check_sinks(shape, rule, dtype, "cuda")


@pytest.mark.parametrize(("value", "row"), joint_steps.NO_NUMBERS)
@pytest.mark.parametrize("rule", joint_steps.RULES, ids=str)
def test_a_query_that_is_no_number(rule: Selection, value: float, row: int) -> None:
    joint_steps.check_no_number(joint_steps.SHAPES[0], rule, value, row, "cuda")


def test_errors_of_estimates_of_one_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "ESTIMATES_EVERY", 1)
    joint_steps.check_estimate_errors("cuda")


@pytest.mark.parametrize("case", ESTIMATE_CASES, ids=str)
def test_errors_of_estimates(case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "ESTIMATES_EVERY", 1)
    check_estimate_errors(ESTIMATED, *case, device="cuda")


@pytest.mark.parametrize(("host_dtype", "dtype", "first"), HOW_OFTEN_CASES, ids=str)
def test_how_often_estimates_are_looked_at(host_dtype: str, dtype: torch.dtype, first: int) -> None:
    check_how_often(host_dtype, dtype, first, "cuda")


@pytest.mark.parametrize("shape", attend_rows.TILED_SHAPES, ids=str)
def test_attention_on_tensor_cores(shape: Shape) -> None:
    attend_rows.check_tiles(shape, "cuda")


@pytest.mark.parametrize("factor", [1e-3, 1e4])
def test_ranges_on_tensor_cores(factor: float) -> None:
    attend_rows.check_ranges(factor, "cuda")
    attend_rows.check_small_values("cuda")
    attend_rows.check_far_estimates("cuda")


@pytest.mark.parametrize("rule", [attend_rows.EVERY, attend_rows.CLIPPED], ids=["every", "clipped"])
@pytest.mark.parametrize("host_dtype", ["model", "int8"])
def test_a_query_that_holds_nan(host_dtype: str, rule: Selection) -> None:
    """Nothing of it is hidden, and no other query head has anything of it."""
    attend_rows.check_nan(host_dtype, rule, "cuda")
