# SPDX-License-Identifier: Apache-2.0
"""Which engines a command of the accuracy benchmark starts, and what each measures."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks import accuracy_process, accuracy_rows
from benchmarks.accuracy_engine import stock_logits_path
from benchmarks.accuracy_grid import EngineSettings
from benchmarks.accuracy_rows import Rows, key_of
from vllm_kcache.cache.host_memory import host_budget_bytes
from vllm_kcache.config import KCacheConfig

GIB = 2**30
# Where all V fits this much GPU memory, it stays there: nothing is fetched twice.
MOST_HOT_CACHE_GIB = 24


class Plan:
    """Plans the engines of a command and runs those whose rows are missing.

    A subclass says what is measured: it sets `kind`, calls `prepare`, and defines `engines`,
    `common_of`, `logits_rows`, `held_tokens` and `save_texts`.

    Args:
        options: the command line.
        command: how it was given, for the rows.
    """

    kind: str

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        from transformers import AutoConfig

        self.options = options
        self.command = command
        self.rows = Rows(options.results)
        self.lengths = sorted(set(options.lengths))
        self.config = AutoConfig.from_pretrained(options.model)
        self.gpu = accuracy_rows.on_gpu()

    def prepare(self, max_model_len: int, max_num_seqs: int, dtype: str) -> None:
        """Fix the engine's arguments and what names this measurement."""
        self.engine = self._engine_arguments(max_model_len, max_num_seqs, dtype)
        # Everything that decides an outcome, besides the texts and the settings of the split cache.
        self.common = {
            "kind": self.kind,
            "model": Path(self.options.model).name,
            "engine": {k: v for k, v in self.engine.items() if k != "model"},
            **{
                k: v
                for k, v in accuracy_rows.environment(self.command).items()
                if k in ("device", "versions", "commit")
            },
        }
        of_lengths = [self.common_of(length) for length in self.lengths]
        self.work = self.options.work / f"kcache-accuracy-{key_of({'all': of_lengths})}"

    def _engine_arguments(
        self, max_model_len: int, max_num_seqs: int, dtype: str
    ) -> dict[str, Any]:
        options = self.options
        batched = options.max_num_batched_tokens or (8192 if self.gpu else 2048)
        arguments: dict[str, Any] = {
            "model": str(Path(options.model).resolve()),
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max(batched, max_num_seqs),
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
        page = self.options.block_size or (16 if self.gpu else 32)
        return KCacheConfig().resolved_v_block_tokens(self.head_size(), 2, page)

    def head_size(self) -> int:
        """D."""
        config = self.config
        head_size = getattr(config, "head_dim", None)
        return head_size or config.hidden_size // config.num_attention_heads

    def engines(self) -> list[EngineSettings]:
        """The engines that the options ask for."""
        raise NotImplementedError

    def common_of(self, length: int) -> dict[str, Any]:
        """What a row of a length has beside its setting; it decides the key."""
        raise NotImplementedError

    def logits_rows(self, length: int) -> int:
        """Rows of stock's logits of a length."""
        raise NotImplementedError

    def held_tokens(self) -> int:
        """Tokens that should fit the cache at once."""
        raise NotImplementedError

    def save_texts(self) -> dict[str, str]:
        """Write the texts into the work folder; returns what the specification says of them."""
        raise NotImplementedError

    def row(self, length: int, setting: dict[str, Any] | None) -> dict[str, Any]:
        """What is known of a row before it is measured."""
        in_full = (
            None if setting is None else KCacheConfig.from_user(setting).model_dump(mode="json")
        )
        common = self.common_of(length)
        key = key_of({**common, "length": length, "kcache": in_full})
        now = accuracy_rows.environment(self.command)
        return {"key": key, **common, **now, "length": length, "kcache": setting}

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
        """Whether what stock left is still there: it is larger than what goes into the rows."""
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
        texts = self.save_texts()
        stock = self.jobs(None)
        needed = {job["length"] for _, jobs in todo for job in jobs}
        stock = [job for job in stock if job["length"] in needed]
        if stock:
            self._check_disk([job["length"] for job in stock])
            self._run_engine("stock", None, stock, texts)
            for job in stock:
                stock_logits_path(self.work, job["length"]).with_suffix(".done").touch()
        for engine, jobs in todo:
            self._run_engine(json.dumps(engine.start), engine, jobs, texts)
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

    def _check_disk(self, lengths: list[int]) -> None:
        rows = sum(self.logits_rows(length) for length in lengths)
        needed = rows * self.config.vocab_size * 4
        free = shutil.disk_usage(self.work).free
        if needed > free:
            raise SystemExit(
                f"stock's logits need {needed / GIB:.1f} GiB and {self.work} has "
                f"{free / GIB:.1f} GiB: choose another folder with --work, or fewer items"
            )

    def _run_engine(
        self,
        name: str,
        engine: EngineSettings | None,
        jobs: list[dict[str, Any]],
        texts: dict[str, str],
    ) -> None:
        spec = {
            "kind": self.kind,
            "engine": self.engine,
            "kcache": None if engine is None else self._start_settings(engine),
            "v_block_tokens": None if engine is None else engine.v_block_tokens,
            "work": str(self.work),
            "results": str(self.options.results.resolve()),
            "jobs": jobs,
            **texts,
        }
        accuracy_process.run_engine(name, spec, self.work, self.gpu, self.options.cpu_cache_gib)

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
        itemsize = 4 if self.engine["dtype"] == "float32" else 2
        per_token = config.num_hidden_layers * kv_heads * self.head_size() * itemsize
        needed = self.held_tokens() * per_token
        settings: dict[str, Any] = {}
        if 1.2 * needed < host_budget_bytes("auto", 1):
            settings["host_memory_gib"] = 1.2 * needed / GIB
        if needed < MOST_HOT_CACHE_GIB * GIB:
            settings["hot_cache_gib"] = 1.1 * needed / GIB
        return settings
