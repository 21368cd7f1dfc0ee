# SPDX-License-Identifier: Apache-2.0
"""csrc/select.cu against its definition, without a GPU."""

from __future__ import annotations

import pytest

from tests.kernels.checks import THRESHOLDS, check_select
from tests.kernels.lists import KINDS, RULES, check_errors, check_select_long, check_select_shapes
from vllm_kcache.types import Selection

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_odd_shapes(rule: Selection) -> None:
    check_select_shapes(rule, "cpu")


@pytest.mark.parametrize("rule", THRESHOLDS, ids=str)
def test_thresholds(rule: Selection) -> None:
    check_select(rule)


@pytest.mark.parametrize("kind", KINDS)
def test_long_requests(kind: str) -> None:
    """More V blocks than threads, and than shared memory holds without leave."""
    check_select_long(kind, 131072, "cpu")


def test_errors_name_what_is_wrong() -> None:
    check_errors("cpu")
