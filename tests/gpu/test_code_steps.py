# SPDX-License-Identifier: Apache-2.0
"""Whole decode steps with K codes on a GPU: the cases of tests/kernels/code_steps.py, more dtypes,
requests of thousands of tokens."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.code_steps import (
    ESTIMATE_CASES,
    ESTIMATED,
    RULES,
    SHAPES,
    check_estimate_errors,
    check_how_often,
    check_step,
    check_write,
)
from tests.shapes import Shape
from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.kernels import attend
from vllm_kcache.kernels.attend import widen
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


@pytest.mark.parametrize("host_dtype", ["model", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_written(shape: Shape, host_dtype: str) -> None:
    check_write(shape, host_dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("host_dtype", ["model", "int8"])
def test_the_check_at_start(host_dtype: str, dtype: torch.dtype) -> None:
    for rule, tail in ((RULES[0], "renormalize"), (RULES[1], "clip")):
        shape = CacheShape(1, 8, 2, 128, 16, 8, dtype, 4, host_dtype)
        check_kernels(shape, rule, tail, "cuda")


@pytest.mark.parametrize(("host_dtype", "rule"), ESTIMATE_CASES, ids=str)
def test_errors_of_estimates(
    host_dtype: str, rule: Selection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attend, "ESTIMATES_EVERY", 1)
    check_estimate_errors(ESTIMATED, host_dtype, rule, "cuda")


@triton.jit
def widen_kernel(numbers, out, DTYPE: tl.constexpr):
    place = tl.arange(0, 256)
    tl.store(out + place, widen(tl.load(numbers + place), DTYPE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_widens_exactly(dtype: torch.dtype) -> None:
    numbers = torch.arange(-128, 128, dtype=torch.int8, device="cuda")
    out = torch.full((256,), torch.nan, dtype=dtype, device="cuda")
    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    widen_kernel[(1,)](numbers, out, types[dtype])
    assert torch.equal(out.double(), numbers.double())


def test_how_often_estimates_are_looked_at() -> None:
    check_how_often("cuda")
