# SPDX-License-Identifier: Apache-2.0
"""What the selection costs in accuracy, through the real vLLM engine, stock beside the split cache.

    python -m benchmarks.accuracy sweep MODEL --lengths 2048 4096 8000
    python -m benchmarks.accuracy sweep MODEL --settings '[{"coverage": 0.97}, {"top_n": 32}]'
    python -m benchmarks.accuracy table

`sweep` forces the tokens of real text one by one on the decode path. Stock vLLM runs first and its
logits are kept; each setting of the split cache is then compared with them at every position, over
the whole vocabulary: KL(stock || split), perplexity, and how often both put the same token first.
The tokens are the same at every length of context, and only prompts differ.

Each engine runs in a process of its own, and is reconfigured between the settings that need no new
one; so it runs without CUDA graphs. Rows go to benchmarks/results/accuracy.jsonl as they are known.
A command that is repeated leaves out what it finds there: same settings, tokens, device, versions
and commit.

Tasks, RULER's among them: python -m benchmarks.accuracy.tasks --help
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

from benchmarks.accuracy.settings import parse_settings
from benchmarks.rows import RESULTS


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; `settings` is a list of dicts or None."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sweep = commands.add_parser("sweep", help="perplexity and KL of many settings")
    sweep.add_argument("model", help="folder of a Hugging Face model")
    sweep.add_argument("--lengths", type=int, nargs="+", default=[2048], help="tokens of context")
    sweep.add_argument("--items", type=int, default=64, help="passages, half prose, half code")
    sweep.add_argument("--forced", type=int, default=160, help="tokens to force in each")
    sweep.add_argument(
        "--settings", nargs="+", metavar="JSON", help="kcache_config of each setting, or a list"
    )
    sweep.add_argument("--dtype", default="float32")
    sweep.add_argument("--block-size", type=int, help="tokens of a K page (GPU 16, CPU 32)")
    sweep.add_argument("--max-num-batched-tokens", type=int, help="(GPU 8192, CPU 2048)")
    sweep.add_argument("--engine", type=json.loads, default={}, help="more of vllm.LLM, JSON")
    sweep.add_argument("--hot-cache-gib", type=float, help="hot V cache; large is fast")
    sweep.add_argument("--cpu-cache-gib", type=int, help="cache of the CPU engine (4)")
    sweep.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()), help="where stock's logits go"
    )
    sweep.add_argument("--keep-work", action="store_true", help="keep them, for the next command")
    table = commands.add_parser("table", help="Markdown tables of the rows that are there")
    for command in (sweep, table):
        command.add_argument("--results", type=Path, default=RESULTS / "accuracy.jsonl")
    options = parser.parse_args(arguments)
    if options.command == "table":
        return options
    try:
        options.settings = parse_settings(options.settings)
    except ValueError as error:
        parser.error(str(error))
    if min(options.items, options.forced, *options.lengths) < 1:
        parser.error("--items, --lengths and --forced must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    if options.command == "table":
        from benchmarks.accuracy.table import load_rows, tables

        print(tables(load_rows(options.results)))
        return
    # The parent must not touch the network, either.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from benchmarks.accuracy.sweep import Sweep

    Sweep(options, shlex.join(["python", "-m", "benchmarks.accuracy", *given])).run()


if __name__ == "__main__":
    main()
