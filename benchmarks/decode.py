# SPDX-License-Identifier: Apache-2.0
"""Decode throughput of whole engines: stock vLLM and the split cache, one after the other.

    python -m benchmarks.decode SHAPES/llama-2-7b --context 16384 --top-n 16

Each engine runs in a process of its own on the same GPU at the same --gpu-memory-utilization, with
dummy weights, and decodes as many requests as fit; the cache is filled with random values
(DecodeBenchConnector; the host pool likewise) instead of prefilled. Step time is the difference of
two runs of different length. One row per engine is appended to benchmarks/results/decode.jsonl.

Dummy weights attend flatly and at random, so selections do not repeat from step to step: the worst
case for the hot V cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/decode.jsonl"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Start one engine and time its decode steps; runs in the process of that engine.

    Args:
        options: model, context, output, engine ("stock" or "kcache"), kcache_config, utilization,
            requests (0: all that fit).
    """
    import torch
    from vllm import LLM

    split = {}
    if options["engine"] == "kcache":
        split = {"kv_backend": "kcache", "kcache_config": options["kcache_config"]}
    longest = options["context"] + options["output"] + 16
    started = time.monotonic()
    llm = LLM(
        options["model"],
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=longest,
        max_num_seqs=options["max_requests"],
        gpu_memory_utilization=options["utilization"],
        enable_prefix_caching=False,
        kv_cache_dtype=options.get("kv_cache_dtype", "auto"),
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": options["capture"],
        },
        kv_transfer_config={
            "kv_connector": "DecodeBenchConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"fill_std": 0.5, "startup_fill": True},
        },
        **split,
    )
    start_seconds = time.monotonic() - started
    cache = llm.llm_engine.vllm_config.cache_config
    fits = cache.num_gpu_blocks * cache.block_size // longest
    if split:
        llm.collective_rpc("kcache_fill_host_pool", args=(0.5,))
    rows = []
    before = _figures(llm) if split else {}
    for requests in options["requests"]:
        count = min(requests or fits, fits, options["max_requests"])
        rows.append(_time_steps(llm, options, count))
        if split:
            after = _figures(llm)
            rows[-1]["kcache_metrics"] = {key: after[key] - before[key] for key in after}
            before = after
    return {
        "engine": options["engine"],
        "kv_cache_dtype": options.get("kv_cache_dtype", "auto"),
        "kcache_config": options["kcache_config"] if split else None,
        "num_blocks": cache.num_gpu_blocks,
        "requests_that_fit": fits,
        "start_seconds": round(start_seconds, 1),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
        "runs": rows,
    }


def _figures(llm: Any) -> dict[str, float]:
    """The split cache's counters since its start."""
    import vllm_kcache

    return {
        key: value for key, value in vllm_kcache.metrics(llm).items() if isinstance(value, float)
    }


def _time_steps(llm: Any, options: dict[str, Any], count: int) -> dict[str, Any]:
    """Step time of `count` requests: (long run - short run) / (difference in steps)."""
    from vllm import SamplingParams

    generator = random.Random(0)
    prompts = [
        {"prompt_token_ids": [generator.randrange(3, 31000) for _ in range(options["context"])]}
        for _ in range(count)
    ]

    def seconds(tokens: int) -> float:
        sampling = SamplingParams(
            max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0
        )
        begin = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - begin

    short = 8
    seconds(short)
    step_ms = sorted(
        (seconds(options["output"]) - seconds(short)) / (options["output"] - short) * 1e3
        for _ in range(options["repeats"])
    )
    middle = step_ms[len(step_ms) // 2]
    return {
        "requests": count,
        "step_ms": round(middle, 3),
        "step_ms_all": [round(value, 3) for value in step_ms],
        "tokens_per_second": round(count / middle * 1e3, 1),
    }


def run_in_process(options: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a fresh process; its output is shown when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.decode", "--measure", json.dumps(options)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode != 0 or not lines:
        raise RuntimeError(f"the engine failed:\n{done.stdout[-1500:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def about_this_machine() -> dict[str, str]:
    """GPU, versions and commit, for the row."""
    import importlib.metadata

    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "vllm": importlib.metadata.version("vllm"),
        "commit": os.environ.get("KCACHE_COMMIT", commit),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder with a config.json")
    parser.add_argument("--context", type=int, default=16384, help="tokens of each request")
    parser.add_argument("--output", type=int, default=72, help="steps of the long run")
    parser.add_argument("--top-n", type=int, default=None, help="V blocks per KV head")
    parser.add_argument("--coverage", type=float, default=None)
    parser.add_argument("--hot-cache-gib", type=float, default=None)
    parser.add_argument("--utilization", type=float, default=0.9)
    parser.add_argument("--requests", type=int, nargs="*", default=[0, 1], help="0: all that fit")
    parser.add_argument("--max-requests", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", nargs="*", default=["stock", "kcache"])
    parser.add_argument("--label", default="", help="noted in the row")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Run the engines, append rows, print a table."""
    arguments = parse()
    if arguments.measure:
        result = measure(json.loads(arguments.measure))
        print("RESULT " + json.dumps(result), flush=True)
        return
    settings = {
        "top_n": arguments.top_n,
        "coverage": arguments.coverage,
        "hot_cache_gib": arguments.hot_cache_gib,
    }
    options = {
        "model": str(Path(arguments.model).resolve()),
        "context": arguments.context,
        "output": arguments.output,
        "utilization": arguments.utilization,
        "requests": arguments.requests,
        "max_requests": arguments.max_requests,
        "repeats": arguments.repeats,
        "capture": [1, 2, 4, 7, 8, 13, 14, 16, 20, 24, 26, 27, 28, 32],
        "kcache_config": {key: value for key, value in settings.items() if value is not None},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    baseline: dict[int, float] = {}
    for engine in arguments.engines:
        name, _, kv_cache_dtype = engine.partition("-")
        chosen = {**options, "engine": name, "kv_cache_dtype": kv_cache_dtype or "auto"}
        result = run_in_process(chosen)
        row = {
            **about_this_machine(),
            "command": " ".join(["python -m benchmarks.decode", *sys.argv[1:]]),
            "model": Path(options["model"]).name,
            "context": arguments.context,
            "utilization": arguments.utilization,
            "label": arguments.label,
            **result,
        }
        with open(RESULTS, "a") as file:
            file.write(json.dumps(row) + "\n")
        for index, run in enumerate(result["runs"]):
            baseline.setdefault(index, run["tokens_per_second"])
            ratio = run["tokens_per_second"] / baseline[index]
            print(
                f"{row['model']:12s} {engine:10s} {run['requests']:3d} x {arguments.context} "
                f"{run['step_ms']:8.2f} ms {run['tokens_per_second']:8.1f} tok/s {ratio:5.2f}x "
                f"{result['num_blocks']} blocks",
                flush=True,
            )


if __name__ == "__main__":
    main()
