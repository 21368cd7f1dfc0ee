# SPDX-License-Identifier: Apache-2.0
"""Print the rows of `selection_study.py` as the tables of docs/selection.md.

    python -m benchmarks.selection_table

The last columns compare at equal bytes with the same context and block size of coverage, mean,
renormalize: its KL at the row's tokens, and its tokens at the row's KL, on straight lines between
its own rows on logarithmic axes (continued beyond the outermost two).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results/selection_study.jsonl"
BASE = "coverage, mean"
HEAD = (
    "| rule | level | tokens a head | new a step | dropped mass | KL | perplexity "
    "| KL of coverage there | passages won | tokens saved |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    rows = [json.loads(line) for line in parser.parse_args().results.read_text().splitlines()]
    groups = sorted({(row["rule"]["block_tokens"], row["context"]) for row in rows})
    for block_tokens, context in groups:
        chosen = [
            row
            for row in rows
            if (row["rule"]["block_tokens"], row["context"]) == (block_tokens, context)
        ]
        print(f"\n### {context} tokens, V blocks of {block_tokens}\n")
        print("\n".join(table(chosen)))


def table(rows: list[dict[str, Any]]) -> Iterable[str]:
    """Lines of Markdown for the rows of one context and block size."""
    base = sorted((row for row in rows if row["label"] == BASE), key=lambda row: row["tokens"])
    if len(base) < 2:
        raise ValueError(f"fewer than two rows of {BASE!r} to compare with")
    yield HEAD
    yield "|---" * (HEAD.count("|") - 1) + "|"
    for row in sorted(rows, key=lambda row: (row["label"] != BASE, row["label"], row["tokens"])):
        cells = [
            row["label"].replace("|", "\\|"),
            f"{row['rule']['level']:g}",
            f"{row['tokens']:.0f}",
            f"{row['fetched_tokens']:.1f}",
            f"{row['dropped_mass']:.3f}",
            f"{row['kl']:.5f} ± {row['kl_error']:.5f}",
            f"{row['perplexity_percent']:+.2f}% ± {row['perplexity_error_percent']:.2f}",
        ]
        yield "| " + " | ".join(cells + against(base, row)) + " |"


def against(base: Sequence[dict[str, Any]], row: dict[str, Any]) -> list[str]:
    """Cells that compare with the base rows at equal tokens and at equal KL."""
    if row["label"] == BASE:
        return ["", "", ""]
    curve = [(row["tokens"], row["kl"]) for row in base]
    there = interpolate(curve, row["tokens"])
    needed = interpolate(sorted((kl, tokens) for tokens, kl in curve), row["kl"])
    won = 0
    for number, passage in enumerate(row["passages"]):
        own = [(r["passages"][number]["tokens"], r["passages"][number]["kl"]) for r in base]
        won += passage["kl"] < interpolate(own, passage["tokens"])
    saved = 100 * (1 - row["tokens"] / needed)
    return [f"{there:.4f}", f"{won} of {len(row['passages'])}", f"{saved:.0f}%"]


def interpolate(curve: Sequence[tuple[float, float]], x: float) -> float:
    """y at x on the polygon through `curve`, ascending in x, both axes logarithmic."""
    points = [(math.log(a), math.log(b)) for a, b in curve]
    at = math.log(x)
    last = len(points) - 2
    first = next((i for i in range(last) if at < points[i + 1][0]), last)
    (x0, y0), (x1, y1) = points[first], points[first + 1]
    return math.exp(y0 + (at - x0) * (y1 - y0) / (x1 - x0))


if __name__ == "__main__":
    main()
