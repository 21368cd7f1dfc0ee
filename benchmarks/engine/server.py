# SPDX-License-Identifier: Apache-2.0
"""Whole servers under load: stock vLLM and the split cache, one after the other.

    python -m benchmarks.engine.server benchmarks/shapes/llama-3-8b
    python -m benchmarks.engine.server benchmarks/shapes/llama-3-8b --engines kcache-4
        --workloads 16384/512 --num-prompts 96 --kcache-config '{"host_memory_gib": 112}'
    python -m benchmarks.engine.server MODEL --mode fixed --layers 2 --workloads 256/16 128+16/8
        --num-prompts 4  # a try on a CPU
    python -m benchmarks.engine.server --table

Each engine is a `vllm serve` with dummy weights; the client is vLLM's own (`vllm bench serve`, in
this process), which sends token ids over HTTP and ignores the end of a text. A workload is
INPUT/OUTPUT, new prompts of that many tokens, or PREFIX+INPUT/OUTPUT, conversations whose first
PREFIX tokens were sent before: --num-prompts requests go to num-prompts / --turns conversations,
each turn of all of them before the next turn, with other new tokens behind the same prefix. What a
server compiles and caches first is not counted: prefixes, or two prompts of the same length, go
ahead of a measurement. By default all requests are sent at once, or all conversations: times to
the first token include the time in the queue. --request-rate and --concurrency say otherwise.

--mode replay, which needs a GPU: scores of a real model, as in benchmarks.engine.decode, with the
default selection unless --kcache-config has another. --mode fixed: scores of dummy weights, which
attend flatly.

One row per engine and workload is appended to benchmarks/results/server.jsonl as soon as it is
there; --table prints the rows of that file. To cut a run to pieces: --engines, --workloads, the
same --max-model-len.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.engine.prefill import model_folder
from benchmarks.replay.extension import name_for
from benchmarks.rows import RESULTS, Row, append, command, commit, date, device, grouped, load

if TYPE_CHECKING:
    from benchmarks.engine.server_process import BenchmarkServer

# Tokens that one id of a trace stands for (--timed-trace-chunk-hash-size).
CHUNK_TOKENS = 16
WARM_UP_PROMPTS, WARM_UP_OUTPUT = 2, 16
# Of /metrics: what a measurement adds to. Those of KCACHE_METRICS only the split cache has.
STOCK_METRICS = (
    "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:num_preemptions_total"
)  # fmt: skip
KCACHE_METRICS = (
    "vllm_kcache_selected_blocks_sum", "vllm_kcache_selected_blocks_count",
    "vllm_kcache_hot_cache_hits_total", "vllm_kcache_hot_cache_misses_total",
    "vllm_kcache_direct_host_reads_total", "vllm_kcache_fetched_bytes_total",
    "vllm_kcache_eager_decode_steps_total",
)  # fmt: skip
# What makes two rows of one load, and what tells its engines apart.
LOAD = ("gpu", "model", "layers", "workload", "num_prompts", "concurrency", "request_rate")
ENGINE = ("engine", "mode", "kcache_config", "label")


@dataclass(frozen=True)
class Workload:
    """Tokens of a request: of a prefix that was sent before, new ones, and those asked for."""

    prefix: int
    new: int
    output: int

    @classmethod
    def parse(cls, text: str) -> Workload:
        """INPUT/OUTPUT or PREFIX+INPUT/OUTPUT.

        Raises:
            ValueError: another form, no tokens, or a prefix that is not whole chunks.
        """
        found = re.fullmatch(r"(?:(\d+)\+)?(\d+)/(\d+)", text)
        if found is None:
            raise ValueError(f"workload {text!r}: must be INPUT/OUTPUT or PREFIX+INPUT/OUTPUT")
        prefix, new, output = (int(part or 0) for part in found.groups())
        if not new or not output:
            raise ValueError(f"workload {text!r}: needs new tokens and an output")
        if prefix % CHUNK_TOKENS:
            raise ValueError(f"workload {text!r}: the prefix must be a multiple of {CHUNK_TOKENS}")
        return cls(prefix, new, output)

    def __str__(self) -> str:
        prefix = f"{self.prefix}+" if self.prefix else ""
        return f"{prefix}{self.new}/{self.output}"

    @property
    def input(self) -> int:
        return self.prefix + self.new

    def concurrency(self, num_prompts: int, turns: int) -> int:
        """Requests at once where nothing else is asked: a turn of all, or all."""
        return num_prompts // turns if self.prefix else num_prompts

    def traces(self, num_prompts: int, turns: int, first_id: int) -> tuple[list[Row], list[Row]]:
        """What goes ahead of the measurement, and what is measured: requests in order.

        Args:
            num_prompts: requests measured.
            turns: of each conversation, where there is a prefix.
            first_id: first of the ids that stand for a chunk of tokens each; equal ids are equal
                tokens.

        Raises:
            ValueError: the turns do not divide the requests.
        """
        if self.prefix and num_prompts % turns:
            raise ValueError(f"--num-prompts {num_prompts}: must be a multiple of {turns} turns")
        ids = itertools.count(first_id)

        def chunks(tokens: int) -> list[int]:
            return list(itertools.islice(ids, -(-tokens // CHUNK_TOKENS)))

        def request(prompt: list[int], tokens: int, output: int) -> Row:
            return {
                "timestamp": 0, "input_length": tokens, "output_length": output, "hash_ids": prompt
            }  # fmt: skip

        if not self.prefix:
            before = [
                request(chunks(self.new), self.new, min(self.output, WARM_UP_OUTPUT))
                for _ in range(WARM_UP_PROMPTS)
            ]
            return before, [
                request(chunks(self.new), self.new, self.output) for _ in range(num_prompts)
            ]
        prefixes = [chunks(self.prefix) for _ in range(num_prompts // turns)]
        return (
            [request(prefix, self.prefix, 1) for prefix in prefixes],
            [
                request(prefix + chunks(self.new), self.input, self.output)
                for _ in range(turns)
                for prefix in prefixes
            ],
        )


def add_tokenizer(folder: Path) -> None:
    """Give a folder with a config.json a tokenizer: one word for each token id.

    The server turns tokens to text as ever. No checkpoint of the shape is needed.
    """
    config = json.loads((folder / "config.json").read_text())
    words = {f"w{number}": number for number in range(config["vocab_size"])}
    tokenizer: Row = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None,
        "decoder": None, "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )


def serve_arguments(
    options: argparse.Namespace, model: Path, engine: Row, longest: int
) -> list[str]:
    """Arguments of `vllm serve` for one engine.

    Args:
        model: folder with a config.json and a tokenizer.
        engine: kind of engine, as `benchmarks.engine.decode.engine_options` gives it.
        longest: max_model_len.
    """
    arguments = [
        str(model), "--served-model-name", model.name, "--load-format", "dummy",
        "--dtype", "bfloat16", "--generation-config", "vllm", "--max-model-len", str(longest),
        "--max-num-seqs", str(options.max_requests),
        "--max-num-batched-tokens", str(options.chunk),
        "--kv-cache-dtype", engine["kv_cache_dtype"],
    ]  # fmt: skip
    if options.on_gpu:
        graphs = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "max_cudagraph_capture_size": options.max_requests,
        }
        arguments += ["--gpu-memory-utilization", str(options.utilization)]
        arguments += ["--compilation-config", json.dumps(graphs)]
    else:
        arguments.append("--enforce-eager")
    if engine["engine"] == "kcache":
        arguments += ["--kv-backend", "kcache"]
        arguments += ["--kcache-config", json.dumps(engine["kcache_config"])]
        if options.mode == "replay":
            arguments += ["--worker-extension-cls", replay_of(options, engine["kcache_config"])]
    return [*arguments, *shlex.split(options.serve_arguments)]


def replay_of(options: argparse.Namespace, config: Row) -> str:
    """The extension that plays what a configuration's rule reads.

    Raises:
        ValueError: a workload's prompts have no place for every recorded block.
    """
    return name_for(config, min(each.input for each in options.workloads))


def send(
    options: argparse.Namespace, server: BenchmarkServer, model: Path, trace: list[Row], most: int
) -> Row:
    """Send requests, at most so many at once, with vLLM's client. Returns what that reports.

    Raises:
        RuntimeError: not every request was answered at the lengths asked for.
    """
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("".join(json.dumps(request) + "\n" for request in trace))
        file.flush()
        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        arguments = parser.parse_args(
            [
                "--backend", "openai", "--base-url", server.url, "--model", str(model),
                "--served-model-name", model.name, "--dataset-name", "timed_trace",
                "--dataset-path", file.name, "--no-self-timed",
                "--timed-trace-chunk-hash-size", str(CHUNK_TOKENS), "--num-prompts",
                str(len(trace)), "--request-rate", str(options.request_rate),
                "--max-concurrency", str(most), "--temperature", "0", "--metric-percentiles",
                "50,99", "--percentile-metrics", "ttft,tpot,itl,e2el", "--disable-tqdm",
            ]
        )  # fmt: skip
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            report = asyncio.run(main_async(arguments))
    try:
        check_report(report, trace)
    except RuntimeError as error:
        raise RuntimeError(f"{error}\n{said.getvalue()}\n{server.log_tail(60)}") from None
    return report


def check_report(report: Row, trace: list[Row]) -> None:
    """Raise RuntimeError unless every request was answered at the lengths asked for."""
    expected = {
        "completed": len(trace),
        "total_input_tokens": sum(request["input_length"] for request in trace),
        "total_output_tokens": sum(request["output_length"] for request in trace),
    }
    found = {name: report[name] for name in expected}
    if found != expected:
        raise RuntimeError(f"vllm bench serve reports {found}; expected {expected}")


def figures_of(report: Row, before: dict[str, float], after: dict[str, float]) -> Row:
    """The figures of a row, of vLLM's report and of what /metrics said before and after.

    `cached_share` is that of the prompts' tokens; times are milliseconds.
    """
    added = {name.split(":")[-1]: after[name] - before[name] for name in after}
    times = {
        f"{name}_ms": {p: round(report[f"{p}_{name}_ms"], 2) for p in ("p50", "p99")}
        for name in ("ttft", "tpot", "itl", "e2el")
    }
    prompt_tokens = max(1.0, added["prefix_cache_queries_total"])
    row = {
        "seconds": round(report["duration"], 2),
        "requests_per_second": round(report["request_throughput"], 4),
        "output_tokens_per_second": round(report["output_throughput"], 1),
        **times,
        "cached_share": round(added["prefix_cache_hits_total"] / prompt_tokens, 4),
        "preemptions": int(added["num_preemptions_total"]),
    }
    ours = {name: value for name, value in added.items() if name in KCACHE_METRICS}
    if ours:
        blocks, lists, hits, misses, direct, *_ = ours.values()
        looked_up = hits + misses + direct
        row["mean_selected_blocks"] = round(blocks / lists, 2) if lists else None
        row["hit_rate"] = round(hits / looked_up, 4) if looked_up else None
        row["kcache_metrics"] = ours
    return row


def run_engine(options: argparse.Namespace, name: str, folder: Path) -> Iterator[Row]:
    """Start one server and run all workloads: a row for each, as soon as it is there."""
    import torch
    import vllm

    from benchmarks.engine.decode import engine_options
    from benchmarks.engine.server_process import BenchmarkServer

    longest = options.max_model_len or max(each.input + each.output for each in options.workloads)
    model = model_folder(Path(options.model).resolve(), folder, options.layers, longest)
    add_tokenizer(model)
    engine = engine_options(name, options.kcache_config, None)
    split = engine["engine"] == "kcache"
    names = STOCK_METRICS + KCACHE_METRICS if split else STOCK_METRICS
    started = time.monotonic()
    arguments = serve_arguments(options, model, engine, longest)
    server = BenchmarkServer(folder / "server.log", arguments)
    try:
        server.wait_until_ready()
        common = {
            "gpu": device(), "torch": torch.__version__, "vllm": vllm.__version__,
            "commit": commit(), "date": date(), "command": command(), "model": model.name,
            "layers": options.layers, "label": options.label, "engine": name,
            "mode": options.mode if split else None,
            "kcache_config": engine["kcache_config"] if split else None,
            "max_model_len": longest, "max_requests": options.max_requests,
            "chunk": options.chunk, "utilization": options.utilization,
            "serve_arguments": options.serve_arguments,
            "cache_tokens": server.cache_tokens(),
            "start_seconds": round(time.monotonic() - started, 1),
        }  # fmt: skip
        for number, workload in enumerate(options.workloads):
            most = options.concurrency or workload.concurrency(options.num_prompts, options.turns)
            ahead, trace = workload.traces(options.num_prompts, options.turns, number * 10**9)
            send(options, server, model, ahead, most)
            before = server.figures(names)
            report = send(options, server, model, trace, most)
            yield {
                **common, "workload": str(workload), "num_prompts": options.num_prompts,
                "turns": options.turns if workload.prefix else None, "concurrency": most,
                "request_rate": str(options.request_rate),
                **figures_of(report, before, server.figures(names)),
            }  # fmt: skip
    finally:
        server.close()


def table(rows: list[Row]) -> str:
    """Markdown: a line for each load and engine, of its last row; a load's engines together."""
    last = {json.dumps([row[name] for name in (*LOAD, *ENGINE)]): row for row in rows}
    head = ["requests", "engine", "requests/s", "tokens/s", "over the first", "TTFT p50, p99, s"]
    head += ["TPOT p50, p99, ms", "cached", "commit"]
    lines = [head, ["---"] * len(head)]
    for group in grouped(last.values(), *LOAD).values():
        first = group[0]["output_tokens_per_second"]
        for row in group:
            rate, ttft, tpot = row["output_tokens_per_second"], row["ttft_ms"], row["tpot_ms"]
            lines.append(
                [
                    f"{row['workload']}: {row['num_prompts']}, {row['concurrency']} at once",
                    row["engine"],
                    f"{row['requests_per_second']:.2f}",
                    f"{rate:.0f}",
                    f"{rate / first:.2f}x",
                    f"{ttft['p50'] / 1e3:.2f}, {ttft['p99'] / 1e3:.2f}",
                    f"{tpot['p50']:.1f}, {tpot['p99']:.1f}",
                    f"{row['cached_share']:.0%}",
                    row["commit"],
                ]
            )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder with a config.json")
    parser.add_argument("--mode", choices=["fixed", "replay"], default="replay")
    parser.add_argument(
        "--engines",
        nargs="+",
        default=["stock", "stock-fp8", "kcache-16", "kcache-4"],
        help="stock, stock-fp8, kcache (k_bits as by default), kcache-16, kcache-4",
    )
    parser.add_argument(
        "--workloads",
        nargs="+",
        default=["16384/512", "8192/4096", "32768+256/256"],
        help="INPUT/OUTPUT or PREFIX+INPUT/OUTPUT, tokens",
    )
    parser.add_argument("--num-prompts", type=int, default=64, help="requests of each workload")
    parser.add_argument("--turns", type=int, default=2, help="of a conversation")
    parser.add_argument("--concurrency", type=int, help="else all, or all conversations, at once")
    parser.add_argument("--request-rate", type=float, default=float("inf"), help="a second")
    parser.add_argument("--output", type=int, help="tokens of each answer, for all workloads")
    parser.add_argument("--max-model-len", type=int, help="else as the longest request needs")
    parser.add_argument("--max-requests", type=int, default=128, help="max_num_seqs")
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    parser.add_argument("--utilization", type=float, default=0.9)
    parser.add_argument("--layers", type=int, help="of the model instead of its own number")
    parser.add_argument("--kcache-config", type=json.loads, default={}, help="JSON")
    parser.add_argument("--serve-arguments", default="", help="more of `vllm serve`, one text")
    parser.add_argument("--label", default="", help="noted in the row")
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "server.jsonl", help="file of rows"
    )
    parser.add_argument("--table", action="store_true", help="only print the rows of --results")
    parsed = parser.parse_args(arguments)
    if parsed.table:
        return parsed
    if parsed.model is None:
        parser.error("needs a model: a folder with a config.json")
    try:
        parsed.workloads = [
            Workload.parse(text if not parsed.output else re.sub(r"\d+$", str(parsed.output), text))
            for text in parsed.workloads
        ]
        for workload in parsed.workloads:
            workload.traces(parsed.num_prompts, parsed.turns, 0)
    except ValueError as error:
        parser.error(str(error))
    return parsed


def main() -> None:
    """Run the servers, append rows, print a table."""
    options = parse()
    if options.table:
        print(table(load(options.results)))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm.platforms import current_platform

    options.on_gpu = not current_platform.is_cpu()
    if options.mode == "replay" and not options.on_gpu:
        sys.exit("--mode replay: plays recorded scores in the kernels of a GPU; here --mode fixed")
    if options.mode == "replay":
        try:
            replay_of(options, options.kcache_config)
        except ValueError as error:
            sys.exit(str(error))
    # Whoever ends this must not leave a server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    rows: list[Row] = []
    for engine in options.engines:
        with tempfile.TemporaryDirectory() as folder:
            for row in run_engine(options, engine, Path(folder)):
                append(options.results, row)
                rows.append(row)
                print(json.dumps(row), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
