# SPDX-License-Identifier: Apache-2.0
"""Which rows of benchmarks/results the figures of the documentation show.

Of rows that say the same thing twice the last one counts; engines are compared on one kind of GPU
only.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.accuracy_table import Row, grouped, load_rows

FIXED, SUM, MAX = "fixed N", "coverage, mean of the heads", "coverage, every head"
THRESHOLD = "mass threshold, clipped tail"
# What one line is drawn of, at one context.
_ENGINE = ("machine", "series", "context")
_FAR_APART = 4
Point = tuple[float, float, float]
Curves = dict[str, list[Point]]


class NoRowsError(Exception):
    """There is nothing to draw; says why."""


def read_jsonl(path: Path) -> list[Row]:
    """Rows of a file.

    Raises:
        NoRowsError: there is no file, or nothing in it.
    """
    if not path.exists():
        raise NoRowsError(f"there is no {path}")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if not rows:
        raise NoRowsError(f"{path} is empty")
    return rows


def selection_family(setting: Row) -> str | None:
    """The curve that a setting belongs to; None for those that change something else, too."""
    rest = {k: v for k, v in setting.items() if k not in ("v_block_tokens", "dense_layers")}
    if setting.get("dense_layers"):
        return None
    # Nothing is the default.
    if not rest or rest.keys() == {"mass_threshold"}:
        return THRESHOLD
    if rest.keys() == {"coverage"}:
        return SUM
    if rest.keys() == {"coverage", "head_combine"}:
        return MAX if rest["head_combine"] == "max" else SUM
    # A small number has no room for the sink and recent tokens of the default.
    is_fixed = rest.keys() <= {"top_n", "sink_tokens", "recent_tokens"} and "top_n" in rest
    return FIXED if is_fixed and rest["top_n"] != "all" else None


def accuracy_panels(path: Path, value: str) -> dict[str, dict[tuple[int, int], Curves]]:
    """Curves of the sweep: by title, then by (V block, length).

    Args:
        path: rows of the accuracy benchmark.
        value: "kl" or "perplexity_change"; `value`_error is its error.

    Raises:
        NoRowsError: no forced text was measured.
    """
    if not path.exists():
        raise NoRowsError(f"there is no {path}")
    forced = [row for row in load_rows(path) if row["kind"] == "forced" and row["kcache"]]
    panels: dict[str, dict[tuple[int, int], Curves]] = {}
    for key, group in grouped(forced, "model", "dtype", "device", "items").items():
        model, dtype, device, items = key
        title = f"{model}, {dtype}\n{device}, {items} texts"
        for (tokens, length), rows in grouped(group, "v_block_tokens", "length").items():
            curves: Curves = {}
            for row in rows:
                family = selection_family(row["kcache"])
                # Where all is selected there is nothing to see.
                if family is not None and row["selected_tokens"] < length:
                    error = row[f"{value}_error"] or 0.0
                    curves.setdefault(family, []).append(
                        (row["selected_tokens"], row[value], error)
                    )
            # Points alone are for a table.
            if any(len(points) > 1 for points in curves.values()):
                sizes = panels.setdefault(title, {})
                sizes[tokens, length] = {name: sorted(points) for name, points in curves.items()}
    if not panels:
        raise NoRowsError(f"{path} has no rows of forced text")
    return panels


def decode_runs(path: Path, preset: str | None = None) -> list[Row]:
    """Runs of whole engines: one each, with its context and the number of requests.

    Of an engine's runs at one context those of the last commit count: a line joins no two states
    of the code.

    Args:
        path: rows of the decode benchmark.
        preset: only runs of this preset; without, only runs of none.

    Raises:
        NoRowsError: see `read_jsonl`.
    """
    runs: list[Row] = []
    for row in read_jsonl(path):
        if row["label"] == "short":  # of make bench-gpu: one repeat
            continue
        if preset_of(row["command"]) != preset:
            continue
        for run in row["runs"]:
            asked = row.get("requests_asked", run["requests"])
            found = {
                "machine": (row["model"], row["gpu"]),
                "series": engine_name(row),
                "context": row["context"],
                "requests": run["requests"],
                # A preset asks for one number of requests, or as many of it as fit.
                "is_full": preset is not None
                or asked == 0
                or run["requests"] == row["requests_that_fit"],
                "is_capped": run["requests"] < row["requests_that_fit"],
                "tokens_per_second": run["tokens_per_second"],
                "commit": row["commit"],
            }
            runs.append(found)
    newest = {tuple(run[n] for n in _ENGINE): run["commit"] for run in runs}
    runs = [run for run in runs if run["commit"] == newest[tuple(run[n] for n in _ENGINE)]]
    names = (*_ENGINE, "requests", "is_full")
    return list({tuple(run[n] for n in names): run for run in runs}.values())


def preset_of(command: str) -> str | None:
    """The preset that a command of the decode benchmark names, or None."""
    found = re.search(r" --preset[ =](\S+)", command)
    return found.group(1) if found else None


def engine_name(row: Row) -> str:
    """The curve of a decode row."""
    dtype = {"auto": "bf16"}.get(row["kv_cache_dtype"], row["kv_cache_dtype"])
    if row["engine"] == "stock":
        return f"stock {dtype}"
    settings = row["kcache_config"]
    coverage, top_n = settings.get("coverage"), settings.get("top_n")
    threshold = settings.get("mass_threshold")
    parts = [f"kcache {dtype}"] if dtype != "bf16" else ["kcache"]
    if threshold is not None:
        parts.append(f"mass threshold {threshold:g}".replace("0.", "."))
    if coverage is not None:
        parts.append(f"coverage {coverage:g}".replace("0.", "."))
    if top_n is not None:
        parts.append(f"{top_n} V blocks")
    if row.get("mode") == "replay":
        parts.append("recorded selections")
    elif top_n is not None:
        parts.append("random")
    return ", ".join(parts)


def throughput_panels(runs: list[Row], against: str) -> dict[str, Curves]:
    """Tokens per second against "context" (as many requests as fit) or "requests".

    Raises:
        NoRowsError: nowhere are there two points of stock and two of the split cache.
    """
    panels: dict[str, Curves] = {}
    by_context = against == "context"
    chosen = [run for run in runs if run["is_full"] or not by_context]
    names = ("machine",) if by_context else ("machine", "context")
    for key, group in sorted(_grouped(chosen, names).items()):
        model, gpu = key[0]
        capped = max((run["requests"] for run in group if run["is_capped"]), default=0)
        most = f", at most {capped}" if capped else ""
        where = f"as many requests as fit{most}" if by_context else f"{key[1]} tokens of context"
        curves = {
            series: sorted((r[against], r["tokens_per_second"], 0.0) for r in rows)
            for (series,), rows in _grouped(group, ("series",)).items()
        }
        curves = {series: _distinct(points) for series, points in curves.items()}
        long = {series[:6] for series, points in curves.items() if len(points) > 1}
        if {"stock ", "kcache"} <= long:
            commits = ", ".join(dict.fromkeys(run["commit"] for run in group))
            panels[f"{model}, {where}\n{gpu}, commit {commits}"] = curves
    if not panels:
        what = "contexts" if by_context else "numbers of requests"
        raise NoRowsError(f"there are no two {what} of stock and of kcache on one GPU")
    return panels


def _grouped(rows: Iterable[Row], names: tuple[str, ...]) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def _distinct(points: list[Point]) -> list[Point]:
    """One point for each x: what fits may be what was asked for, too."""
    return list({x: (x, y, error) for x, y, error in points}.values())


def is_line(points: list[Point]) -> bool:
    """Whether enough was measured to join the points: of two alone, far apart, nobody knows what
    lies between them."""
    return len(points) != 2 or points[1][0] <= _FAR_APART * points[0][0]


def crossover(ours: list[Point], stock: list[Point]) -> float | None:
    """Where ours goes past stock, within what both cover; None if it does not.

    Between two points both are taken as straight in the logarithms.
    """
    if not ours or not stock:
        return None
    first, last = max(ours[0][0], stock[0][0]), min(ours[-1][0], stock[-1][0])
    places = sorted({x for x, _, _ in ours + stock if first <= x <= last})
    ratios = [(math.log(x), _log_at(ours, x) - _log_at(stock, x)) for x in places]
    for (x, low), (next_x, high) in itertools.pairwise(ratios):
        if low <= 0 < high:
            return math.exp(x + (next_x - x) * -low / (high - low))
    return None


def _log_at(points: list[Point], place: float) -> float:
    """Logarithm of a curve between its points."""
    for (x, y, _), (next_x, next_y, _) in itertools.pairwise(points):
        if x <= place <= next_x:
            share = math.log(place / x) / math.log(next_x / x)
            return math.log(y) + share * math.log(next_y / y)
    return math.log(points[0][1])


def hit_rate_panels(path: Path) -> dict[str, Curves]:
    """Hit rate against slots over the mean selected set, a curve for each number of requests.

    Raises:
        NoRowsError: see `read_jsonl`.
    """
    panels: dict[str, Curves] = {}
    names = ("gpu", "coverage", "mass_threshold", "context", "requests", "multiple_of_selected_set")
    last = {tuple(row.get(name) for name in names): row for row in read_jsonl(path)}
    for (gpu, coverage, threshold, context, requests, _), row in last.items():
        rule = f"coverage {coverage:g}" if threshold is None else f"mass threshold {threshold:g}"
        title = f"{rule}, {context} tokens of context\n{gpu}".replace("0.", ".", 1)
        name = f"{requests} request{'s' if requests != 1 else ''}"
        point = (row["slots_over_selected"], row["hit_rate"], 0.0)
        panels.setdefault(title, {}).setdefault(name, []).append(point)
    return {t: {n: sorted(p) for n, p in curves.items()} for t, curves in panels.items()}
