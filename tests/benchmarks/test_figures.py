# SPDX-License-Identifier: Apache-2.0
"""Which rows the figures show, and that they are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import figures
from benchmarks.figures import crossover, decode_runs, family_of, is_line, throughput_panels
from benchmarks.rows import RESULTS, ROOT, load

FIXED, SUM, MAX, THRESHOLD = figures.FAMILIES


@pytest.mark.parametrize(
    ("setting", "family"),
    [
        ({}, THRESHOLD),
        ({"mass_threshold": 0.003}, THRESHOLD),
        ({"mass_threshold": 0.003, "tail": "renormalize"}, None),
        ({"coverage": 0.9, "head_combine": "sum"}, SUM),
        ({"coverage": 0.9, "head_combine": "max"}, MAX),
        ({"coverage": 0.9, "top_n": 8}, None),
        ({"coverage": 0.9, "dense_layers": 1}, None),
        ({"top_n": 4, "sink_tokens": 8, "recent_tokens": 1}, FIXED),
        ({"top_n": "all"}, None),
        ({"top_n": 8, "tail": "drop"}, None),
    ],
)
def test_families(setting: dict[str, Any], family: str | None) -> None:
    assert family_of({"v_block_tokens": 8, "dense_layers": 0, **setting}) == family


def decode_row(
    engine: str, context: int, requests: int, asked: int, rate: float, **more: Any
) -> Any:
    """A row of whole engines."""
    split = engine == "kcache"
    return {
        "gpu": "GPU", "commit": "abc", "command": "python -m benchmarks.engine.decode llama",
        "model": "llama", "label": "", "engine": engine, "kv_cache_dtype": "auto",
        "mode": "replay" if split else None, "kcache_config": {"coverage": 0.95} if split else None,
        "context": context, "requests_that_fit": 100 if asked else requests,
        "requests_asked": asked, "runs": [{"requests": requests, "tokens_per_second": rate}],
        **more,
    }  # fmt: skip


OURS = "kcache, coverage .95, recorded selections"


def decode_rows() -> list[dict[str, Any]]:
    rows = []
    for context, stock, ours in ((4096, 1000, 900), (16384, 400, 500)):
        rows += [
            decode_row("stock", context, 10, 0, stock), decode_row("kcache", context, 20, 0, ours),
            decode_row("stock", context, 1, 1, 100), decode_row("kcache", context, 1, 1, 90),
        ]  # fmt: skip
    return rows


def test_throughput_panels() -> None:
    """Not shown: what was measured again, in short, with drafts, on two GPUs, with other weights,
    or with one engine of a GPU."""
    rows = [decode_row("kcache", 4096, 20, 0, 1.0), *decode_rows()]
    rows += [decode_row("stock", 8192, 10, 0, 1.0, label="short")]
    rows += [decode_row("stock", 8192, 10, 0, 1.0, drafts=0)]
    rows += [decode_row("stock", 8192, 10, 0, 1.0, tensor_parallel_size=2)]
    rows += [decode_row("stock", 8192, 10, 0, 1.0, quantization="fp8")]
    rows += [decode_row("stock", 8192, 10, 0, 1.0, gpu="another")]
    # Newer, and of fewer requests: says nothing of as many as fit.
    rows += [decode_row("stock", 16384, 2, 2, 1.0, commit="new")]
    assert throughput_panels(decode_runs(rows, preset=False, full=True), "context") == {
        "llama, as many requests as fit\nGPU, commit abc": {
            "stock bf16": [(4096, 1000, 0), (16384, 400, 0)],
            OURS: [(4096, 900, 0), (16384, 500, 0)],
        }
    }
    capped = [*rows, decode_row("kcache", 8192, 20, 0, 700, requests_that_fit=40)]
    (title,) = throughput_panels(decode_runs(capped, preset=False, full=True), "context")
    assert title.startswith("llama, as many requests as fit, at most 20\n")
    by_requests = throughput_panels(decode_runs(rows[:-1], preset=False), "requests")
    assert len(by_requests) == 2
    curves = by_requests["llama, 4096 tokens of context\nGPU, commit abc"]
    assert curves["stock bf16"] == [(1, 100, 0), (10, 1000, 0)]


def test_a_preset_has_a_figure_of_its_own() -> None:
    """There "as many as fit" are those that were asked for, where they fit."""
    more = {"command": "python -m benchmarks.engine.decode --preset paper", "commit": "new"}
    rows = [decode_row("stock", 4096, 8, 8, 1.0, **more)]
    runs = decode_runs([*decode_rows(), *rows], preset=True)
    assert [(run["commit"], run["is_full"]) for run in runs] == [("new", True)]
    assert {run["commit"] for run in decode_runs([*decode_rows(), *rows], preset=False)} == {"abc"}


def test_a_line_joins_no_two_commits() -> None:
    old = [decode_row("kcache", 4096, n, n, 1.0, commit="old") for n in (1, 13, 14)]
    new = [decode_row("kcache", 4096, n, n, 2.0, commit="new") for n in (1, 14)]
    runs = decode_runs([*old, decode_row("stock", 4096, 13, 0, 3.0, commit="old"), *new], False)
    assert [(run["series"][:5], run["requests"], run["commit"]) for run in runs] == [
        ("stock", 13, "old"), ("kcach", 1, "new"), ("kcach", 14, "new")
    ]  # fmt: skip


def test_two_points_far_apart_are_no_line() -> None:
    lines = [[(8, 1, 0), (32, 2, 0)], [(1, 1, 0), (8, 2, 0), (64, 2, 0)], [(1, 1, 0), (32, 2, 0)]]
    assert [is_line(points) for points in lines] == [True, True, False]


def test_the_grid(tmp_path: Path) -> None:
    """A panel for each number of requests; all that fit may be what another was cut down to."""
    rows = [decode_row("stock", 4096, 1, 1, 100), decode_row("stock", 8192, 1, 1, 90)]
    rows += [decode_row("kcache", 4096, 1, 1, 95, kcache_config={"k_bits": 4})]
    rows += [decode_row("stock", 8192, 3, 4, 250, requests_that_fit=3)]
    rows = [{**row, "label": "grid"} for row in rows]
    assert figures.grid_panels(rows) == {
        "1 request": {
            "stock bf16": [(4096, 100, 0), (8192, 90, 0)], "kcache 4": [(4096, 95, 0)]
        },
        "all requests that fit": {"stock bf16": [(8192, 250, 0)]},
    }  # fmt: skip
    assert decode_runs(rows, preset=False) == []
    mpl = pytest.importorskip("matplotlib", reason="of the docs extra")
    mpl.use("Agg")
    figures.draw_grid(rows).savefig(tmp_path / "grid.svg")
    text = (tmp_path / "grid.svg").read_text()
    assert "<!-- llama, GPU, commit abc -->" in text
    assert "<!-- kcache 4 -->" in text


def test_crossover() -> None:
    stock = [(1.0, 100.0, 0.0), (16.0, 1600.0, 0.0)]
    assert crossover([(1, 50, 0), (16, 3200, 0)], stock) == pytest.approx(4)
    # Beyond what stock covers, and between its points.
    assert crossover([(4, 250, 0), (64, 16000, 0)], stock) == pytest.approx(10.24)
    assert crossover([(1, 110, 0), (16, 3200, 0)], stock) is None
    assert crossover([(32, 1, 0)], stock) is None


def test_committed_rows_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the documentation shows, and no others."""
    assert len(decode_runs(load(RESULTS / "decode.jsonl"), preset=False)) >= 4
    pytest.importorskip("matplotlib", reason="of the docs extra")
    monkeypatch.setattr("sys.argv", ["figures", "--figures", str(tmp_path)])
    figures.main()
    drawn = {path.name for path in tmp_path.iterdir() if path.stat().st_size > 5000}
    assert drawn == {path.name for path in (ROOT / "docs/figures").iterdir()}
