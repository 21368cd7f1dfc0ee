# SPDX-License-Identifier: Apache-2.0
"""Draws the figures of the documentation from the rows in benchmarks/results.

    make figures        # or: python -m benchmarks.figures [--results FOLDER] [--figures FOLDER]

Each figure is written as SVG and PNG. One that has no rows yet is left out, with a message.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.figures_rows import (
    FIXED,
    MAX,
    SUM,
    THRESHOLD,
    Curves,
    NoRowsError,
    accuracy_panels,
    crossover,
    decode_runs,
    hit_rate_panels,
    is_line,
    throughput_panels,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
FIGURES = ROOT / "docs/figures"
# Colours that colour-blind readers can tell apart (Okabe and Ito), and a marker for each.
STYLES = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"),
    ("#56B4E9", "P"), ("#000000", "X"),
)  # fmt: skip
_MOST_COLUMNS = 3


def draw_accuracy(value: str, label: str, log: bool) -> Callable[[Path], dict[str, Any]]:
    """A figure for each model: rows of panels for V blocks, columns for lengths."""

    def draw(results: Path) -> dict[str, Any]:
        import matplotlib.pyplot as plt

        figures = {}
        for title, panels in accuracy_panels(results / "accuracy.jsonl", value).items():
            blocks, lengths = (sorted({key[i] for key in panels}) for i in (0, 1))
            figure, axes = plt.subplots(
                len(blocks), len(lengths), sharex=True, sharey=True, squeeze=False,
                figsize=(1.4 + 3.2 * len(lengths), 1.2 + 2.5 * len(blocks)), layout="constrained",
            )  # fmt: skip
            for (i, block), (j, length) in itertools.product(enumerate(blocks), enumerate(lengths)):
                axis = axes[i][j]
                _curves(axis, panels.get((block, length), {}), order=(FIXED, SUM, MAX, THRESHOLD))
                axis.set_xscale("log", base=2)
                axis.xaxis.set_major_formatter("{x:.0f}")
                axis.set_title(f"{length} tokens, V blocks of {block}", fontsize=9)
                if log:
                    axis.set_yscale("log")
                else:
                    # Straight to 1%, then by decades.
                    axis.set_yscale("symlog", linthresh=0.01, linscale=1.5)
                    axis.yaxis.set_major_formatter(lambda y, _: f"{y:+.0%}" if y else "0")
                    axis.axhline(0, color="#888888", linewidth=0.8)
            _finish(figure, axes, title, "selected tokens of a KV head, mean", label)
            figures[_part_name(title, figures)] = figure
        return figures

    return draw


def _part_name(title: str, taken: Iterable[str]) -> str:
    """Name of one of several figures: the model, and what tells it from those before."""
    model, dtype, device = title.replace("\n", ", ").split(", ")[:3]
    names = [model, f"{model}-{dtype}", f"{model}-{dtype}-{device}".replace(" ", "-")]
    numbered = (f"{names[-1]}-{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain(names, numbered) if name not in taken)


def draw_throughput(
    against: str, label: str, preset: str | None = None
) -> Callable[[Path], dict[str, Any]]:
    """Panels side by side, the crossing of kcache over stock bf16 marked."""

    def draw(results: Path) -> dict[str, Any]:
        panels = throughput_panels(decode_runs(results / "decode.jsonl", preset), against)
        figure, axes = _grid(len(panels))
        order = sorted({name for curves in panels.values() for name in curves}, reverse=True)
        for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
            _curves(axis, curves, order)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.0f}")
            if against == "requests":
                axis.set_yscale("log", base=2)
                axis.yaxis.set_major_formatter("{x:.0f}")
            axis.set_title(title, fontsize=9)
            _mark_crossovers(axis, curves, order)
        _finish(figure, axes, "", label, "tokens per second")
        return {"": figure}

    return draw


def _mark_crossovers(axis: Any, curves: Curves, order: list[str]) -> None:
    stock = curves.get("stock bf16", [])
    height = 0.04
    if not is_line(stock):
        return
    for name in [n for n in order if n.startswith("kcache") and n in curves]:
        place = crossover(curves[name], stock) if is_line(curves[name]) else None
        if place is None:
            continue
        color = STYLES[order.index(name) % len(STYLES)][0]
        axis.axvline(place, color=color, linestyle=":", linewidth=1.2)
        axis.annotate(
            f" passes stock bf16 at {place:{'.2g' if place < 100 else '.0f'}}",
            (place, height), xycoords=("data", "axes fraction"), color=color, fontsize=8,
        )  # fmt: skip
        height += 0.07


def draw_hit_rate(results: Path) -> dict[str, Any]:
    """A panel for each rule of selection."""
    panels = hit_rate_panels(results / "hit_rate.jsonl")
    figure, axes = _grid(len(panels))
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        _curves(axis, curves, list(curves))
        axis.set_ylim(0, 1)
        axis.set_title(title, fontsize=9)
    _finish(figure, axes, "", "hot cache, in multiples of the mean selected set", "hit rate")
    return {"": figure}


def _grid(panels: int) -> tuple[Any, Any]:
    """A figure and its axes, at most three side by side; those left over are hidden."""
    import matplotlib.pyplot as plt

    columns = min(panels, _MOST_COLUMNS)
    rows = -(-panels // columns)
    size = (1.2 + 4.2 * columns, 0.8 + 3.4 * rows)
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=size, layout="constrained")
    for axis in axes.flat[panels:]:
        axis.set_visible(False)
    return figure, axes


def _curves(axis: Any, curves: Curves, order: Iterable[str]) -> None:
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


def _finish(figure: Any, axes: Any, title: str, x_label: str, y_label: str) -> None:
    """Labels, and one legend for all panels."""
    for column in axes.T:
        [axis for axis in column if axis.get_visible()][-1].set_xlabel(x_label)
    for axis in axes[:, 0]:
        axis.set_ylabel(y_label)
    if title:
        figure.suptitle(title, fontsize=10)
    entries = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    columns = max(1, int(figure.get_figwidth() / 3.2))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, fontsize=8,
        frameon=False,
    )  # fmt: skip


def all_figures() -> dict[str, Callable[[Path], dict[str, Any]]]:
    """Name of each figure, and what draws it from the folder of results."""
    from benchmarks.figures_data_flow import draw_data_flow

    return {
        "data_flow": lambda results: {"": draw_data_flow()},
        "kl": draw_accuracy("kl", "KL(stock || kcache), nats", log=True),
        "perplexity": draw_accuracy("perplexity_change", "change of perplexity", log=False),
        "throughput_context": draw_throughput("context", "tokens of context"),
        "throughput_batch": draw_throughput("requests", "requests"),
        "throughput_paper": draw_throughput("context", "tokens of context", preset="paper"),
        "hit_rate": draw_hit_rate,
    }


def draw_all(results: Path, folder: Path, wanted: list[str] | None = None) -> list[Path]:
    """Draw the figures that have rows; returns the files written."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.use("Agg")
    # The same rows give the same files.
    mpl.rcParams.update({"svg.hashsalt": "vllm-kcache", "font.size": 9})
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in all_figures().items():
        if wanted is not None and name not in wanted:
            continue
        try:
            figures = draw(results)
        except NoRowsError as reason:
            print(f"{name}: left out, {reason}")
            continue
        for part, figure in figures.items():
            stem = f"{name}-{part}" if part else name
            figure.savefig(folder / f"{stem}.svg", metadata={"Date": None})
            figure.savefig(folder / f"{stem}.png", dpi=150)
            plt.close(figure)
            written += [folder / f"{stem}.svg", folder / f"{stem}.png"]
            print(f"{name}: {folder / stem}.svg and .png")
    return written


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="figures to draw; all unless given")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder to write to")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(all_figures())
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(all_figures())}")
    draw_all(options.results, options.figures, options.names or None)


if __name__ == "__main__":
    main()
