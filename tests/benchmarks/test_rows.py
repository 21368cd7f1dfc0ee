# SPDX-License-Identifier: Apache-2.0
"""Rows of the results: where they come from, how they are found, what the tables make of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import rows
from benchmarks.accuracy.table import load_rows, selection_name, tables
from benchmarks.rows import Rows, append, grouped, key_of, load


@pytest.fixture(autouse=True)
def forgets_the_commit() -> Iterator[None]:
    rows.commit.cache_clear()
    yield
    rows.commit.cache_clear()


def test_a_row_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KCACHE_COMMIT", "1234567")
    row = rows.origin("torch")
    assert row.keys() == {"gpu", "torch", "commit", "date"}
    assert (row["torch"], row["commit"]) == (torch.__version__, "1234567")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"])
    assert torch.cuda.is_available() or row["gpu"] == "none"
    monkeypatch.delenv("KCACHE_COMMIT")
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    rows.commit.cache_clear()
    assert rows.commit() == "unknown"


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("benchmarks/engine/decode.py", "benchmarks.engine.decode"),
        ("benchmarks/study/__main__.py", "benchmarks.study"),
    ],
)
def test_the_command_can_be_given_again(
    path: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [str(rows.ROOT / path), "--rule", '{"level": 1}'])
    assert rows.command() == f"python -m {module} --rule '{{\"level\": 1}}'"


def test_rows_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "folder/rows.jsonl"
    key = key_of({"a": 1, "b": [2]})
    assert key == key_of({"b": [2], "a": 1})
    assert key != key_of({"a": 1, "b": [3]})
    kept = Rows(path)
    assert key not in kept
    kept.add({"key": key, "kl": 0.123456789, "error": float("nan"), "list": [1.00000001]})
    assert key in kept
    assert key in Rows(path)
    append(path, {"key": "other", "ms": 0.123456789, "error": float("nan")})
    assert load(path) == [
        {"key": key, "kl": 0.123457, "error": None, "list": [1.0]},
        {"key": "other", "ms": 0.123456789, "error": None},
    ]


def test_grouped_by_values_of_row_engine_and_setting() -> None:
    stock = {"engine": {"dtype": "float32"}, "kcache": None, "length": 1}
    ours = {"engine": {"dtype": "float32"}, "kcache": {"dense_layers": 2}, "length": 1}
    assert grouped([stock, ours, stock], "length", "dtype", "dense_layers") == {
        (1, "float32", None): [stock, stock],
        (1, "float32", 2): [ours],
    }
    assert grouped([{"engine": "stock", "kcache": None}], "engine") != {}


def forced_row(setting: dict[str, Any] | None, dtype: str = "float32", **more: Any) -> Any:
    """A row of the sweep, stock's where the setting is None."""
    start = {"v_block_tokens": 8, "dense_layers": 0}
    row = {
        "kind": "forced", "model": "model", "device": "GPU", "engine": {"dtype": dtype},
        "commit": "abc", "length": 2048,
        "kcache": None if setting is None else {**start, **setting},
        "items": 4, "forced": 10, "perplexity": 10.0 if setting is None else 10.1,
        "perplexity_change": 0.01, "perplexity_change_error": 0.002, "kl": 0.01, "kl_error": 0.001,
        "kl_p99": 0.1, "top1_agreement": 0.98, "selected_tokens": 400.0,
        "dropped_mass": [0.01, 0.02],
    }  # fmt: skip
    return {**row, **more}


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({}, "default"),
        ({"coverage": 0.97, "top_n": "all"}, "coverage .97"),
        ({"coverage": 0.9, "top_n": 64, "head_combine": "max"},
         "coverage .9, at most 512 tokens, combine max"),
        ({"mass_threshold": 0.003}, "threshold .003"),
        ({"top_n": "all"}, "everything"),
        ({"top_n": 4, "sink_tokens": 8, "tail": "drop"}, "32 tokens, sink 8, tail drop"),
    ],
)  # fmt: skip
def test_names_of_selections(setting: dict[str, Any], name: str) -> None:
    assert selection_name({"v_block_tokens": 8, "dense_layers": 0, **setting}) == name


def test_the_last_of_equal_rows_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    others = [forced_row({}, length=4096), forced_row({}, device="x"), forced_row({}, "bfloat16")]
    skipped = {"key": "x", "kcache": {}, "kind": "forced", "skipped": "too small"}
    written = [forced_row({}, kl=1.0), skipped, *others, forced_row({}, kl=0.5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    found = load_rows(path)
    assert len(found) == 4
    assert [row["kl"] for row in found if row not in others] == [0.5]


def test_tables_of_forced_text() -> None:
    other_engine = {"v_block_tokens": 16, "dense_layers": 1, "coverage": 0.9}
    text = tables(
        [
            forced_row(None),
            forced_row({"top_n": "all"}, perplexity_change=-1e-9, kl=0.0),
            forced_row({"coverage": 0.9}, selected_tokens=300.4, kl=0.0123, kl_error=None),
            forced_row(other_engine),
        ]
    )
    assert text.startswith("### model, float32\n\nGPU, 4 texts; commit abc.\n")
    assert text.count("| stock | all | 10.0000 |  |  |  |  |  |") == 2
    first, second = text.split("**2048 tokens of context, V blocks of ")[1:]
    assert first.startswith("8**")
    assert second.startswith("16, 1 dense layer**")
    assert "| coverage .9 | 300 | 10.1000 | +1.00% ± 0.20% | 0.01230 ± - |" in first
    assert "| +0.00% ± 0.20% | 0.00000 ± 0.00100 |" in first
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {9}


def test_an_fp8_cache_stands_beside_stock() -> None:
    """In every table, with its own figures; it is not what the others are compared with."""
    fp8 = forced_row(None, kl=0.0169, perplexity=10.2)
    fp8["engine"]["kv_cache_dtype"] = "fp8"
    del fp8["selected_tokens"], fp8["dropped_mass"]
    codes = forced_row({"k_bits": 4, "host_dtype": "int8"}, kl=0.0012)
    text = tables([fp8, codes, forced_row(None)])
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert lines == [
        "| stock | all | 10.0000 |  |  |  |  |  |",
        (
            "| stock, fp8 cache | all | 10.2000 | +1.00% ± 0.20% | 0.01690 ± 0.00100 | 0.1000 | "
            "98.00% |  |"
        ),
        (
            "| default, k_bits 4, host_dtype int8 | 400 | 10.1000 | +1.00% ± 0.20% | "
            "0.00120 ± 0.00100 | 0.1000 | 98.00% | 0.010 to 0.020 |"
        ),
    ]


def test_rows_of_stock_with_two_caches_are_both_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    fp8 = forced_row(None)
    fp8["engine"]["kv_cache_dtype"] = "fp8"
    path.write_text("".join(json.dumps(row) + "\n" for row in (forced_row(None), fp8)))
    assert len(load_rows(path)) == 2
