# SPDX-License-Identifier: Apache-2.0
"""Time to first token of whole engines: stock vLLM and the split cache, one after the other.

    python -m benchmarks.engine.prefill benchmarks/shapes/llama-3-8b
    python -m benchmarks.engine.prefill MODEL --layers 2 --prompts 96 --hit 64 --chunk 64  # a try

Each engine runs in a process of its own on the same GPU with dummy weights, and is asked for one
token: of new prompts (--prompts, in chunks of --chunk tokens), and of prompts that begin with
--hit tokens of the prefix cache and have 16 new ones. There the split cache streams V of the whole
prefix back from the host. With V the bytes of that V over all layers, three speeds are given, as
shares of a copy from page-locked memory in the same process:

- `share`: V / TTFT. Everything else that the step does counts against it.
- `share_of_added`: V / (TTFT - TTFT of 16 tokens alone). What the prefix added; above 1 where part
  of V came while other work went on.
- in the table also V / (TTFT - stock's TTFT of the same prompt): what the link cost over having V.

One row per case goes to benchmarks/results/prefill.jsonl, with the engine's memory against its
plan (benchmarks/engine/memory.py) in the first.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, ROOT, append, command, origin

NEW_TOKENS = 16
# Prompts of so few new tokens are timed at least so often.
SHORT_TOKENS, SHORT_REPEATS = 256, 21
MOST_RATIO, LEAST_SHARE = 1.08, 0.85
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
PROGRESS, RESULT = "PROGRESS ", "RESULT "


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Start one engine and time all cases; runs in the process of that engine.

    Args:
        options: model, engine ("stock" or "kcache"), kcache_config, utilization, prompts, hit,
            chunk, repeats, max_requests, engine_arguments.
    """
    import torch
    import vllm  # noqa: F401  (its import is not the engine's memory)

    from benchmarks.engine import memory
    from vllm_kcache.config import KCacheConfig

    before, budget = memory.host_bytes(), memory.host_budget()
    started = time.monotonic()
    llm = _engine(options, on_gpu=torch.cuda.is_available())
    start_seconds = time.monotonic() - started
    _say(f"started in {start_seconds:.0f} s")
    timer = _Timer(llm, options)
    cases = [timer.prompt(tokens) for tokens in (NEW_TOKENS, *options["prompts"])]
    if options["hit"]:
        cases.append(timer.hit(options["hit"]))
    split = options["engine"] == "kcache"
    config = KCacheConfig.from_user(options["kcache_config"]) if split else None
    return {
        "start_seconds": round(start_seconds, 1),
        "v_bytes_per_token": _v_bytes_per_token(llm),
        "cases": cases,
        "memory": memory.measure_memory(llm, options["model"], config, before, budget),
        "link_gb_per_s": _link_gb_per_s() if torch.cuda.is_available() else None,
        "origin": origin("torch", "vllm"),
    }


def _engine(options: dict[str, Any], on_gpu: bool) -> Any:
    from vllm import LLM

    if on_gpu:
        how = {
            "gpu_memory_utilization": options["utilization"],
            "compilation_config": {
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": [1, 2, 4],
            },
        }
    else:
        how = {"enforce_eager": True}
    if options["engine"] == "kcache":
        how |= {"kv_backend": "kcache", "kcache_config": options["kcache_config"]}
    return LLM(
        options["model"],
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=max([*options["prompts"], options["hit"]]) + 2 * NEW_TOKENS,
        max_num_seqs=options["max_requests"],
        max_num_batched_tokens=options["chunk"],
        enable_prefix_caching=True,
        disable_log_stats=False,
        **how,
    )


class _Timer:
    """Times first tokens of random prompts."""

    def __init__(self, llm: Any, options: dict[str, Any]) -> None:
        self.llm = llm
        self.repeats = options["repeats"]
        self.vocabulary = llm.llm_engine.model_config.get_vocab_size()
        self.random = random.Random(0)

    def prompt(self, tokens: int) -> dict[str, Any]:
        """TTFT of new prompts of this length."""
        self.first_token(self.tokens(tokens), cached=0)
        repeats = self.repeats_of(tokens)
        found = [self.first_token(self.tokens(tokens), cached=0) for _ in range(repeats)]
        return self.case(f"{tokens} tokens", tokens, 0, found)

    def hit(self, tokens: int) -> dict[str, Any]:
        """TTFT of a cached prefix of this length and a few new tokens."""
        block = self.llm.llm_engine.vllm_config.cache_config.block_size
        cached = tokens // block * block
        prefix = self.tokens(cached)
        self.first_token(prefix, cached=0)
        found = [
            self.first_token(prefix + self.tokens(NEW_TOKENS), cached)
            for _ in range(self.repeats_of(NEW_TOKENS) + 1)
        ]
        return self.case(f"{cached} cached + {NEW_TOKENS}", cached + NEW_TOKENS, cached, found[1:])

    def repeats_of(self, new_tokens: int) -> int:
        """More for what takes milliseconds, most of them the CPU's: it varies by half."""
        return max(self.repeats, SHORT_REPEATS) if new_tokens <= SHORT_TOKENS else self.repeats

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(3, self.vocabulary - 3) for _ in range(count)]

    def first_token(self, prompt: list[int], cached: int) -> float:
        """Milliseconds until the first token of a prompt of which so many tokens are cached."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False, temperature=0)
        begin = time.perf_counter()
        (output,) = self.llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        elapsed_ms = (time.perf_counter() - begin) * 1e3
        if output.num_cached_tokens != cached:
            raise RuntimeError(
                f"a prompt of {len(prompt)} tokens had {output.num_cached_tokens} of them cached; "
                f"this case needs {cached}"
            )
        return elapsed_ms

    def case(self, name: str, tokens: int, cached: int, found: list[float]) -> dict[str, Any]:
        middle = sorted(found)[len(found) // 2]
        _say(f"{name}: {middle:.1f} ms of {', '.join(f'{value:.1f}' for value in found)}")
        return {
            "case": name,
            "prompt_tokens": tokens,
            "cached_tokens": cached,
            "ttft_ms": round(middle, 3),
            "ttft_ms_all": [round(value, 3) for value in found],
        }


def _v_bytes_per_token(llm: Any) -> int:
    config = llm.llm_engine.vllm_config
    model = config.model_config
    heads = model.get_num_kv_heads(config.parallel_config)
    return model.get_num_layers(config.parallel_config) * heads * model.get_head_size() * 2


def _link_gb_per_s() -> float:
    """A copy of 1 GiB from page-locked memory, in 1e9 bytes per second."""
    import torch

    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    times = []
    for _ in range(6):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        device.copy_(host, non_blocking=True)
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    return round(host.numel() / sorted(times)[len(times) // 2] / 1e6, 2)


def _say(text: str) -> None:
    print(PROGRESS + text, flush=True)


def run_in_process(options: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a fresh process; its progress is shown, its output only when it fails."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.engine.prefill", "--measure", json.dumps(options)],
        cwd=ROOT,
        env={**ENVIRONMENT, **os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    output, result = [], None
    for line in process.stdout:
        if line.startswith(PROGRESS):
            print(f"  {options['engine']}: {line.removeprefix(PROGRESS).rstrip()}", flush=True)
        elif line.startswith(RESULT):
            result = json.loads(line.removeprefix(RESULT))
        else:
            output.append(line)
    if process.wait() != 0 or result is None:
        raise RuntimeError(f"the {options['engine']} engine failed:\n{''.join(output[-60:])}")
    return result


def model_folder(source: Path, target: Path, layers: int | None, most_tokens: int) -> Path:
    """A copy of a config.json with other layers, and positions for the longest prompt."""
    config = json.loads((source / "config.json").read_text())
    if layers is not None:
        config["num_hidden_layers"] = layers
    config["max_position_embeddings"] = max(config["max_position_embeddings"], most_tokens)
    folder = target / source.name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rows_of(result: dict[str, Any], common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row per case of an engine."""
    alone_ms = result["cases"][0]["ttft_ms"]
    for number, case in enumerate(result["cases"]):
        row = {**result["origin"], **common, **case, "start_seconds": result["start_seconds"]}
        if case["cached_tokens"] and common["engine"] == "kcache":
            streamed = case["cached_tokens"] * result["v_bytes_per_token"]
            row["v_bytes"] = streamed
            row["gb_per_s"] = round(streamed / case["ttft_ms"] / 1e6, 2)
            added_ms = case["ttft_ms"] - alone_ms
            row["added_gb_per_s"] = round(streamed / added_ms / 1e6, 2) if added_ms > 0 else None
            link = result["link_gb_per_s"]
            row["link_gb_per_s"] = link
            row["share"] = round(row["gb_per_s"] / link, 3) if link else None
            added = row["added_gb_per_s"]
            row["share_of_added"] = round(added / link, 3) if link and added else None
        if number == 0:
            row["memory"] = result["memory"]
        yield row


def print_table(rows: list[dict[str, Any]]) -> None:
    """Both engines, the ratio, and what is out of the bounds."""
    stock = {row["case"]: row["ttft_ms"] for row in rows if row["engine"] == "stock"}
    for row in rows:
        text = f"{row['model']:14s} {row['engine']:7s} {row['case']:>20s} {row['ttft_ms']:10.1f} ms"
        if row["engine"] == "kcache" and row["case"] in stock:
            ratio = row["ttft_ms"] / stock[row["case"]]
            text += f"  {ratio:5.3f}x stock"
            if not row["cached_tokens"] and row["prompt_tokens"] > NEW_TOKENS:
                text += f" (at most {MOST_RATIO}: {'yes' if ratio <= MOST_RATIO else 'NO'})"
        if row.get("share"):
            enough = "yes" if row["share"] >= LEAST_SHARE else "NO"
            text += (
                f"  V {row['gb_per_s']} GB/s = {row['share']:.0%} of the link "
                f"(at least {LEAST_SHARE:.0%}: {enough}); of what it added {row['share_of_added']}"
            )
            beyond_ms = row["ttft_ms"] - stock.get(row["case"], row["ttft_ms"])
            if beyond_ms > 0:
                share = row["v_bytes"] / beyond_ms / 1e6 / row["link_gb_per_s"]
                text += f", of what it took beyond stock {share:.3f}"
        print(text, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder with a config.json")
    parser.add_argument("--prompts", type=int, nargs="*", default=[16384, 65536])
    parser.add_argument("--hit", type=int, default=32768, help="cached tokens; 0 for no such case")
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    parser.add_argument("--layers", type=int, help="of the model instead of its own number")
    parser.add_argument("--utilization", type=float, default=0.9)
    parser.add_argument("--max-requests", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", nargs="*", default=["stock", "kcache"])
    parser.add_argument("--kcache-config", type=json.loads, default={}, help="JSON")
    parser.add_argument("--label", default="", help="noted in the row")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON lines")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.model is None and parsed.measure is None:
        parser.error("model: name a folder with a config.json")
    return parsed


def main() -> None:
    """Run the engines, append rows, print a table."""
    arguments = parse()
    if arguments.measure:
        print(RESULT + json.dumps(measure(json.loads(arguments.measure))), flush=True)
        return
    from benchmarks.engine.memory import lines_against_plan

    source = Path(arguments.model).resolve()
    names = ("prompts", "hit", "chunk", "utilization", "max_requests", "repeats", "kcache_config")
    options = {name: getattr(arguments, name) for name in names}
    most_tokens = max([*arguments.prompts, arguments.hit]) + 2 * NEW_TOKENS
    rows: list[dict[str, Any]] = []
    memory: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = model_folder(source, Path(folder), arguments.layers, most_tokens)
        for engine in arguments.engines:
            result = run_in_process({**options, "model": str(model), "engine": engine})
            common = {
                "command": command(),
                "model": source.name,
                "layers": arguments.layers,
                "engine": engine,
                "chunk": arguments.chunk,
                "utilization": arguments.utilization,
                "kcache_config": arguments.kcache_config if engine == "kcache" else None,
                "label": arguments.label,
            }
            new = list(rows_of(result, common))
            for row in new:
                append(arguments.results / "prefill.jsonl", row)
            rows += new
            memory[engine] = result["memory"]
    print_table(rows)
    for engine, found in memory.items():
        other = memory.get("stock") if engine == "kcache" else None
        for line in lines_against_plan(engine, found, other):
            print(line)


if __name__ == "__main__":
    main()
