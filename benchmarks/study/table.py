# SPDX-License-Identifier: Apache-2.0
"""The table of the study: every rule beside an fp8 cache, on all models and contexts at once."""

from __future__ import annotations

from benchmarks.rows import Row
from benchmarks.study.rules import Rule, Stock

# What a default may cost, nats a token.
MOST_KL = 0.004


def table(rows: list[Row]) -> str:
    """Markdown: a line for each rule, a column for each model and context with KL and tokens a
    head. The last row counts of those that say the same thing twice.

    The last column says at how many of the columns a rule was measured in, its KL is at most
    `MOST_KL` and below that of the fp8 cache there. Only rows of the last one's commit count.
    """
    rows = [row for row in rows if "model" in row]  # others are of the first study
    if not rows:
        return "no rows"
    last = rows[-1]["commit"]
    rows = [row for row in rows if row["commit"] == last]
    columns = sorted({_column(row) for row in rows}, key=lambda column: (column[0], column[1]))
    found = {(_rule(row), _column(row)): row for row in rows}
    models = ", ".join(dict.fromkeys(column[0] for column in columns))
    lines = [
        ["rule", *(f"{model} {context}" for model, context, _ in columns), "holds"],
        ["---"] * (len(columns) + 2),
    ]
    for rule in dict.fromkeys(rule for rule, _ in found):
        measured = [(column, found.get((rule, column))) for column in columns]
        cells = ["" if row is None else _cell(row) for _, row in measured]
        holds = [
            _holds(row, found.get((str(Stock()), column)))
            for column, row in measured
            if row is not None
        ]
        is_stock = rule == str(Stock())
        lines.append([rule, *cells, "" if is_stock else f"{sum(holds)} of {len(holds)}"])
    head = "KL in nats a token (tokens a head)"
    devices = "; ".join(dict.fromkeys(row["device"] for row in rows))
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{head}; {models}; {devices}; commit {last}\n\n{body}"


def _column(row: Row) -> tuple[str, int, int]:
    """Model, context and passages."""
    return row["model"], row["context"], len(row["passages"])


def _rule(row: Row) -> str:
    fields = row["rule"]
    return str(Stock(**fields) if "kv_cache_dtype" in fields else Rule(**fields))


def _cell(row: Row) -> str:
    return f"{row['kl']:.5f} ({row['tokens']:.0f})"


def _holds(row: Row, stock: Row | None) -> bool:
    return row["kl"] <= MOST_KL and (stock is None or row["kl"] < stock["kl"])
