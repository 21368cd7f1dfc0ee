# SPDX-License-Identifier: Apache-2.0
"""Tables of the accuracy benchmark's rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import accuracy
from benchmarks.accuracy_table import load_rows, selection_name, tables
from tests.benchmarks.result_rows import forced_row, task_row


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        (None, "stock"),
        ({}, "default"),
        ({"coverage": 0.97}, "coverage .97"),
        ({"coverage": 0.97, "top_n": "all"}, "coverage .97"),
        ({"coverage": 0.9, "top_n": 64, "head_combine": "max"},
         "coverage .9, at most 512 tokens, combine max"),
        ({"mass_threshold": 0.003}, "threshold .003"),
        ({"mass_threshold": 0.003, "top_n": 64, "tail": "renormalize"},
         "threshold .003, at most 512 tokens, tail renormalize"),
        ({"top_n": "all"}, "everything"),
        ({"top_n": 4, "sink_tokens": 8, "recent_tokens": 1, "tail": "drop"},
         "32 tokens, sink 8, recent 1, tail drop"),
    ],
)  # fmt: skip
def test_names_of_selections(setting: dict[str, Any] | None, name: str) -> None:
    start = {"v_block_tokens": 8, "dense_layers": 0}
    assert selection_name(None if setting is None else {**start, **setting}) == name


def test_the_last_of_equal_rows_counts(tmp_path: Path) -> None:
    old = forced_row({"coverage": 0.9}, commit="old", kl=1.0)
    skipped = {"key": "x", "kcache": {}, "skipped": "too small"}
    path = write(tmp_path / "rows.jsonl", [old, skipped, forced_row({"coverage": 0.9}, kl=0.5)])
    (row,) = load_rows(path)
    assert row["kl"] == 0.5
    # Another length, device or dtype is another row.
    others = [forced_row({"coverage": 0.9}, length=4096), forced_row({"coverage": 0.9}, device="x")]
    others.append(forced_row({"coverage": 0.9}, dtype="bfloat16"))
    assert len(load_rows(write(path, [old, *others]))) == 4
    with pytest.raises(SystemExit, match="no such file"):
        load_rows(tmp_path / "missing.jsonl")


def test_tables_of_forced_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        forced_row(None),
        forced_row({"top_n": "all"}, perplexity_change=-1e-9, kl=0.0),
        forced_row({"coverage": 0.9}, selected_tokens=300.4, kl=0.0123, kl_error=None),
        forced_row({"coverage": 0.9}, v_block_tokens=16, dense_layers=1),
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    accuracy.main(["table", "--results", str(path)])
    text = capsys.readouterr().out
    assert "### Forced text: model, float32\n\nGPU, 4 texts; commit abc.\n" in text
    assert text.count("| stock | all | 10.0000 |  |  |  |  |  |") == 2
    first, second = text.split("**2048 tokens of context, V blocks of ")[1:]
    assert first.startswith("8**")
    assert second.startswith("16, 1 dense layer**")
    assert "| coverage .9 | 300 | 10.1000 | +1.00% ± 0.20% | 0.01230 ± - |" in first
    assert "| +0.00% ± 0.20% | 0.00000 ± 0.00100 |" in first
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {9}


def test_tables_of_tasks() -> None:
    text = tables([task_row(None), task_row({"coverage": 0.97}), task_row({"top_n": 64})])
    assert "### Tasks: model, float32" in text
    assert "GPU, 20 items of each task; commit abc." in text
    scores, answers = text.split("**Right answers and agreement")
    assert "| stock | all | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 |  | 50.0 |  |" in scores
    line = "| 512 tokens | 400 | 49.0 | 49.0 | 49.0 | 49.0 | 49.0 | 49.0 | -1.0 ± 0.5 | 49.0 |"
    assert line in scores
    assert "stock" not in answers
    assert (
        "| coverage .97 | -0.0100 ± 0.0020 | 0.00300 | -0.0100 ± 0.0020 | 0.00300 | 75% | 75% | "
        "75% | 31 |"
    ) in answers
