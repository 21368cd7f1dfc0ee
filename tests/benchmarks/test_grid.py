# SPDX-License-Identifier: Apache-2.0
"""The grid of contexts and requests: what a call leaves out, and the table of all of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import decode, grid
from benchmarks.engine.grid import Grid, counts, rows_of_one
from benchmarks.rows import append, load

# Requests that fit, as a fake engine says, by engine and context.
FITS = {"stock": {4224: 40, 8192: 3}, "kcache": {4224: 90, 8192: 9}}


def test_none_is_run_twice() -> None:
    assert counts([1, 4, 16, 64, 0], 6) == {1: 1, 4: 4, 16: 6}
    assert counts([1, 0], 40) == {1: 1, 0: 40}
    assert counts([1], 0) == {}


class Machine:
    """Stands for processes of engines: makes rows, and goes away after some of them."""

    def __init__(self) -> None:
        self.left = sys.maxsize
        self.started: list[str] = []
        self.ran: list[tuple[str, int, int]] = []

    def run(self, options: dict[str, Any], table: Any) -> None:
        """In place of `decode.run_in_process`."""
        options = json.loads(json.dumps(options))
        name = options["engine"]
        self.started.append(name)
        split = name == "kcache"
        for context in options["contexts"]:
            fits = FITS[name][context]
            most = min(fits, options["max_requests"])
            for asked, count in counts(options["requests"], most).items():
                if count in options.get("ran", {}).get(str(context), []):
                    continue
                if self.left == 0:
                    raise KeyboardInterrupt
                self.left -= 1
                self.ran.append((name, context, count))
                row = {key: options.get(key) for key in grid.ENGINE_KEYS} | {
                    "gpu": "GPU", "commit": "abc", "model": Path(options["model"]).name,
                    "mode": options["mode"] if split else None,
                    "kcache_config": options["kcache_config"] if split else None,
                    "context": context, "requests_that_fit": fits, "requests_asked": asked,
                    "num_blocks": 1,
                    "runs": [
                        {
                            "requests": count, "step_ms": 5.0, "tokens_per_second": 200.0 * count,
                            "mean_selected_tokens": 1, "hit_rate": 1.0,
                        }
                    ],
                }  # fmt: skip
                table.add(row)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """One call of the benchmark on a machine."""
    monkeypatch.setattr(grid, "device", lambda: "GPU")
    monkeypatch.setattr(grid, "commit", lambda: "abc")

    def of(machine: Machine, *more: str) -> None:
        monkeypatch.setattr(decode, "run_in_process", machine.run)
        arguments = [
            "decode", "--preset", "grid", "shapes/llama", "--context", "2048", "4224", "8192",
            "--engines", "stock", "kcache-4", "--results", str(tmp_path / "rows.jsonl"), *more,
        ]  # fmt: skip
        if "--context" in more:
            del arguments[4:8]
        monkeypatch.setattr(sys, "argv", arguments)
        decode.main()

    return of


def test_a_call_goes_on_where_the_last_one_was_cut(
    call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each cell once, whenever the machine goes away; and no engine without a cell."""
    monkeypatch.setitem(FITS["stock"], 2048, 80)
    machine = Machine()
    for cells in (1, 4, 7, 3):
        machine.left = cells
        with pytest.raises(KeyboardInterrupt):
            call(machine)
    machine.left = sys.maxsize
    call(machine)
    assert len(machine.ran) == len(set(machine.ran))
    cells = {(name, context): [] for name, context, _ in machine.ran}  # type: ignore[var-annotated]
    for name, context, count in machine.ran:
        cells[name, context].append(count)
    assert cells == {
        ("stock", 2048): [1, 4, 16, 64, 80],
        ("stock", 4224): [1, 4, 16, 40],
        ("stock", 8192): [1, 3],
        # A replay needs more than 2048 tokens.
        ("kcache", 4224): [1, 4, 16, 64, 90],
        ("kcache", 8192): [1, 4, 9],
    }
    rows = load(tmp_path / "rows.jsonl")
    # The engine is that of the whole grid, whichever contexts are left.
    assert {row["max_model_len"] for row in rows} == {8192 + 48 + 16}
    before = list(machine.started)
    call(machine)
    assert machine.started == before
    # With another setting, or of another commit, nothing is there.
    call(machine, "--utilization", "0.8")
    assert machine.started == [*before, "stock", "kcache"]
    call(machine, "--max-num-batched-tokens", "4096")
    monkeypatch.setattr(grid, "commit", lambda: "def")
    call(machine)
    assert machine.started == [*before, *["stock", "kcache"] * 3]


def test_no_engine_is_started_when_time_is_over(call: Any) -> None:
    machine = Machine()
    call(machine, "--seconds", "0")
    assert machine.started == []


def row_of(engine: str, context: int, asked: int, count: int, fits: int, rate: float) -> Any:
    """A row of one run."""
    name, _, variant = engine.partition(" ")
    return {
        "model": "llama", "gpu": "GPU", "commit": "abc", "label": "grid", "engine": name,
        "kv_cache_dtype": "fp8" if variant == "fp8" else "auto",
        "kcache_config": {"k_bits": int(variant)} if name == "kcache" else None,
        "context": context, "requests_asked": asked, "requests_that_fit": fits,
        "runs": [{"requests": count, "step_ms": 1e3 * count / rate, "tokens_per_second": rate}],
    }  # fmt: skip


def test_table() -> None:
    rows = [
        row_of("stock bf16", 8192, 1, 1, 6, 100),
        row_of("stock bf16", 8192, 16, 6, 6, 300),
        row_of("stock fp8", 8192, 1, 1, 40, 96),
        row_of("stock fp8", 8192, 16, 16, 40, 500),
        row_of("stock fp8", 8192, 0, 40, 40, 800),
        row_of("kcache 4", 8192, 1, 1, 70, 50),
        row_of("kcache 4", 8192, 1, 1, 70, 95),
        row_of("kcache 4", 8192, 16, 16, 70, 490),
        row_of("kcache 4", 8192, 64, 64, 70, 1500),
        row_of("kcache 4", 8192, 0, 66, 70, 1600),
    ]
    other = {"gpu": "another", "commit": "old"}
    chosen = rows_of_one([*({**row, **other} for row in rows), *rows], "grid")
    assert chosen == rows
    table = Grid(chosen, shortest=4168)
    lines = {tuple(line.split(" | ")[:2]): line for line in table.table().splitlines()}
    missing = "missing | - | -"
    # The last row of a cell counts; below the ratios that are aimed at it is bold.
    assert lines["| 8192", "1"] == (
        f"| 8192 | 1 | 10.00, 100 | 10.42, 96 | {missing} | 10.53, 95 | **0.95x** | 0.99x |"
    )
    assert lines["| 8192", "4"] == f"| 8192 | 4 | missing | missing | {missing} | {missing} |"
    assert lines["| 8192", "16"] == (
        f"| 8192 | 16 | 6 fit | 32.00, 500 | {missing} | 32.65, 490 | - | **0.98x** |"
    )
    assert lines["| 8192", "64"] == (
        f"| 8192 | 64 | 6 fit | 40 fit | {missing} | 42.67, 1500 | - | - |"
    )
    # All that fit: the number that another was cut down to, too.
    assert lines["| 8192", "all that fit"] == (
        f"| 8192 | all that fit | 6: 20.00, 300 | 40: 50.00, 800 | {missing} | "
        "66 of 70: 41.25, 1600 | 5.33x | 2.00x |"
    )
    assert lines["| 2048", "1"].endswith("| missing | missing | no replay | - | - | "
                                         "no replay | - | - |")  # fmt: skip
    left = table.missing()
    assert "kcache 4, 4 x 8192" in left
    assert "kcache 16, all x 8192" in left
    assert not {"stock bf16, 16 x 8192", "kcache 4, 1 x 2048"} & set(left)
    # 7 contexts of 5 cells and 4 engines, without those of 2048 and 12 of 8192.
    assert len(left) == len(set(left)) == 7 * 5 * 4 - 2 * 5 - 12


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="no row has the label 'grid'"):
        rows_of_one([], "grid")


def test_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path = tmp_path / "rows.jsonl"
    append(path, row_of("stock bf16", 4224, 1, 1, 6, 100))
    monkeypatch.setattr(sys, "argv", ["grid", "--results", str(path)])
    grid.main()
    found = capsys.readouterr()
    assert found.out.startswith("llama shape, GPU, commit abc")
    assert "| 4224 | 1 | 10.00, 100 | missing |" in found.out
    assert "cells are missing: stock bf16, 1 x 2048" in found.err
