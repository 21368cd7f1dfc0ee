# SPDX-License-Identifier: Apache-2.0
"""csrc/select.cu against its definition, without a GPU."""

from __future__ import annotations

import pytest

from tests.kernels.checks import THRESHOLDS, check_select
from tests.kernels.lists import (
    KINDS,
    RULES,
    check_errors,
    check_select_equal,
    check_select_long,
    check_select_shapes,
)
from vllm_kcache.types import Selection

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_odd_shapes(rule: Selection) -> None:
    check_select_shapes(rule, "cpu")


@pytest.mark.parametrize("rule", THRESHOLDS, ids=str)
def test_thresholds(rule: Selection) -> None:
    check_select(rule)


@pytest.mark.parametrize("num_tokens", [12000, 40000, 131072])
@pytest.mark.parametrize("kind", KINDS)
def test_long_requests(kind: str, num_tokens: int) -> None:
    """More V blocks than threads; a bin of ranks with few and with too many to compare; more shared
    memory than a kernel has without leave."""
    check_select_long(kind, num_tokens, "cpu")


@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize("num_equal", [511, 512, 513, 514])
def test_as_many_equal_masses_as_are_compared(num_equal: int, group: int) -> None:
    check_select_equal(num_equal, group, "cpu")


def test_errors_name_what_is_wrong() -> None:
    check_errors("cpu")
