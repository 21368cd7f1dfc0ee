# SPDX-License-Identifier: Apache-2.0
"""Draws docs/figures from the rows in benchmarks/results: `make figures`.

Of rows that say the same thing twice the last one counts; engines are compared on one kind of GPU
only, and a line joins no two states of the code.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.table import load_rows
from benchmarks.engine.grid import ENGINES, REQUESTS, Grid, rows_of_one
from benchmarks.rows import RESULTS, ROOT, Row, grouped, load

# Colours that colour-blind readers can tell apart (Okabe and Ito), and a marker for each.
STYLES = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"),
    ("#56B4E9", "P"), ("#000000", "X"),
)  # fmt: skip
FAMILIES = ("fixed N", "coverage, mean of the heads", "coverage, every head",
            "mass threshold, clipped tail")  # fmt: skip
Point = tuple[float, float, float]
Curves = dict[str, list[Point]]


def family_of(setting: Row) -> str | None:
    """The curve that a setting belongs to; None for those that change something else, too."""
    rest = {k: v for k, v in setting.items() if k != "v_block_tokens" and (k, v) not in [
        ("dense_layers", 0), ("head_combine", "sum"), ("top_n", "all")]}  # fmt: skip
    if "top_n" in rest and rest.keys() <= {"top_n", "sink_tokens", "recent_tokens"}:
        return FAMILIES[0]  # a small number has no room for the default's sink and recent tokens
    if rest.keys() == {"coverage"}:
        return FAMILIES[1]
    if rest.keys() == {"coverage", "head_combine"}:
        return FAMILIES[2]
    is_all = setting.get("top_n") == "all" and not rest
    return FAMILIES[3] if rest.keys() <= {"mass_threshold"} and not is_all else None


def draw_accuracy(value: str, label: str) -> dict[str, Any]:
    """A figure for each device: rows of panels for V blocks, columns for lengths."""
    import matplotlib.pyplot as plt

    figures = {}
    rows = [row for row in load_rows(RESULTS / "accuracy.jsonl") if row["kcache"] is not None]
    for (model, dtype, device, items), group in grouped(
        rows, "model", "dtype", "device", "items"
    ).items():
        panels: dict[tuple[int, int], Curves] = {}
        for key, of_panel in grouped(group, "v_block_tokens", "length").items():
            curves: Curves = {}
            for row in of_panel:
                family = family_of(row["kcache"])
                # Where all is selected there is nothing to see.
                if family is not None and row["selected_tokens"] < row["length"]:
                    point = row["selected_tokens"], row[value], row[f"{value}_error"] or 0.0
                    curves.setdefault(family, []).append(point)
            if any(len(points) > 1 for points in curves.values()):  # points alone: see the table
                panels[key] = {name: sorted(points) for name, points in curves.items()}
        if not panels:
            continue
        sizes, lengths = (sorted({key[i] for key in panels}) for i in (0, 1))
        figure, axes = plt.subplots(
            len(sizes), len(lengths), sharex=True, sharey=True, squeeze=False,
            figsize=(1.4 + 3.2 * len(lengths), 1.2 + 2.5 * len(sizes)), layout="constrained",
        )  # fmt: skip
        for (i, size), (j, length) in itertools.product(enumerate(sizes), enumerate(lengths)):
            axis = axes[i][j]
            draw_curves(axis, panels.get((size, length), {}), FAMILIES)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.set_title(f"{length} tokens, V blocks of {size}", fontsize=9)
            if value == "kl":
                axis.set_yscale("log")
            else:
                axis.set_yscale("symlog", linthresh=0.01, linscale=1.5)  # straight to 1%
                axis.yaxis.set_major_formatter(lambda y, _: f"{y:+.0%}" if y else "0")
                axis.axhline(0, color="#888888", linewidth=0.8)
        figure.suptitle(f"{model}, {dtype}\n{device}, {items} texts", fontsize=10)
        finish(figure, axes, "selected tokens of a KV head, mean", label)
        name = "CPU" if device.startswith("CPU") else device.split()[1]
        figures[f"{value.split('_')[0]}-{model}-{name}"] = figure
    return figures


def series_of(row: Row) -> str:
    """The curve of a row of whole engines."""
    dtype = {"auto": "bf16"}.get(row["kv_cache_dtype"], row["kv_cache_dtype"])
    if row["engine"] == "stock":
        return f"stock {dtype}"
    settings, parts = row["kcache_config"], [f"kcache {dtype}".removesuffix(" bf16")]
    if settings.get("k_bits") == 4:
        parts.append(f"K codes, host {settings['host_memory_gib']:g} GiB")
    parts += [
        f"{name} {settings[name]:g}".replace("_", " ").replace("0.", ".")
        for name in ("mass_threshold", "coverage")
        if name in settings
    ]
    if "top_n" in settings:
        parts.append(f"{settings['top_n']} V blocks")
    if row.get("mode") == "replay":
        parts.append("recorded selections")
    elif "top_n" in settings:
        parts.append("random")
    return ", ".join(parts)


def decode_runs(rows: list[Row], preset: bool, full: bool = False) -> list[Row]:
    """Runs of whole engines, of the paper's preset or of none; an engine's last commit counts.

    Args:
        full: Only those of as many requests as fit, or are let in.
    """
    runs: list[Row] = []
    for row in rows:
        # Label "short" is of make bench-gpu: one repeat; "grid" has a figure of its own. With
        # drafts, also 0 of them (by vLLM's first runner), on several GPUs, and with other weights
        # another step is timed.
        if row["label"] in ("short", "grid") or row.get("drafts") is not None:
            continue
        if row.get("tensor_parallel_size", 1) > 1 or row.get("quantization"):
            continue
        if ("--preset" in row["command"]) != preset:
            continue
        for run in row["runs"]:
            fit, asked = row["requests_that_fit"], row.get("requests_asked", run["requests"])
            about = {name: row[name] for name in ("model", "gpu", "context", "commit")}
            runs.append({
                **about, "series": series_of(row), "requests": run["requests"],
                # A preset asks for one number of requests, or as many of it as fit.
                "is_full": preset or asked == 0 or run["requests"] == fit,
                "is_capped": run["requests"] < fit,
                "tokens_per_second": run["tokens_per_second"],
            })  # fmt: skip
    runs = [run for run in runs if run["is_full"] or not full]
    names = ("model", "gpu", "series", "context")
    newest = {key: group[-1]["commit"] for key, group in grouped(runs, *names).items()}
    last = {}
    for run in runs:
        if run["commit"] == newest[tuple(run[name] for name in names)]:
            last[tuple(v for k, v in run.items() if k != "tokens_per_second")] = run
    return list(last.values())


def throughput_panels(runs: list[Row], against: str) -> dict[str, Curves]:
    """Tokens per second against "context" (as many requests as fit) or "requests"."""
    panels: dict[str, Curves] = {}
    by_context = against == "context"
    names = ("model", "gpu") if by_context else ("model", "gpu", "context")
    for (model, gpu, *context), group in sorted(grouped(runs, *names).items()):
        capped = max((run["requests"] for run in group if run["is_capped"]), default=0)
        most = f", at most {capped}" if capped else ""
        fit = f"as many requests as fit{most}"
        where = f"{context[0]} tokens of context" if context else fit
        curves: Curves = {}
        for (series,), of_series in grouped(group, "series").items():
            points = {run[against]: run["tokens_per_second"] for run in of_series}
            curves[series] = [(x, y, 0.0) for x, y in sorted(points.items())]
        if {"stock ", "kcache"} <= {name[:6] for name, line in curves.items() if len(line) > 1}:
            commits = ", ".join(dict.fromkeys(run["commit"] for run in group))
            panels[f"{model}, {where}\n{gpu}, commit {commits}"] = curves
    return panels


def draw_throughput(against: str, label: str, preset: bool = False) -> Any:
    """Panels side by side, the crossing of kcache over stock bf16 marked."""
    runs = decode_runs(load(RESULTS / "decode.jsonl"), preset, full=against == "context")
    panels = throughput_panels(runs, against)
    order = sorted({name for curves in panels.values() for name in curves}, reverse=True)
    figure, axes = grid(len(panels))
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        draw_throughput_panel(axis, title, curves, order)
        height = 0.04
        for name in order:
            stock, ours = curves.get("stock bf16", []), curves.get(name, [])
            place = crossover(ours, stock) if is_line(stock) and is_line(ours) else None
            if name.startswith("kcache") and place is not None:
                color = STYLES[order.index(name) % len(STYLES)][0]
                axis.axvline(place, color=color, linestyle=":", linewidth=1.2)
                axis.annotate(
                    f" passes stock bf16 at {place:{'.2g' if place < 100 else '.0f'}}",
                    (place, height), xycoords=("data", "axes fraction"), color=color, fontsize=8,
                )  # fmt: skip
                height += 0.07
    finish(figure, axes, label, "tokens per second")
    return figure


def draw_throughput_panel(axis: Any, title: str, curves: Curves, order: Any) -> None:
    """Curves over powers of two."""
    draw_curves(axis, curves, order)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:.0f}")
    axis.set_title(title, fontsize=9)


def grid_panels(rows: list[Row]) -> dict[str, Curves]:
    """Tokens per second against the context, a panel for each number of requests: one commit, GPU
    and model (engine/grid.py)."""
    cells = Grid(rows)
    panels: dict[str, Curves] = {}
    for asked in REQUESTS:
        curves: Curves = {}
        for engine in ENGINES:
            for context in cells.contexts:
                run = cells.run(engine, context, asked)
                if run is not None:
                    point = float(context), run["tokens_per_second"], 0.0
                    curves.setdefault(engine, []).append(point)
        name = {0: "all requests that fit", 1: "1 request"}.get(asked, f"{asked} requests")
        panels[name] = curves
    return {name: curves for name, curves in panels.items() if curves}


def draw_grid(rows: list[Row]) -> Any:
    """The grid of engine/grid.py."""
    panels = grid_panels(rows)
    figure, axes = grid(len(panels))
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        draw_throughput_panel(axis, title, curves, ENGINES)
    first = rows[0]
    figure.suptitle(f"{first['model']}, {first['gpu']}, commit {first['commit']}", fontsize=10)
    finish(figure, axes, "tokens of context", "tokens per second")
    return figure


def is_line(points: list[Point]) -> bool:
    """Whether to join the points: of two alone, far apart, nobody knows what lies between."""
    return len(points) != 2 or points[1][0] <= 4 * points[0][0]


def crossover(ours: list[Point], stock: list[Point]) -> float | None:
    """Where ours goes past stock, within what both cover; None if it does not.

    Between two points both are taken as straight in the logarithms.
    """
    if not ours or not stock:
        return None
    first, last = max(ours[0][0], stock[0][0]), min(ours[-1][0], stock[-1][0])
    places = sorted({x for x, _, _ in ours + stock if first <= x <= last})
    ratios = [(math.log(x), log_at(ours, x) - log_at(stock, x)) for x in places]
    for (x, low), (next_x, high) in itertools.pairwise(ratios):
        if low <= 0 < high:
            return math.exp(x + (next_x - x) * -low / (high - low))
    return None


def log_at(points: list[Point], place: float) -> float:
    """Logarithm of a curve between its points."""
    xs, ys = ([math.log(point[i]) for point in points] for i in (0, 1))
    return float(np.interp(math.log(place), xs, ys))


def draw_hit_rate() -> Any:
    """A panel for each rule of selection, a curve for each number of requests."""
    names = ("gpu", "coverage", "mass_threshold", "context", "requests", "multiple_of_selected_set")
    last = [rows[-1] for rows in grouped(load(RESULTS / "hit_rate.jsonl"), *names).values()]
    panels = grouped(last, "gpu", "coverage", "mass_threshold", "context")
    figure, axes = grid(len(panels))
    for axis, ((gpu, coverage, threshold, context), rows) in zip(
        axes.flat, panels.items(), strict=False
    ):
        rule = f"coverage {coverage:g}" if threshold is None else f"mass threshold {threshold:g}"
        curves: Curves = {}
        for (count,), of_count in grouped(rows, "requests").items():
            points = sorted((row["slots_over_selected"], row["hit_rate"], 0.0) for row in of_count)
            curves[f"{count} request{'s' if count != 1 else ''}"] = points
        draw_curves(axis, curves, tuple(curves))
        axis.set_ylim(0, 1)
        title = f"{rule}, {context} tokens of context\n{gpu}".replace("0.", ".", 1)
        axis.set_title(title, fontsize=9)
    finish(figure, axes, "hot cache, in multiples of the mean selected set", "hit rate")
    return figure


def grid(panels: int) -> tuple[Any, Any]:
    """A figure and its axes, at most three side by side; those left over are hidden."""
    import matplotlib.pyplot as plt

    columns = min(panels, 3)
    rows = -(-panels // columns)
    size = (1.2 + 4.2 * columns, 0.8 + 3.4 * rows)
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=size, layout="constrained")
    for axis in axes.flat[panels:]:
        axis.set_visible(False)
    return figure, axes


def draw_curves(axis: Any, curves: Curves, order: Any) -> None:
    """Each in the style of its place in `order`."""
    for (color, marker), name in zip(itertools.cycle(STYLES), order, strict=False):
        if name in curves:
            x, y, errors = zip(*curves[name], strict=True)
            axis.errorbar(
                x, y, yerr=errors if any(errors) else None, color=color, marker=marker,
                markersize=4, linewidth=1.3, linestyle="-" if is_line(curves[name]) else "none",
                elinewidth=0.8, capsize=2, label=name,
            )  # fmt: skip
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def finish(figure: Any, axes: Any, x_label: str, y_label: str) -> None:
    """Labels, and one legend for all panels."""
    for column in axes.T:
        [axis for axis in column if axis.get_visible()][-1].set_xlabel(x_label)
    for axis in axes[:, 0]:
        axis.set_ylabel(y_label)
    entries: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", fontsize=8, frameon=False,
        ncols=max(1, int(figure.get_figwidth() / 3.2)),
    )  # fmt: skip


# A decode step with K codes: what lies in which memory, and what crosses the link. Nothing in it is
# measured.
# Boxes: left, bottom, width, height, colour, colour of the edge, text.
_BLUE, _RED, _GREY = "#0072B2", "#D55E00", "#777777"
AREAS = (
    (0.2, 2.15, 11.6, 4.25, "#E3EEF7", "GPU memory (HBM)", "left"),
    (0.2, 1.45, 11.6, 0.55, "#F0F0F0", "PCIe", "right"),
    (0.2, 0.2, 11.6, 1.1, "#FBEFE3", "host memory (pinned)", "right"),
)
STORES = (
    (2.0, 2.45, 2.4, 0.95, "K codes, 4 bits\nof every K, paged by vLLM"),
    (7.0, 2.45, 2.6, 0.95, "hot cache: copies of rows,\nthe newest always"),
    (4.0, 0.32, 5.6, 0.72, "host pool: rows of K and V of every page, complete"),
)
STEPS = (
    (0.5, "1. write", "K and V of\nthe new token"),
    (2.75, "2. score", "estimates of QK\nfrom every code"),
    (5.0, "3. select", "V blocks that\nhold the mass"),
    (7.25, "4. fetch", "rows that are\nnot resident"),
    (9.5, "5. attend", "softmax and PV with\ntrue K and V"),
)
# From, to, colour, text and its place.
ARROWS: tuple[tuple[Any, ...], ...] = (
    ((3.625, 6.2), (3.625, 5.7), _GREY), ((10.375, 6.2), (10.375, 5.7), _GREY),
    ((4.5, 5.225), (5.0, 5.225), "#222222"), ((6.75, 5.225), (7.25, 5.225), "#222222"),
    ((9.0, 5.225), (9.5, 5.225), "#222222"),
    ((1.9, 4.75), (2.6, 3.4), _BLUE, "code of K", (1.15, 3.6)),
    ((3.4, 3.4), (3.625, 4.75), _BLUE, "every code,\nat HBM speed", (3.6, 3.9)),
    ((0.9, 0.68), (4.0, 0.68), _RED, "K and V of the\nnew token", (1.0, 1.52)),
    ((7.6, 1.04), (7.6, 2.45), _RED,
     "misses only: whole rows,\nread by a kernel", (7.7, 1.52)),
    ((8.0, 4.75), (8.0, 3.4), _BLUE, "look up", (8.08, 3.95)),
    ((9.3, 3.4), (10.6, 4.75), _BLUE, "selected rows", (10.15, 3.9)),
)  # fmt: skip


def draw_data_flow() -> Any:
    """The figure of a decode step."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    figure = plt.figure(figsize=(10.2, 5.61))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 12), ylim=(0, 6.6))
    axis.set_axis_off()

    def box(x: float, y: float, wide: float, high: float, color: str, edge: str = "none") -> None:
        style = {"boxstyle": "round,pad=0,rounding_size=0.08", "linewidth": 1}
        axis.add_patch(FancyBboxPatch((x, y), wide, high, facecolor=color, edgecolor=edge, **style))

    for x, y, wide, high, color, name, side in AREAS:
        box(x, y, wide, high, color)
        place = x + 0.15 if side == "left" else x + wide - 0.15
        axis.text(place, y + high - 0.14, name, va="top", ha=side, fontsize=9, color="#444444")
    middle = {"ha": "center", "va": "center"}
    for x, y, wide, high, text in STORES:
        box(x, y, wide, high, "#FFFFFF", "#555555")
        axis.text(x + wide / 2, y + high / 2, text, fontsize=9, **middle)
    for x, name, text in STEPS:
        box(x, 4.75, 1.75, 0.95, _BLUE)
        white = {"color": "white", **middle}
        axis.text(x + 0.875, 5.5, name, weight="bold", fontsize=9.5, **white)
        axis.text(x + 0.875, 5.11, text, fontsize=7.5, **white)
    axis.text(4.505, 6.03, "new query", ha="center", fontsize=8)
    axis.text(4.75, 4.53, "mass of\neach block", ha="center", va="top", fontsize=7.5)
    axis.text(7.0, 4.53, "lists of\nblocks", ha="center", va="top", fontsize=7.5)
    axis.plot([3.625, 10.375], [6.2, 6.2], color=_GREY, linewidth=1.2)
    axis.plot([0.9, 0.9], [4.75, 0.68], color=_RED, linewidth=1.5)
    for start, end, color, *text in ARROWS:
        style = {"arrowstyle": "-|>", "color": color, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", xy=end, xytext=start, arrowprops=style)
        if text:
            axis.text(*text[1], text[0], fontsize=7.5, color="#333333", va="bottom")
    return figure


def main() -> None:
    """Draw all of them; the same rows give the same files."""
    import matplotlib as mpl

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figures", type=Path, default=ROOT / "docs/figures", help="folder")
    folder = parser.parse_args().figures
    folder.mkdir(parents=True, exist_ok=True)
    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "vllm-kcache", "font.size": 9})
    figures = {
        "data_flow": draw_data_flow(),
        **draw_accuracy("kl", "KL(stock || kcache), nats"),
        **draw_accuracy("perplexity_change", "change of perplexity"),
        "throughput_context": draw_throughput("context", "tokens of context"),
        "throughput_batch": draw_throughput("requests", "requests"),
        "throughput_paper": draw_throughput("context", "tokens of context", preset=True),
        "hit_rate": draw_hit_rate(),
    }
    decode_rows = load(RESULTS / "decode.jsonl")
    if any(row["label"] == "grid" for row in decode_rows):
        figures["throughput_grid"] = draw_grid(rows_of_one(decode_rows, "grid"))
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        print(folder / f"{name}.svg")


if __name__ == "__main__":
    main()
