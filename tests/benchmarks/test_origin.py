# SPDX-License-Identifier: Apache-2.0
"""Rows of the results say where they come from."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from benchmarks import origin


@pytest.fixture(autouse=True)
def forgets_the_commit() -> Iterator[None]:
    origin.commit.cache_clear()
    yield
    origin.commit.cache_clear()


def test_a_tree_without_history_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCACHE_COMMIT", "1234567")
    assert origin.commit() == "1234567"


def test_nothing_says_the_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.delenv("KCACHE_COMMIT", raising=False)
    monkeypatch.setattr(origin, "ROOT", tmp_path)
    assert origin.commit() == "unknown"


def test_the_command_as_it_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/benchmarks/bench_score.py", "--sweep"])
    assert origin.command() == "python -m benchmarks.bench_score --sweep"


def test_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCACHE_COMMIT", "1234567")
    row = origin.origin("torch")
    assert row.keys() == {"gpu", "torch", "commit", "date"}
    assert (row["torch"], row["commit"]) == (torch.__version__, "1234567")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"])
    assert torch.cuda.is_available() or row["gpu"] == "none"
