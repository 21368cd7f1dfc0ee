# SPDX-License-Identifier: Apache-2.0
"""Codes and rows by csrc/ against their definitions, without a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.csrc import code_checks as checks
from tests.csrc.coded_layer import CodedLayer
from tests.reference.coded import SHAPES, Coded
from tests.shapes import Shape, build_case
from vllm_kcache.kernels.rows import write_rows

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.mark.parametrize("shape", checks.SCORED, ids=str)
@pytest.mark.parametrize("splits", [None, 1, 3])
def test_scores(shape: Shape, splits: int | None) -> None:
    checks.check_scores(shape, splits)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("shape", checks.SOME_SCORED, ids=str)
def test_scores_of_several_tokens(shape: Shape, first: int) -> None:
    checks.check_joint_scores(shape, None, first)


@pytest.mark.parametrize("shape", checks.SOME_SCORED, ids=str)
def test_scores_with_a_soft_cap(shape: Shape) -> None:
    for soft_cap in checks.SOFT_CAPS:
        checks.check_scores(shape, None, soft_cap=soft_cap)
        checks.check_joint_scores(shape, None, 2, soft_cap=soft_cap)


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
def test_scores_of_each_dtype(dtype: torch.dtype) -> None:
    checks.check_scores(checks.SCORED[0], None, dtype)


@pytest.mark.parametrize("host_dtype", checks.HOST_DTYPES)
@pytest.mark.parametrize("shape", checks.WRITTEN, ids=str)
def test_writes_are_those_of_the_definition(shape: Shape, host_dtype: str) -> None:
    checks.check_write(shape, torch.bfloat16, host_dtype)


@pytest.mark.parametrize("host_dtype", checks.HOST_DTYPES)
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
def test_writes_of_each_dtype(dtype: torch.dtype, host_dtype: str) -> None:
    checks.check_write(SHAPES[1], dtype, host_dtype)


@pytest.mark.parametrize("value", [0.0, 3.0, 1e30])
def test_writes_of_extremes(value: float) -> None:
    checks.check_write(SHAPES[1], torch.float32, "int8", value)


@pytest.mark.parametrize("host_dtype", checks.HOST_DTYPES)
def test_parts(host_dtype: str) -> None:
    checks.check_parts(host_dtype)


@pytest.mark.parametrize("host_dtype", checks.HOST_DTYPES)
def test_slots(host_dtype: str) -> None:
    checks.check_slots(host_dtype)


@pytest.mark.parametrize("host_dtype", checks.HOST_DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:-2], ids=str)
def test_slots_of_several_tokens(shape: Shape, host_dtype: str) -> None:
    checks.check_drafts(shape, host_dtype)


def test_a_step_of_more_tokens_than_a_grid_has_rows() -> None:
    """With blocks of one token each is a run, however many there are."""
    layer = CodedLayer.of(Coded.of(build_case(Shape((3,), 1, 1, 64, 16, 1)), "int8"))
    tokens = 1 << 16
    slots = torch.full((tokens,), -1)
    slots[-1] = 0
    key = torch.ones(1, 1, 64).expand(tokens, -1, -1)
    write_rows(layer.view, key, key, slots, allocate_tokens=tokens)
    assert int((layer.cache.table >= 0).sum()) == 1


@pytest.mark.parametrize("host_dtype", checks.HOST_DTYPES)
def test_prompts_fill_slots(host_dtype: str) -> None:
    checks.check_fills(host_dtype)


def test_rows_of_several_pieces_fill_none() -> None:
    checks.check_no_fills()


@pytest.mark.parametrize("host_dtype", checks.HOST_DTYPES)
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gathers(shape: Shape, dtype: torch.dtype, host_dtype: str) -> None:
    checks.check_gather(shape, dtype, host_dtype)


def test_gathers_beside_fetches() -> None:
    checks.check_gathers_beside_fetches()


def test_a_step_of_codes() -> None:
    checks.check_step()


def test_views_and_calls_are_checked() -> None:
    layer = CodedLayer.of(Coded.of(build_case(SHAPES[0]), "model"))
    checks.check_errors(layer)
