# SPDX-License-Identifier: Apache-2.0
"""The grid of contexts and requests: what is still to be measured of it, and its table.

    python -m benchmarks.engine.decode --preset grid benchmarks/shapes/llama-3-8b
        --host-memory-gib 112 --seconds 450      # again and again: each call goes on
    python -m benchmarks.engine.grid             # the table; the figure: make figures

A call leaves out the cells whose rows are there, of the same commit, GPU and settings, and begins
none after --seconds. So the grid may be spread over machines of one kind that go away at any time:
carry the file of --results along.

The table is of one commit, GPU and model, by default those of the last row. A number of requests
that an engine does not hold says how many it does, a cell without a row says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, Row, commit, device, load

# 128K of positions are the model's; so many leave room for the tokens that are made.
CONTEXTS = (2048, 4224, 8192, 16384, 32768, 65536, 130000)
# 0: all that fit.
REQUESTS = (1, 4, 16, 64, 0)
ENGINES = ("stock bf16", "stock fp8", "kcache 16", "kcache 4")
# What a row shares with others of its engine.
ENGINE_KEYS = (
    "gpu", "commit", "model", "utilization", "label", "engine", "kv_cache_dtype", "drafts",
    "quantization", "tensor_parallel_size", "mode", "kcache_config", "max_model_len",
    "max_num_batched_tokens",
)  # fmt: skip
# Least ratios of tokens per second that are aimed at: to stock bf16, and to stock fp8 from so many
# requests of so long a context up, and elsewhere.
OVER_BF16, OVER_FP8, OVER_FP8_ELSEWHERE, MANY, LONG = 0.97, 1.0, 0.95, 8, 8192


def counts(requests: Iterable[int], most: int) -> dict[int, int]:
    """Numbers of requests as asked, and as they are run; none is run twice."""
    found: dict[int, int] = {}
    for asked in requests:
        count = min(asked or most, most)
        if count and count not in found.values():
            found[asked] = count
    return found


def ran(rows: list[Row], engine: Row) -> tuple[dict[int, set[int]], dict[int, int]]:
    """By context, the numbers of requests that were run and what fits.

    Args:
        engine: What rows of the engine say of it, the `ENGINE_KEYS`.
    """
    numbers: dict[int, set[int]] = {}
    fits: dict[int, int] = {}
    for row in rows:
        if all(row.get(key) == engine[key] for key in ENGINE_KEYS):
            fits[row["context"]] = row["requests_that_fit"]
            of_context = numbers.setdefault(row["context"], set())
            of_context.update(run["requests"] for run in row["runs"])
    return numbers, fits


def contexts_left(
    rows: list[Row], engine: Row, contexts: Iterable[int], requests: Iterable[int], most: int
) -> list[int]:
    """Contexts of which an engine has numbers of requests to run, at most so many at once."""
    numbers, fits = ran(rows, engine)
    left = []
    for context in contexts:
        # What fits is known from the first row on.
        wanted = counts(requests, min(fits.get(context, most), most)).values()
        if context not in fits or set(wanted) - numbers[context]:
            left.append(context)
    return left


def what_is_left(options: dict[str, Any], max_model_len: int, path: Path) -> dict[str, Any]:
    """What changes in the options of an engine, so that it runs the cells that have no row.

    Args:
        options: See `decode_engine.measure`.
        max_model_len: Of the whole grid: whatever is left, the engine is the same.
        path: The file of rows.
    """
    split, contexts = options["engine"] == "kcache", options["contexts"]
    if split and options["mode"] == "replay":
        # What is shorter cannot be played.
        contexts = [context for context in contexts if context >= shortest_replay()]
    engine = {
        **options,
        "gpu": "none" if device().startswith("CPU") else device(),
        "commit": commit(),
        "model": Path(options["model"]).name,
        "mode": options["mode"] if split else None,
        "kcache_config": options["kcache_config"] if split else None,
        "max_model_len": max_model_len,
    }
    rows = load(path)
    numbers, _ = ran(rows, engine)
    return {
        "contexts": contexts_left(
            rows, engine, contexts, options["requests"], options["max_requests"]
        ),
        "ran": {str(context): sorted(of_context) for context, of_context in numbers.items()},
        "max_model_len": max_model_len,
    }


def engine_of(row: Row) -> str:
    """The column of a row."""
    if row["engine"] == "kcache":
        return f"kcache {row['kcache_config'].get('k_bits', 16)}"
    return f"stock {'bf16' if row['kv_cache_dtype'] == 'auto' else row['kv_cache_dtype']}"


class Grid:
    """Rows of one commit, GPU and model, by cell.

    Args:
        rows: The last one of a cell counts.
        shortest: Tokens of a context that a replay needs at least; kcache has no row below.

    Attributes:
        contexts: Those of the preset and of the rows.
        runs: By engine, context and number of requests as run.
        fits: Requests that fit, by engine and context; and the most that were asked for.
    """

    def __init__(self, rows: list[Row], shortest: int = 0) -> None:
        self.shortest = shortest
        self.runs: dict[tuple[str, int, int], Row] = {}
        self.fits: dict[tuple[str, int], int] = {}
        self.most: dict[tuple[str, int], int] = {}
        for row in rows:
            place = engine_of(row), row["context"]
            self.fits[place] = row["requests_that_fit"]
            for run in row["runs"]:
                self.runs[(*place, run["requests"])] = run
                if row["requests_asked"] == 0:
                    self.most[place] = run["requests"]
        self.contexts = sorted({*CONTEXTS, *(context for _, context in self.fits)})

    def run(self, engine: str, context: int, asked: int) -> Row | None:
        """The run of a cell; None where there is none."""
        place = engine, context
        if asked:
            return self.runs.get((*place, asked))
        # All that fit may be what another number was cut down to.
        count = self.most.get(place, self.fits.get(place, 0))
        return self.runs.get((*place, count))

    def cell(self, engine: str, context: int, asked: int) -> str:
        """Step and tokens per second of a cell, or why it has none."""
        run, fits = self.run(engine, context, asked), self.fits.get((engine, context))
        if run is not None:
            text = f"{run['step_ms']:.2f}, {run['tokens_per_second']:.0f}"
            if asked:
                return text
            of = f" of {fits}" if run["requests"] != fits else ""
            return f"{run['requests']}{of}: {text}"
        if engine.startswith("kcache") and context < self.shortest:
            return "no replay"
        if asked and fits is not None and fits < asked:
            return f"{fits} fit"
        return "missing"

    def ratio(self, engine: str, other: str, context: int, asked: int) -> float | None:
        """Tokens per second to another engine's; None where one has no run."""
        ours, theirs = (self.run(name, context, asked) for name in (engine, other))
        if ours is None or theirs is None:
            return None
        return ours["tokens_per_second"] / theirs["tokens_per_second"]

    def missing(self) -> list[str]:
        """Cells that have no row and could have one."""
        return [
            f"{engine}, {asked or 'all'} x {context}"
            for engine in ENGINES
            for context in self.contexts
            for asked in REQUESTS
            if self.cell(engine, context, asked) == "missing"
        ]

    def table(self) -> str:
        """Markdown. Ratios below what is aimed at are bold."""
        head = ["context", "requests", *ENGINES[:2]]
        for name in ENGINES[2:]:
            head += [name, "over bf16", "over fp8"]
        lines = [head, ["---"] * len(head)]
        for context in self.contexts:
            for asked in REQUESTS:
                cells = [str(context), str(asked or "all that fit")]
                cells += [self.cell(name, context, asked) for name in ENGINES[:2]]
                for name in ENGINES[2:]:
                    cells.append(self.cell(name, context, asked))
                    cells += [self._ratio(name, other, context, asked) for other in ENGINES[:2]]
                lines.append(cells)
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _ratio(self, engine: str, other: str, context: int, asked: int) -> str:
        ratio = self.ratio(engine, other, context, asked)
        if ratio is None:
            return "-"
        least = OVER_BF16
        if other == "stock fp8":
            run = self.run(engine, context, asked)
            assert run is not None
            heavy = run["requests"] >= MANY and context >= LONG
            least = OVER_FP8 if heavy else OVER_FP8_ELSEWHERE
        return f"{ratio:.2f}x" if ratio >= least else f"**{ratio:.2f}x**"


def rows_of_one(rows: list[Row], label: str, **wanted: str | None) -> list[Row]:
    """Rows of that label and of one commit, GPU and model: those wanted, else the last row's.

    Raises:
        ValueError: There is none.
    """
    rows = [row for row in rows if row["label"] == label and not row.get("drafts")]
    for name in ("model", "commit", "gpu"):
        if rows:
            value = wanted.get(name) or rows[-1][name]
            rows = [row for row in rows if row[name] == value]
    if not rows:
        raise ValueError(f"no row has the label {label!r} and {wanted}")
    return rows


def main() -> None:
    """Print the table; what is missing goes to stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "decode.jsonl", help="rows")
    parser.add_argument("--label", default="grid", help="of the rows")
    for name in ("model", "commit", "gpu"):
        parser.add_argument(f"--{name}", help="else that of the last row")
    options = parser.parse_args()
    wanted: dict[str, Any] = {name: getattr(options, name) for name in ("model", "commit", "gpu")}
    rows = rows_of_one(load(options.results), options.label, **wanted)
    grid = Grid(rows, shortest_replay())
    first = rows[0]
    print(
        f"{first['model']} shape, {first['gpu']}, commit {first['commit']}: ms a step, tokens/s\n"
    )
    print(grid.table())
    missing = grid.missing()
    print(f"{len(missing)} cells are missing: {'; '.join(missing) or 'none'}", file=sys.stderr)


def shortest_replay() -> int:
    """Tokens of the shortest request that a replay of the default selection can be played to."""
    from benchmarks.replay.record import RECORDINGS, V_BLOCK_TOKENS, Recording
    from vllm_kcache.config import KCacheConfig

    return Recording.load(
        RECORDINGS[KCacheConfig().selection(V_BLOCK_TOKENS).combine]
    ).shortest_tokens


if __name__ == "__main__":
    main()
