# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from tests.serve.server import MODEL


@pytest.fixture(scope="session", autouse=True)
def model_is_there() -> None:
    """A missing model is a failure, not a skip: these tests are the point of the suite."""
    assert (MODEL / "config.json").is_file(), f"{MODEL} is missing: run make model"
