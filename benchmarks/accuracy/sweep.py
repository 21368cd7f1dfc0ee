# SPDX-License-Identifier: Apache-2.0
"""Which engines a sweep starts, and what each measures: rows that are there are left out."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import rows
from benchmarks.accuracy.engine import stock_logits_path
from benchmarks.accuracy.settings import EngineSettings, by_engine, default_settings
from benchmarks.accuracy.texts import hash_of, make_passages, save_passages
from benchmarks.rows import ROOT, Row, Rows, key_of
from vllm_kcache.cache.formats import RowFormat
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
    """Forces the passages of bundled texts with stock and with each setting.

    Args:
        options: the command line.
        command: how it was given, for the rows.
    """

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        from transformers import AutoConfig, AutoTokenizer
        from vllm.platforms import current_platform

        self.options = options
        self.command = command
        self.rows = Rows(options.results)
        self.lengths = sorted(set(options.lengths))
        self.config = AutoConfig.from_pretrained(options.model)
        self.gpu = not current_platform.is_cpu()
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        longest = self.lengths[-1]
        self.passages = make_passages(tokenizer, options.items, longest, options.forced)
        self.page_tokens = options.block_size or (16 if self.gpu else 32)
        self.engine = self._engine_arguments(longest + options.forced)
        # Everything that decides an outcome, besides the settings of the split cache.
        self.common: Row = {
            "kind": "forced",
            "model": Path(options.model).name,
            "engine": {k: v for k, v in self.engine.items() if k != "model"},
            **{
                k: v
                for k, v in rows.environment(command).items()
                if k in ("device", "versions", "commit")
            },
            "texts": hash_of(self.passages),
            "items": len(self.passages),
            "forced": options.forced,
        }
        name = key_of({**self.common, "lengths": self.lengths})
        self.work = options.work / f"kcache-accuracy-{name}"

    def _engine_arguments(self, max_model_len: int) -> dict[str, Any]:
        options = self.options
        batched = options.max_num_batched_tokens or (8192 if self.gpu else 2048)
        arguments: dict[str, Any] = {
            "model": str(Path(options.model).resolve()),
            "dtype": options.dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": len(self.passages),
            "max_num_batched_tokens": max(batched, len(self.passages)),
            "block_size": self.page_tokens,
            "enable_prefix_caching": True,
            # CUDA graphs would hold one selection.
            "enforce_eager": True,
            "seed": 0,
        }
        if self.gpu:
            arguments["gpu_memory_utilization"] = 0.85
        return {**arguments, **options.engine}

    def head_size(self) -> int:
        """D."""
        config = self.config
        head_size = getattr(config, "head_dim", None)
        return head_size or config.hidden_size // config.num_attention_heads

    def engines(self) -> list[EngineSettings]:
        """The engines that the options ask for."""
        size = KCacheConfig().resolved_v_block_tokens(self.head_size(), 2, self.page_tokens)
        return by_engine(self.options.settings or default_settings(size), size)

    def row(self, length: int, setting: dict[str, Any] | None, arguments: dict[str, Any]) -> Row:
        """What is known of a row before it is measured.

        Args:
            length: of the context.
            setting: of the split cache; None for stock.
            arguments: of `vllm.LLM`, beside those of every engine.
        """
        in_full = None
        if setting is not None:
            config = KCacheConfig.from_user(setting)
            in_full = config.model_dump(mode="json")
            # In the row, whatever "auto" is by then: it has been another.
            setting = {**setting, "k_bits": config.resolved_k_bits}
            if config.has_mass_threshold:
                setting["threshold_length"] = config.resolved_threshold_length
        common = {**self.common, "engine": {**self.common["engine"], **arguments}}
        key = key_of({**common, "length": length, "kcache": in_full})
        now = rows.environment(self.command)
        return {"key": key, **common, **now, "length": length, "kcache": setting}

    def jobs(self, engine: EngineSettings | None) -> list[dict[str, Any]]:
        """Lengths and settings of an engine that are still to measure; None is plain stock, whose
        logits the others are compared with."""
        start = None if engine is None else engine.start
        arguments = {} if engine is None else engine.arguments
        jobs = []
        for length in self.lengths:
            settings: list[dict[str, Any]] = []
            for setting in [None] if engine is None else engine.settings:
                full = None if start is None else {**start, **(setting or {})}
                row = self.row(length, full, arguments)
                is_there = row["key"] in self.rows
                if engine is None:
                    # What stock left is larger than what goes into the rows.
                    is_there = is_there and self._done(length).exists()
                if not is_there and row["key"] not in [s["row"]["key"] for s in settings]:
                    settings.append({"kcache": None if start is None else setting, "row": row})
            if settings:
                jobs.append({"length": length, "settings": settings})
        return jobs

    def _done(self, length: int) -> Path:
        """There when stock's logits are complete."""
        return stock_logits_path(self.work, length).with_suffix(".done")

    def run(self) -> None:
        """Stock first, then one engine after the other."""
        todo = [(engine, jobs) for engine in self.engines() if (jobs := self.jobs(engine))]
        count = sum(len(job["settings"]) for _, jobs in todo for job in jobs)
        print(f"{count} rows to measure on {len(todo)} engines beside stock", flush=True)
        if not todo:
            return
        self.work.mkdir(parents=True, exist_ok=True)
        save_passages(self.work / "passages.json", self.passages)
        needed = {job["length"] for _, jobs in todo for job in jobs}
        stock = [job for job in self.jobs(None) if job["length"] in needed]
        if stock:
            self._check_disk(len(stock))
            self._run_engine("stock", None, stock)
            for job in stock:
                self._done(job["length"]).touch()
        for engine, jobs in todo:
            self._run_engine(engine.name, engine, jobs)
        if not self.options.keep_work:
            shutil.rmtree(self.work)

    def _check_disk(self, lengths: int) -> None:
        positions = lengths * len(self.passages) * self.options.forced
        needed = positions * self.config.vocab_size * 4
        free = shutil.disk_usage(self.work).free
        if needed > free:
            raise SystemExit(
                f"stock's logits need {needed / GIB:.1f} GiB and {self.work} has "
                f"{free / GIB:.1f} GiB: choose another folder with --work, or fewer items"
            )

    def _run_engine(
        self, name: str, engine: EngineSettings | None, jobs: list[dict[str, Any]]
    ) -> None:
        start = None if engine is None else engine.start
        spec = {
            "engine": {**self.engine, **(engine.arguments if engine else {})},
            "is_reference": engine is None,
            "kcache": None if start is None else self._start_settings(start),
            "v_block_tokens": None if start is None else start["v_block_tokens"],
            "work": str(self.work),
            "results": str(self.options.results.resolve()),
            "passages": str(self.work / "passages.json"),
            "jobs": jobs,
        }
        run_engine(name, spec, self.work, self.gpu, self.options.cpu_cache_gib)

    def _start_settings(self, start: dict[str, Any]) -> dict[str, Any]:
        settings = dict(start)
        if self.gpu:
            settings.update(self._gpu_memory(start))
        if self.options.hot_cache_gib is not None:
            settings["hot_cache_gib"] = self.options.hot_cache_gib
        return settings

    def _gpu_memory(self, start: dict[str, Any]) -> dict[str, Any]:
        """Room for just the contexts: pinning what the GPU could fill would take half a minute.

        What is resident changes the speed of a run and nothing else.
        """
        config, split = self.config, KCacheConfig.from_user(start)
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dtype = torch.float32 if self.engine["dtype"] == "float32" else torch.bfloat16
        tokens = start["v_block_tokens"]
        host_dtype = split.resolved_host_dtype(dtype)
        row = RowFormat(tokens, self.head_size(), dtype, split.resolved_k_bits, host_dtype)
        per_token = config.num_hidden_layers * kv_heads * row.bytes / tokens
        each = self.lengths[-1] + self.options.forced + 2 * self.page_tokens
        needed = len(self.passages) * each * per_token
        settings: dict[str, Any] = {}
        if 1.2 * needed < host_budget_bytes("auto", 1):
            settings["host_memory_gib"] = 1.2 * needed / GIB
        if needed < MOST_HOT_CACHE_GIB * GIB:
            settings["hot_cache_gib"] = 1.1 * needed / GIB
        return settings


def run_engine(
    name: str, spec: dict[str, Any], work: Path, gpu: bool, cpu_cache_gib: int | None
) -> None:
    """Run `engine.py` in a fresh process. Its log is shown when it fails.

    Args:
        name: what is printed of it.
        spec: see there.
        work: folder of the specification and the log.
        gpu: vLLM runs on a GPU here.
        cpu_cache_gib: cache of the CPU engine; None is 4.

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
            [sys.executable, "-m", "benchmarks.accuracy.engine", str(path)],
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
