# SPDX-License-Identifier: Apache-2.0
"""What the selection costs in accuracy, through the real vLLM engine, stock beside the split cache.

    python -m benchmarks.accuracy sweep MODEL --lengths 2048 4096 8000 --grid default
    python -m benchmarks.accuracy sweep MODEL --settings '[{"coverage": 0.97}, {"top_n": 32}]'

`sweep` forces the tokens of real text one by one on the decode path. Stock vLLM runs first and its
logits are kept; each setting of the split cache is then compared with them at every position, over
the whole vocabulary: KL(stock || split), perplexity, and how often both put the same token first.
The tokens are the same at every length of context, and only prompts differ.

Each engine runs in a process of its own, and is reconfigured between the settings that need no new
one; so it runs without CUDA graphs. Rows go to benchmarks/results/accuracy.jsonl as they are known.
A command that is repeated leaves out what it finds there: same settings, tokens, device, versions
and commit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import accuracy_rows
from benchmarks.accuracy_engine import save_passages, stock_logits_path
from benchmarks.accuracy_grid import GRIDS, EngineSettings, listed, make_grid
from benchmarks.accuracy_rows import RESULTS, ROOT, Rows, key_of
from benchmarks.accuracy_texts import hash_of, make_passages
from vllm_kcache.cache.host_memory import host_budget_bytes
from vllm_kcache.config import KCacheConfig

GIB = 2**30
# Where all V fits this much GPU memory, it stays there: nothing is fetched twice.
MOST_HOT_CACHE_GIB = 24
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # One process for an engine: its files and counters are at hand, and it ends when told to.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


class Sweep:
    """Plans the engines of a sweep and runs those whose rows are missing.

    Args:
        options: the command line.
        command: how it was given, for the rows.
    """

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.options = options
        self.rows = Rows(options.results)
        self.lengths = sorted(options.lengths)
        model = options.model
        self.config = AutoConfig.from_pretrained(model)
        self.passages = make_passages(
            AutoTokenizer.from_pretrained(model), options.items, self.lengths[-1], options.forced
        )
        self.gpu = accuracy_rows.on_gpu()
        self.engine = self._engine_arguments()
        # Everything that decides an outcome, besides the settings of the split cache.
        self.common = {
            "kind": "forced",
            "model": Path(model).name,
            "engine": {k: v for k, v in self.engine.items() if k != "model"},
            "texts": hash_of(self.passages),
            "items": len(self.passages),
            "forced": options.forced,
            **{
                k: v
                for k, v in accuracy_rows.environment(command).items()
                if k in ("device", "versions", "commit")
            },
        }
        self.command = command
        self.work = options.work / f"kcache-accuracy-{key_of(self.common)}"

    def _engine_arguments(self) -> dict[str, Any]:
        options = self.options
        batched = options.max_num_batched_tokens or (8192 if self.gpu else 2048)
        arguments: dict[str, Any] = {
            "model": str(Path(options.model).resolve()),
            "dtype": options.dtype,
            "max_model_len": self.lengths[-1] + options.forced,
            "max_num_seqs": len(self.passages),
            "max_num_batched_tokens": batched,
            "block_size": options.block_size or (16 if self.gpu else 32),
            "enable_prefix_caching": True,
            # CUDA graphs would hold one selection.
            "enforce_eager": True,
            "seed": 0,
        }
        if self.gpu:
            arguments["gpu_memory_utilization"] = options.gpu_memory_utilization
        return arguments

    def v_block_tokens(self) -> int:
        """V block that "auto" means for the model."""
        return KCacheConfig().resolved_v_block_tokens(
            self.head_size(), 2, self.engine["block_size"]
        )

    def head_size(self) -> int:
        """D."""
        config = self.config
        head_size = getattr(config, "head_dim", None)
        return head_size or config.hidden_size // config.num_attention_heads

    def engines(self) -> list[EngineSettings]:
        """The engines that the options ask for."""
        options, size = self.options, self.v_block_tokens()
        if options.settings is not None:
            return listed(json.loads(options.settings), size)
        return make_grid(options.grid, size, options.v_blocks, options.dense_layers, not self.gpu)

    def row(self, length: int, setting: dict[str, Any] | None) -> dict[str, Any]:
        """What is known of a row before it is measured."""
        in_full = (
            None if setting is None else KCacheConfig.from_user(setting).model_dump(mode="json")
        )
        key = key_of({**self.common, "length": length, "kcache": in_full})
        now = accuracy_rows.environment(self.command)
        return {"key": key, **self.common, **now, "length": length, "kcache": setting}

    def jobs(self, engine: EngineSettings | None) -> list[dict[str, Any]]:
        """Lengths and settings of an engine that are still to measure; None is stock."""
        jobs = []
        for length in self.lengths:
            settings = []
            for setting in [None] if engine is None else engine.settings:
                full = None if engine is None else {**engine.start, **(setting or {})}
                row = self.row(length, full)
                if engine is None:
                    wanted = not self._has_stock(length, row["key"])
                else:
                    wanted = row["key"] not in self.rows
                if wanted and row["key"] not in [s["row"]["key"] for s in settings]:
                    settings.append({"kcache": setting, "row": row})
            if settings:
                jobs.append({"length": length, "settings": settings})
        return jobs

    def _has_stock(self, length: int, key: str) -> bool:
        """Whether stock's logits are still there: they are larger than what goes into the rows."""
        marker = stock_logits_path(self.work, length).with_suffix(".done")
        return key in self.rows and marker.exists()

    def run(self) -> None:
        """Stock first, then one engine after the other."""
        engines = [(engine, self.jobs(engine)) for engine in self.engines()]
        self._note_skipped([engine for engine, _ in engines])
        todo = [(engine, jobs) for engine, jobs in engines if jobs]
        count = sum(len(job["settings"]) for _, jobs in todo for job in jobs)
        print(f"{count} rows to measure on {len(todo)} engines of the split cache", flush=True)
        if not todo:
            return
        self.work.mkdir(parents=True, exist_ok=True)
        passages = self.work / "passages.json"
        save_passages(passages, self.passages)
        stock = self.jobs(None)
        needed = {job["length"] for _, jobs in todo for job in jobs}
        stock = [job for job in stock if job["length"] in needed]
        if stock:
            self._check_disk(len(stock))
            self._run_engine("stock", None, stock)
            for job in stock:
                stock_logits_path(self.work, job["length"]).with_suffix(".done").touch()
        for engine, jobs in todo:
            self._run_engine(json.dumps(engine.start), engine, jobs)
        if not self.options.keep_work:
            shutil.rmtree(self.work)

    def _note_skipped(self, engines: list[EngineSettings]) -> None:
        for engine in engines:
            for setting, reason in engine.skipped:
                full = {**engine.start, **setting}
                key = key_of({**self.common, "kcache": full, "skipped": reason})
                if key not in self.rows:
                    now = accuracy_rows.environment(self.command)
                    row = {"key": key, **self.common, **now, "kcache": full, "skipped": reason}
                    self.rows.add(row)
                print(f"skipped {json.dumps(full)}: {reason}", flush=True)

    def _check_disk(self, num_lengths: int) -> None:
        positions = len(self.passages) * self.options.forced
        needed = num_lengths * positions * self.config.vocab_size * 4
        free = shutil.disk_usage(self.work).free
        if needed > free:
            raise SystemExit(
                f"stock's logits need {needed / GIB:.1f} GiB and {self.work} has "
                f"{free / GIB:.1f} GiB: choose another folder with --work, or fewer items"
            )

    def _run_engine(
        self, name: str, engine: EngineSettings | None, jobs: list[dict[str, Any]]
    ) -> None:
        spec = {
            "engine": self.engine,
            "kcache": None if engine is None else self._start_settings(engine),
            "v_block_tokens": None if engine is None else engine.v_block_tokens,
            "passages": str(self.work / "passages.json"),
            "work": str(self.work),
            "results": str(self.options.results.resolve()),
            "jobs": jobs,
        }
        run_engine(name, spec, self.work, self.gpu, self.options.cpu_cache_gib)

    def _start_settings(self, engine: EngineSettings) -> dict[str, Any]:
        start = dict(engine.start)
        if any(setting.get("tail") == "mean" for setting in engine.settings):
            start["tail"] = "mean"
        if self.gpu:
            start.update(self._gpu_memory())
        if self.options.hot_cache_gib is not None:
            start["hot_cache_gib"] = self.options.hot_cache_gib
        return start

    def _gpu_memory(self) -> dict[str, Any]:
        """Room for just the contexts: pinning what the GPU could fill would take half a minute.

        What is resident changes the speed of a run and nothing else.
        """
        config = self.config
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        itemsize = 4 if self.options.dtype == "float32" else 2
        per_token = config.num_hidden_layers * kv_heads * self.head_size() * itemsize
        longest = self.lengths[-1] + self.options.forced + 2 * self.engine["block_size"]
        needed = len(self.passages) * longest * per_token
        settings: dict[str, Any] = {}
        if 1.2 * needed < host_budget_bytes("auto", 1):
            settings["host_memory_gib"] = 1.2 * needed / GIB
        if needed < MOST_HOT_CACHE_GIB * GIB:
            settings["hot_cache_gib"] = 1.1 * needed / GIB
        return settings


def run_engine(
    name: str, spec: dict[str, Any], work: Path, gpu: bool, cpu_cache_gib: int | None
) -> None:
    """Run benchmarks.accuracy_engine in a fresh process. Its log is shown when it fails.

    Raises:
        SystemExit: it failed.
    """
    path, log = work / "spec.json", work / f"engine-{time.time_ns()}.log"
    path.write_text(json.dumps(spec))
    environment = {
        **ENVIRONMENT,
        "VLLM_CPU_KVCACHE_SPACE": "4",
        # There are two model runners with an interface each; say which, so that it is known.
        "VLLM_USE_V2_MODEL_RUNNER": "1" if gpu else "0",
        **os.environ,
    }
    if cpu_cache_gib is not None:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(cpu_cache_gib)
    print(f"engine {name}; its log: {log}", flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.accuracy_engine", str(path)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            # vLLM logs to standard output, too.
            if line.startswith(("INFO", "WARNING", "ERROR", "DEBUG", "(")):
                file.write(line)
                file.flush()
            else:
                print(line, end="", flush=True)
    if process.wait() != 0:
        raise SystemExit(f"the engine failed ({process.returncode}):\n{log.read_text()[-6000:]}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
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
    sweep.add_argument("--grid", choices=GRIDS, default="default")
    sweep.add_argument("--settings", help="JSON list of kcache_config, instead of a grid")
    sweep.add_argument("--v-blocks", type=int, nargs="+", help="V blocks of the grid, tokens")
    sweep.add_argument("--dense-layers", type=int, nargs="+", help="dense layers of the grid")
    sweep.add_argument("--dtype", default="float32")
    sweep.add_argument("--block-size", type=int, help="tokens of a K page (GPU 16, CPU 32)")
    sweep.add_argument("--max-num-batched-tokens", type=int, help="(GPU 8192, CPU 2048)")
    sweep.add_argument("--gpu-memory-utilization", type=float, default=0.85)
    sweep.add_argument("--hot-cache-gib", type=float, help="hot V cache; large is fast")
    sweep.add_argument("--cpu-cache-gib", type=int, help="cache of the CPU engine (4)")
    sweep.add_argument("--results", type=Path, default=RESULTS)
    sweep.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()), help="where stock's logits go"
    )
    sweep.add_argument("--keep-work", action="store_true", help="keep them, for the next command")
    options = parser.parse_args(arguments)
    if options.items < 1 or options.forced < 1 or min(options.lengths) < 1:
        parser.error("--items, --forced and --lengths must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    # The parent must not touch the network, either.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    Sweep(options, " ".join(["python -m benchmarks.accuracy", *given])).run()


if __name__ == "__main__":
    main()
