# SPDX-License-Identifier: Apache-2.0
"""What the selection costs in accuracy, through the real vLLM engine, stock beside the split cache.

    python -m benchmarks.accuracy sweep MODEL --lengths 2048 4096 8000 --grid default
    python -m benchmarks.accuracy sweep MODEL --settings '[{"coverage": 0.97}, {"top_n": 32}]'
    python -m benchmarks.accuracy tasks MODEL --lengths 1024 2048 4096 8000 --items 20
    python -m benchmarks.accuracy table

`sweep` forces the tokens of real text one by one on the decode path. Stock vLLM runs first and its
logits are kept; each setting of the split cache is then compared with them at every position, over
the whole vocabulary: KL(stock || split), perplexity, and how often both put the same token first.
The tokens are the same at every length of context, and only prompts differ.

`tasks` makes tasks after RULER (needles, variables, common words), asks for records of a long text
as JSON, and continues plain text. Stock and each setting answer the same items: scores, their
paired difference, how many answers are the same token by token; and with the right answer forced,
its log-probability and the KL, which tell also where the model is too weak to answer.

Each engine runs in a process of its own, and is reconfigured between the settings that need no new
one; so it runs without CUDA graphs. Rows go to benchmarks/results/accuracy.jsonl as they are known.
A command that is repeated leaves out what it finds there: same settings, tokens, device, versions
and commit.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.accuracy_grid import GRIDS
from benchmarks.accuracy_rows import RESULTS


def parse_settings(given: list[str] | None) -> list[dict[str, Any]] | None:
    """Objects and lists of objects, in order.

    Raises:
        ValueError: something else.
    """
    if given is None:
        return None
    settings: list[dict[str, Any]] = []
    for text in given:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"--settings {text!r}: {error}") from None
        settings += value if isinstance(value, list) else [value]
    if not settings or not all(isinstance(setting, dict) for setting in settings):
        raise ValueError("--settings must be JSON objects, or lists of them")
    return settings


def _add_common(command: argparse.ArgumentParser, default_items: int, items: str) -> None:
    """Options of all commands that run engines."""
    command.add_argument("model", help="folder of a Hugging Face model")
    command.add_argument("--lengths", type=int, nargs="+", default=[2048], help="tokens of context")
    command.add_argument("--items", type=int, default=default_items, help=items)
    command.add_argument(
        "--settings", nargs="+", metavar="JSON", help="kcache_config of each setting, or a list"
    )
    command.add_argument("--block-size", type=int, help="tokens of a K page (GPU 16, CPU 32)")
    command.add_argument("--max-num-batched-tokens", type=int, help="(GPU 8192, CPU 2048)")
    command.add_argument("--gpu-memory-utilization", type=float, default=0.85)
    command.add_argument("--hot-cache-gib", type=float, help="hot V cache; large is fast")
    command.add_argument("--cpu-cache-gib", type=int, help="cache of the CPU engine (4)")
    command.add_argument("--results", type=Path, default=RESULTS)
    command.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()), help="where stock's logits go"
    )
    command.add_argument("--keep-work", action="store_true", help="keep them, for the next command")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; `settings` is a list of dicts or None."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sweep = commands.add_parser("sweep", help="perplexity and KL of many settings")
    _add_common(sweep, 64, "passages, half prose, half code")
    sweep.add_argument("--forced", type=int, default=160, help="tokens to force in each")
    sweep.add_argument("--grid", choices=GRIDS, default="default")
    sweep.add_argument("--v-blocks", type=int, nargs="+", help="V blocks of the grid, tokens")
    sweep.add_argument("--dense-layers", type=int, nargs="+", help="dense layers of the grid")
    sweep.add_argument("--dtype", help="(float32)")
    tasks = commands.add_parser("tasks", help="long-context tasks, extraction, continuation")
    _add_common(tasks, 20, "items of each task")
    tasks.add_argument("--records", type=int, default=4, help="records of an extraction")
    tasks.add_argument("--dtype", help="(GPU bfloat16, CPU float32)")
    table = commands.add_parser("table", help="Markdown tables of the rows that are there")
    table.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.command == "table":
        return options
    try:
        options.settings = parse_settings(options.settings)
    except ValueError as error:
        parser.error(str(error))
    counts = [options.items, min(options.lengths)]
    counts.append(options.forced if options.command == "sweep" else options.records)
    if min(counts) < 1:
        parser.error("--items, --lengths, --forced and --records must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    if options.command == "table":
        from benchmarks.accuracy_table import load_rows, tables

        print(tables(load_rows(options.results)))
        return
    # The parent must not touch the network, either.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    command = shlex.join(["python", "-m", "benchmarks.accuracy", *given])
    if options.command == "tasks":
        from benchmarks.accuracy_tasks import Tasks

        Tasks(options, command).run()
    else:
        from benchmarks.accuracy_sweep import Sweep

        Sweep(options, command).run()


if __name__ == "__main__":
    main()
