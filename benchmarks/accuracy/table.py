# SPDX-License-Identifier: Apache-2.0
"""Markdown tables of the accuracy benchmark's rows, for docs/accuracy.md.

Of rows that say the same thing twice, as after a change of the code, the last one counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from benchmarks.rows import Row, grouped, load

# What only a new engine can change has its own table.
_START = ("v_block_tokens", "dense_layers")


def load_rows(path: Path) -> list[Row]:
    """Rows of forced text, in the order of the file; the last of those that are equal.

    Raises:
        SystemExit: there is no such file.
    """
    if not path.exists():
        raise SystemExit(f"{path}: no such file; `python -m benchmarks.accuracy sweep` makes it")
    # Rows of another kind are of the tasks as they were up to commit fc9b94c.
    rows = [row for row in load(path) if row.get("kind") == "forced" and "length" in row]
    last = {_identity(row): row for row in rows}
    return list(last.values())


def _identity(row: Row) -> str:
    """What a row is about, whatever the code and the versions were."""
    names = ("model", "device", "texts", "items", "forced", "length", "kcache")
    engine = {name: row["engine"].get(name) for name in ("dtype", "kv_cache_dtype")}
    about = {name: row.get(name) for name in names} | engine
    return json.dumps(about, sort_keys=True)


def stock_name(row: Row) -> str:
    """What a row of stock is called."""
    dtype = row["engine"].get("kv_cache_dtype")
    return f"stock, {dtype} cache" if dtype else "stock"


def selection_name(setting: Row | None) -> str:
    """A setting in words, without what the table's heading says."""
    if setting is None:
        return "stock"
    rest = {name: value for name, value in setting.items() if name not in _START}
    coverage, top_n = rest.pop("coverage", None), rest.pop("top_n", None)
    threshold = rest.pop("mass_threshold", None)
    if coverage is not None or threshold is not None:
        name, value = ("coverage", coverage) if threshold is None else ("threshold", threshold)
        parts = [f"{name} {value:g}".replace("0.", ".", 1)]
        if top_n not in (None, "all"):
            parts.append(f"at most {top_n * setting['v_block_tokens']} tokens")
    elif top_n == "all":
        parts = ["everything"]
    elif top_n is not None:
        parts = [f"{top_n * setting['v_block_tokens']} tokens"]
    else:
        parts = ["default"]
    words = {"head_combine": "combine", "sink_tokens": "sink", "recent_tokens": "recent"}
    parts += [f"{words.get(name, name)} {value}" for name, value in rest.items()]
    return ", ".join(parts)


def tables(rows: list[Row]) -> str:
    """All tables, under a heading for each model, dtype and device."""
    parts = []
    for key, group in grouped(rows, "model", "dtype", "device", "items").items():
        model, dtype, device, items = key
        commits = ", ".join(dict.fromkeys(row["commit"] for row in group))
        parts.append(f"### {model}, {dtype}\n\n{device}, {items} texts; commit {commits}.\n")
        parts += _forced_tables(group)
    return "\n".join(parts)


def _with_stock(group: list[Row]) -> Iterable[tuple[str, list[Row], list[Row]]]:
    """Heading, rows of stock over the same texts, and others by length, V block, dense layers."""
    for (length, _), of_length in grouped(group, "length", "texts").items():
        of_stock = sorted((row for row in of_length if row["kcache"] is None), key=stock_name)
        others = [row for row in of_length if row["kcache"] is not None]
        for (tokens, layers), rows in grouped(others, *_START).items():
            heading = f"{length} tokens of context, V blocks of {tokens}"
            if layers:
                heading += f", {layers} dense layer{'s' if layers != 1 else ''}"
            yield heading, of_stock, rows


def _table(heading: str, columns: list[str], lines: list[list[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return f"**{heading}**\n\n" + "\n".join("| " + " | ".join(r) + " |" for r in rows) + "\n"


def _forced_tables(group: list[Row]) -> list[str]:
    columns = ["selection", "tokens a head", "perplexity", "change", "KL, nats", "KL, 99%",
               "same first token", "dropped mass"]  # fmt: skip
    parts = []
    for heading, of_stock, rows in _with_stock(group):
        lines = []
        for row in [*of_stock, *rows]:
            name = stock_name(row) if row["kcache"] is None else selection_name(row["kcache"])
            if name == "stock":
                lines.append([name, "all", f"{row['perplexity']:.4f}", *[""] * 5])
                continue
            is_split = row["kcache"] is not None
            lines.append(
                [
                    name,
                    f"{row['selected_tokens']:.0f}" if is_split else "all",
                    f"{row['perplexity']:.4f}",
                    _with_error(row, "perplexity_change", "+.2%", ".2%"),
                    f"{row['kl']:.5f} ± {_number(row['kl_error'], '.5f')}",
                    f"{row['kl_p99']:.4f}",
                    f"{row['top1_agreement']:.2%}",
                    "{:.3f} to {:.3f}".format(*row["dropped_mass"]) if is_split else "",
                ]
            )
        parts.append(_table(heading, columns, lines))
    return parts


def _with_error(figures: Row, name: str, value_format: str, error_format: str) -> str:
    error = _number(figures[f"{name}_error"], error_format)
    value = f"{figures[name]:{value_format}}"
    # What rounds to nothing has no sign.
    return f"{value if value.strip('+-0.%') else value.replace('-', '+')} ± {error}"


def _number(value: float | None, number_format: str) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:{number_format}}"
