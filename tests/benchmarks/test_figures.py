# SPDX-License-Identifier: Apache-2.0
"""Which rows the figures show, and that they are drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import figures
from benchmarks.figures_rows import (
    FIXED,
    MAX,
    SUM,
    THRESHOLD,
    NoRowsError,
    accuracy_panels,
    crossover,
    decode_runs,
    hit_rate_panels,
    is_line,
    preset_of,
    read_jsonl,
    selection_family,
    throughput_panels,
)
from tests.benchmarks.result_rows import decode_row, forced_row, hit_row, task_row


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("setting", "family"),
    [
        ({"coverage": 0.9}, SUM),
        ({"coverage": 0.9, "head_combine": "sum"}, SUM),
        ({"coverage": 0.9, "head_combine": "max"}, MAX),
        ({"mass_threshold": 0.003}, THRESHOLD),
        ({"mass_threshold": 0.003, "tail": "renormalize"}, None),
        ({"top_n": 8}, FIXED),
        ({"top_n": 4, "sink_tokens": 8, "recent_tokens": 1}, FIXED),
        ({"top_n": "all"}, None),
        ({"top_n": 8, "tail": "drop"}, None),
        ({"coverage": 0.9, "top_n": 8}, None),
        ({"coverage": 0.9, "dense_layers": 1}, None),
    ],
)
def test_families(setting: dict[str, Any], family: str | None) -> None:
    assert selection_family({"v_block_tokens": 8, "dense_layers": 0, **setting}) == family


def accuracy_rows() -> list[dict[str, Any]]:
    rows = [forced_row(None), task_row({"coverage": 0.9}), forced_row({"top_n": "all"})]
    for length in (2048, 4096):
        rows += [
            forced_row({"coverage": 0.95}, length=length, selected_tokens=700.0, kl=0.002),
            forced_row({"coverage": 0.9}, length=length, selected_tokens=500.0),
            forced_row({"coverage": 0.9, "head_combine": "max"}, length=length, kl=0.005),
            forced_row({"top_n": 64}, length=length, selected_tokens=512.0),
            # Everything is selected.
            forced_row({"top_n": 1024}, length=length, selected_tokens=float(length), kl=0.0),
        ]
    return rows


def test_accuracy_panels(tmp_path: Path) -> None:
    path = write(tmp_path / "accuracy.jsonl", accuracy_rows())
    panels = accuracy_panels(path, "kl")
    assert list(panels) == ["model, float32\nGPU, 4 texts"]
    assert set(panels["model, float32\nGPU, 4 texts"]) == {(8, 2048), (8, 4096)}
    curves = panels["model, float32\nGPU, 4 texts"][8, 4096]
    assert curves == {
        SUM: [(500.0, 0.01, 0.001), (700.0, 0.002, 0.001)],
        MAX: [(400.0, 0.005, 0.001)],
        FIXED: [(512.0, 0.01, 0.001)],
    }
    with pytest.raises(NoRowsError, match="no rows of forced text"):
        accuracy_panels(write(path, [task_row({"coverage": 0.9})]), "kl")
    with pytest.raises(NoRowsError, match="there is no"):
        accuracy_panels(tmp_path / "missing", "kl")


def decode_rows() -> list[dict[str, Any]]:
    rows = []
    for context, stock, ours in ((4096, 1000, 900), (16384, 400, 500), (32768, 200, 400)):
        rows += [
            decode_row("stock", context, 10, 0, stock),
            decode_row("stock-fp8", context, 20, 0, 1.6 * stock),
            decode_row("kcache", context, 20, 0, ours),
            decode_row("stock", context, 1, 1, 100),
            decode_row("kcache", context, 1, 1, 90),
        ]
    return rows


def test_throughput_panels(tmp_path: Path) -> None:
    rows = [decode_row("kcache", 4096, 20, 0, 1.0), *decode_rows()]
    rows += [decode_row("stock", 8192, 10, 0, 1.0, label="short")]
    rows += [decode_row("stock", 8192, 10, 0, 1.0, gpu="another")]
    runs = decode_runs(write(tmp_path / "decode.jsonl", rows))
    panels = throughput_panels(runs, "context")
    assert panels == {
        "llama, as many requests as fit\nGPU, commit abc": {
            "stock bf16": [(4096, 1000, 0), (16384, 400, 0), (32768, 200, 0)],
            "stock fp8": [(4096, 1600, 0), (16384, 640, 0), (32768, 320, 0)],
            "kcache, coverage .95, recorded selections": [
                (4096, 900, 0), (16384, 500, 0), (32768, 400, 0)
            ],
        }
    }  # fmt: skip
    # Where more would have fit, the title says so.
    more = [decode_row("kcache", 8192, 20, 0, 700, requests_that_fit=40)]
    capped = throughput_panels(decode_runs(write(tmp_path / "more.jsonl", rows + more)), "context")
    assert list(capped) == ["llama, as many requests as fit, at most 20\nGPU, commit abc"]
    by_requests = throughput_panels(runs, "requests")
    assert len(by_requests) == 3
    curves = by_requests["llama, 4096 tokens of context\nGPU, commit abc"]
    assert curves["stock bf16"] == [(1, 100, 0), (10, 1000, 0)]
    with pytest.raises(NoRowsError, match="no two contexts"):
        throughput_panels(runs[:5], "context")


def test_rows_of_several_runs_are_read(tmp_path: Path) -> None:
    """As the first version of benchmarks/decode wrote them."""
    row = decode_row("kcache", 4096, 20, 0, 1.0, requests_that_fit=20, kcache_config={"top_n": 16})
    del row["requests_asked"], row["mode"]
    row["runs"].append({"requests": 1, "tokens_per_second": 2.0})
    full, one = decode_runs(write(tmp_path / "decode.jsonl", [row]))
    assert (full["requests"], full["is_full"], full["tokens_per_second"]) == (20, True, 1.0)
    assert (one["requests"], one["is_full"]) == (1, False)
    assert one["series"] == "kcache, 16 V blocks, random"


def test_a_preset_has_a_figure_of_its_own(tmp_path: Path) -> None:
    of_preset = {"command": "python -m benchmarks.decode --preset paper", "commit": "new"}
    rows = [
        decode_row(series, context, fit, 8, tokens_per_second, requests_that_fit=20, **of_preset)
        for series, context, fit, tokens_per_second in (
            ("stock", 4096, 8, 1.0), ("stock", 16384, 6, 2.0),
            ("kcache", 4096, 8, 3.0), ("kcache", 16384, 8, 4.0),
        )
    ]  # fmt: skip
    path = write(tmp_path / "decode.jsonl", [*decode_rows(), *rows])
    assert {run["commit"] for run in decode_runs(path)} == {"abc"}
    (panel,) = throughput_panels(decode_runs(path, "paper"), "context").items()
    assert panel == (
        "llama, as many requests as fit, at most 8\nGPU, commit new",
        {
            "stock bf16": [(4096, 1.0, 0), (16384, 2.0, 0)],
            "kcache, coverage .95, recorded selections": [(4096, 3.0, 0), (16384, 4.0, 0)],
        },
    )
    assert preset_of("python -m benchmarks.decode m --preset=paper --repeats 1") == "paper"
    assert preset_of("python -m benchmarks.decode presets/m") is None


def test_a_line_joins_no_two_commits(tmp_path: Path) -> None:
    old = [decode_row("kcache", 4096, n, n, 1.0, commit="old") for n in (1, 13, 14)]
    new = [decode_row("kcache", 4096, n, n, 2.0, commit="new") for n in (1, 14)]
    other = decode_row("stock", 4096, 13, 0, 3.0, commit="old")
    runs = decode_runs(write(tmp_path / "decode.jsonl", [*old, other, *new]))
    assert [(r["series"][:5], r["requests"], r["commit"]) for r in runs] == [
        ("stock", 13, "old"), ("kcach", 1, "new"), ("kcach", 14, "new")
    ]  # fmt: skip


def test_committed_rows_are_read() -> None:
    assert len(decode_runs(figures.RESULTS / "decode.jsonl")) >= 4


def test_two_points_far_apart_are_no_line() -> None:
    assert is_line([(8, 1, 0), (32, 2, 0)])
    assert not is_line([(1, 1, 0), (32, 2, 0)])
    assert is_line([(1, 1, 0), (8, 2, 0), (64, 2, 0)])
    assert is_line([(1, 1, 0)])


def test_crossover() -> None:
    stock = [(1.0, 100.0, 0.0), (16.0, 1600.0, 0.0)]
    assert crossover([(1, 50, 0), (16, 3200, 0)], stock) == pytest.approx(4)
    # Beyond what stock covers, and between its points.
    assert crossover([(4, 250, 0), (64, 16000, 0)], stock) == pytest.approx(10.24)
    assert crossover([(1, 110, 0), (16, 3200, 0)], stock) is None
    assert crossover([(1, 50, 0), (16, 1500, 0)], stock) is None
    assert crossover([(32, 1, 0)], stock) is None
    assert crossover([], stock) is None


def test_hit_rate_panels(tmp_path: Path) -> None:
    rows = [hit_row(1, 2.0, 0.5), hit_row(8, 2.0, 0.8), hit_row(1, 2.0, 0.9), hit_row(1, 1.0, 0.4)]
    panels = hit_rate_panels(write(tmp_path / "hit_rate.jsonl", rows))
    assert panels == {
        "coverage .95, 4096 tokens of context\nGPU": {
            "1 request": [(1.0, 0.4, 0.0), (2.0, 0.9, 0.0)],
            "8 requests": [(2.0, 0.8, 0.0)],
        }
    }


def test_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(NoRowsError, match="is empty"):
        read_jsonl(write(tmp_path / "rows.jsonl", []))


def test_figures_without_rows_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="of the docs extra")
    written = figures.draw_all(tmp_path, tmp_path / "out")
    assert [path.name for path in written] == ["data_flow.svg", "data_flow.png"]
    said = capsys.readouterr().out
    for name in set(figures.all_figures()) - {"data_flow"}:
        assert f"{name}: left out, there is no {tmp_path}" in said


def test_all_figures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="of the docs extra")
    write(tmp_path / "accuracy.jsonl", accuracy_rows())
    of_preset = {"command": "python -m benchmarks.decode --preset paper"}
    write(tmp_path / "decode.jsonl", [*decode_rows(), *({**r, **of_preset} for r in decode_rows())])
    write(tmp_path / "hit_rate.jsonl", [hit_row(1, m, 0.5 + m / 10) for m in (1.0, 2.0)])
    written = figures.draw_all(tmp_path, tmp_path / "one")
    names = {path.name for path in written if path.suffix == ".svg"}
    assert names == {
        "data_flow.svg", "kl-model.svg", "perplexity-model.svg", "throughput_context.svg",
        "throughput_batch.svg", "throughput_paper.svg", "hit_rate.svg",
    }  # fmt: skip
    assert all(path.stat().st_size > 5000 for path in written)
    # The same rows give the same files.
    again = figures.draw_all(tmp_path, tmp_path / "two")
    for one, two in zip(written, again, strict=True):
        assert one.read_bytes() == two.read_bytes()


def test_models_measured_twice_have_a_figure_each() -> None:
    taken: list[str] = []
    for device in ("GPU A", "GPU A", "CPU, B", "CPU, B"):
        taken.append(figures._part_name(f"model, float32\n{device}, 4 texts", taken))
    assert taken == ["model", "model-float32", "model-float32-CPU", "model-float32-CPU-2"]


def test_unknown_figures_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        figures.main(["kll"])
    assert "kll: choose from data_flow, kl" in capsys.readouterr().err
