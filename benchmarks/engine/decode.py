# SPDX-License-Identifier: Apache-2.0
"""Decode throughput of whole engines: stock vLLM and the split cache, one after the other.

    python -m benchmarks.engine.decode SHAPES/llama-2-7b --context 16384 --top-n 16
    python -m benchmarks.engine.decode SHAPES/llama-3-8b --mode replay --context 8192 16384 32768
        --requests 0 1 8 --engines stock stock-fp8 kcache
    python -m benchmarks.engine.decode SHAPES/gpt-oss-20b --mode replay --mass-threshold 0.002
        --context 32768 130000 --max-requests 192 --engines stock stock-fp8 kcache-4
    python -m benchmarks.engine.decode SHAPES/llama-3-70b --tensor-parallel-size 4 --mode replay
        --mass-threshold 0.002 --context 32768 130000 --engines stock stock-fp8 kcache-4
    python -m benchmarks.engine.decode --preset paper

Each engine runs in a process of its own on the same GPU at the same --gpu-memory-utilization, with
dummy weights, and decodes as many requests as fit, or as many as asked; the cache is filled with
random values (DecodeBenchConnector; the host pool likewise) instead of prefilled. An engine starts
once, for the longest context, and runs all contexts and numbers of requests. Step time is the mean
of a run's steps without its first ones (up to d250226 the difference of two runs of different
length, which took in part of what the prompts cost), and the split cache's figures are those of the
steps timed. One row per engine, context and number of requests is appended to
benchmarks/results/decode.jsonl as soon as it is there.

--mode fixed: scores of dummy weights. They attend flatly and at random, so selections do not repeat
from step to step: the worst case for the hot V cache.
--mode replay: scores of a real model decoding real text at 4K tokens, recorded
(replay/record.py), written over those of the dummy weights (replay/replay.py). Coverage .95 unless
another rule is given. The kernel that overwrites them is part of the step as timed; what it costs
alone is in the row, not taken off.
Of models with window layers or states the split layers alone are played; window layers keep the
connector's random K and V, states its zeros. With heads of 256 say --v-block-tokens 8: V blocks of
8 tokens are what was recorded.
--preset paper: the setting of the KCache paper (arXiv 2404.18057) as far as it is known:
Llama-2-7B, 8 requests of up to 32K tokens (as many as fit), a small fixed N. Other options may
change it.
--preset grid: contexts of 2K to 128K, 1 to 64 requests and all that fit, four engines; see grid.py.
--resume: cells whose rows are there, of the same commit, GPU and settings, are left out; where none
is left of an engine, it is not started. --seconds: no cell is begun after so many.
--drafts 0 3: steps that verify so many drafts a request, all of them as good as always wrong
(drafting.py), so that a step still makes one token. Rows of drafts up to c88fdba, also of 0, are
of vLLM's first runner without asynchronous scheduling; all others are of the second, with it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.engine import grid
from benchmarks.engine.decode_engine import SHORT_STEPS, longest, spare_tokens
from benchmarks.rows import RESULTS, ROOT, append, command
from vllm_kcache.config import DEFAULT_THRESHOLD_LENGTH, KCacheConfig

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
REPLAY_COVERAGE = 0.95
# Defaults of the options. 16 V blocks are 128 tokens, the most that the paper is understood to use.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "engines": ["stock", "kcache-16"],
        "model": str(ROOT / "benchmarks/shapes/llama-2-7b"),
        "context": [4096, 8192, 16384, 24576, 32768],
        "requests": [8],
        "max_requests": 8,
        "top_n": 16,
        "mode": "fixed",
    },
    "grid": {
        "engines": ["kcache-4", "stock", "stock-fp8", "kcache-16"],
        "context": list(grid.CONTEXTS),
        "requests": list(grid.REQUESTS),
        "max_requests": 512,
        "mode": "replay",
        "mass_threshold": 0.002,  # the default, so that rows name it
        "output": 48,
        "repeats": 1,
        "label": "grid",
        "resume": True,
    },
}


def run_in_process(options: dict[str, Any], table: Table) -> None:
    """`measure` in a fresh process. Rows are kept and shown as they come.

    What else it says goes to a file, named at start and kept unless the engine ends well: one that
    is killed has said so far where it was.

    Raises:
        RuntimeError: the engine failed; the message ends with the end of its output.
    """
    with tempfile.NamedTemporaryFile(
        "w", prefix="kcache-decode-", suffix=".log", delete=False
    ) as log:
        print(f"engine {options['engine']}; its log: {log.name}", file=sys.stderr, flush=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.engine.decode_engine", json.dumps(options)],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("RESULT "):
                table.add(json.loads(line.removeprefix("RESULT ")))
            else:
                log.write(line)
                log.flush()
    path = Path(log.name)
    if process.wait() != 0:
        raise RuntimeError(f"the engine failed:\n{path.read_text()[-6000:]}")
    path.unlink()


class Table:
    """Appends rows to the file of results and prints them beside the first engine's.

    Attributes:
        said: each run in a few words, for the last line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.baseline: dict[tuple[int, int], float] = {}
        self.said: list[str] = []

    def add(self, row: dict[str, Any]) -> None:
        """One row of one run."""
        append(self.path, row)
        (run,) = row["runs"]
        config = row["kcache_config"] or {}
        variant = {"auto": config.get("k_bits", "")}.get(
            row["kv_cache_dtype"], row["kv_cache_dtype"]
        )
        name = f"{row['engine']}-{variant}".removesuffix("-")
        if row["quantization"]:
            name += f", {row['quantization']} weights"
        if row["drafts"]:
            name += f"+{row['drafts']}"
        first = self.baseline.setdefault(
            (row["context"], row["requests_asked"]), run["tokens_per_second"]
        )
        line = (
            f"{row['model']:12s} {name:10s} {run['requests']:3d} x {row['context']:6d} "
            f"{run['step_ms']:8.2f} ms {run['tokens_per_second']:8.1f} tok/s "
            f"{run['tokens_per_second'] / first:5.2f}x {row['num_blocks']} blocks"
        )
        if row["mode"] is not None:
            line += (
                f"  {row['mode']}: {run['mean_selected_tokens']} tokens a head, "
                f"hit rate {run['hit_rate']}"
            )
        if "replay_kernel_ms" in run:
            line += f", of the step the replay kernel is {run['replay_kernel_ms']} ms"
        print(line, flush=True)
        self.said.append(
            f"{name} {run['requests']}x{row['context']} {run['step_ms']:.2f} ms "
            f"{run['tokens_per_second']:.1f} tok/s"
        )


def gib(text: str) -> float | str:
    """A size on the command line: GiB, or "auto"."""
    return text if text == "auto" else float(text)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; a preset gives defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder with a config.json")
    parser.add_argument("--mode", choices=["fixed", "replay"], default="fixed")
    parser.add_argument("--context", type=int, nargs="+", default=[16384], help="tokens a request")
    parser.add_argument("--max-model-len", type=int, help="else as the longest context needs")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, help="of a step; else vLLM's choice for this GPU"
    )
    parser.add_argument("--output", type=int, default=72, help="steps of the long run")
    parser.add_argument("--top-n", type=int, default=None, help="V blocks per KV head")
    parser.add_argument("--coverage", type=float, help=f"in replay {REPLAY_COVERAGE} unless given")
    parser.add_argument("--mass-threshold", type=float, help="in place of a coverage")
    parser.add_argument(
        "--threshold-length", type=int, help="tokens beyond which that falls; 0: never"
    )
    parser.add_argument("--hot-cache-gib", type=gib, help='a number or "auto"')
    parser.add_argument("--host-memory-gib", type=gib, help='a number or "auto"')
    parser.add_argument("--host-dtype", choices=["model", "int8"], help="of rows, with k_bits 4")
    parser.add_argument("--v-block-tokens", type=int, help="of V blocks; replay plays those of 8")
    parser.add_argument("--utilization", type=float, default=0.9)
    parser.add_argument("--quantization", help="of the weights, as vLLM names it: fp8")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs of an engine")
    parser.add_argument("--requests", type=int, nargs="+", default=[0, 1], help="0: all that fit")
    parser.add_argument("--max-requests", type=int, default=32)
    parser.add_argument("--drafts", type=int, nargs="+", default=[0], help="of a request and step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--engines",
        nargs="+",
        default=["stock", "kcache"],
        help="stock, stock-fp8, kcache (k_bits as by default), kcache-16, kcache-4",
    )
    parser.add_argument(
        "--profile", action="store_true", help="time each kernel in some more steps, into the row"
    )
    parser.add_argument("--resume", action="store_true", help="leave out cells that have a row")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell later")
    parser.add_argument("--label", default="", help="noted in the row")
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "decode.jsonl", help="file of rows"
    )
    parser.add_argument("--preset", choices=PRESETS, help="defaults for the other options")
    preset = parser.parse_args(arguments).preset
    if preset is not None:
        parser.set_defaults(**PRESETS[preset])
    parsed = parser.parse_args(arguments)
    if parsed.model is None:
        parser.error("needs a model: a folder with a config.json")
    if parsed.output <= SHORT_STEPS:
        parser.error(f"--output {parsed.output}: must be above {SHORT_STEPS}")
    if parsed.profile and parsed.tensor_parallel_size > 1:
        parser.error("--profile: sees the kernels of one GPU; not with --tensor-parallel-size")
    if min(parsed.drafts) < 0:
        parser.error(f"--drafts {min(parsed.drafts)}: must be at least 0")
    if any(parsed.drafts) and parsed.tensor_parallel_size > 1:
        parser.error("--drafts: on one GPU; not with --tensor-parallel-size")
    least = max(parsed.context) + parsed.output + spare_tokens(max(parsed.drafts))
    if parsed.max_model_len is not None and parsed.max_model_len < least:
        parser.error(f"--max-model-len {parsed.max_model_len}: must be at least {least}")
    return parsed


def engine_options(engine: str, settings: dict[str, Any], host_dtype: str | None) -> dict[str, Any]:
    """What an engine's name on the command line says: "stock-fp8" is a dtype, "kcache-4" k_bits."""
    name, _, variant = engine.partition("-")
    config = {key: value for key, value in settings.items() if value is not None}
    if name == "kcache":
        # In the row, whatever "auto" is by then.
        config["k_bits"] = int(variant or KCacheConfig().resolved_k_bits)
        if "mass_threshold" in config:
            length = config.setdefault("threshold_length", DEFAULT_THRESHOLD_LENGTH)
            config["threshold_length"] = length or None
    if config.get("k_bits") == 4 and host_dtype is not None:
        config["host_dtype"] = host_dtype
    dtype = variant if name == "stock" and variant else "auto"
    return {"engine": name, "kv_cache_dtype": dtype, "kcache_config": config}


def main() -> None:
    """Run the engines, append rows, print a table."""
    arguments = parse()
    coverage = arguments.coverage
    if (coverage, arguments.mass_threshold, arguments.mode) == (None, None, "replay"):
        coverage = REPLAY_COVERAGE
    settings = {
        "top_n": arguments.top_n,
        "coverage": coverage,
        "mass_threshold": arguments.mass_threshold,
        "threshold_length": arguments.threshold_length,
        "hot_cache_gib": arguments.hot_cache_gib,
        "host_memory_gib": arguments.host_memory_gib,
        "v_block_tokens": arguments.v_block_tokens,
    }
    options = {
        "model": str(Path(arguments.model).resolve()),
        "mode": arguments.mode,
        "contexts": arguments.context,
        "max_model_len": arguments.max_model_len,
        "max_num_batched_tokens": arguments.max_num_batched_tokens,
        "output": arguments.output,
        "utilization": arguments.utilization,
        "quantization": arguments.quantization,
        "tensor_parallel_size": arguments.tensor_parallel_size,
        "requests": arguments.requests,
        "max_requests": arguments.max_requests,
        "repeats": arguments.repeats,
        "profile": arguments.profile,
        "label": arguments.label,
        "command": command(),
    }
    begin = time.monotonic()
    table = Table(arguments.results)
    for engine, drafts in itertools.product(arguments.engines, arguments.drafts):
        of_engine = engine_options(engine, settings, arguments.host_dtype)
        of_engine = {**options, **of_engine, "drafts": drafts or None}
        of_engine["seconds"] = arguments.seconds - (time.monotonic() - begin)
        if arguments.resume:
            of_engine |= grid.what_is_left(of_engine, longest(of_engine), arguments.results)
        if not of_engine["contexts"]:
            print(f"engine {engine}: no cell is left", file=sys.stderr)
        elif of_engine["seconds"] <= 0:
            print(f"engine {engine}: {arguments.seconds:g} s are over; call again", file=sys.stderr)
        else:
            run_in_process(of_engine, table)
    print(f"step time p50: {'; '.join(table.said)}", flush=True)


if __name__ == "__main__":
    main()
