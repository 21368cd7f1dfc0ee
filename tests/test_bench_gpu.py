# SPDX-License-Identifier: Apache-2.0
"""tools/bench_gpu.sh without a GPU: its commands, and what it does with those that fail."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.replay.record import V_BLOCK_TOKENS
from vllm_kcache.config import KCacheConfig

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "tools/bench_gpu.sh"
# Notes what it is called with, writes a row, and fails where it is to.
PYTHON = """#!/bin/sh
echo "$*" >>calls
echo '{"new": 1}' >>benchmarks/results/layer.jsonl
case "$*" in *--drafts*) exit 3 ;; esac
"""


def commands() -> list[tuple[str, list[str]]]:
    """Names, and a command's words."""
    listed = subprocess.run(
        [ROOT / SCRIPT, "--list"], capture_output=True, text=True, check=True
    ).stdout
    lines = [line.split("\t") for line in listed.splitlines()]
    return [(name, command.split()) for name, command in lines]


class Parsed(Exception):
    """Raised with what a command line means, before anything runs."""


@pytest.mark.parametrize(("name", "words"), commands())
def test_commands_are_understood(
    name: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"benchmarks.{words[0]}"
    if hasattr(importlib.import_module(module), "__path__"):
        module += ".__main__"
    parse_args = argparse.ArgumentParser.parse_args

    def parse(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> None:
        raise Parsed(parse_args(parser, arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr("sys.argv", [module, *words[1:]])
    with pytest.raises(Parsed) as parsed:
        importlib.import_module(module).main()
    (options,) = parsed.value.args
    model = str(getattr(options, "model", ""))
    if not model.startswith("benchmarks/"):
        return
    config = json.loads((ROOT / model / "config.json").read_text())
    if words[0] == "engine.decode" and options.mode == "replay":
        # What is recorded is of blocks of one size, which a head size may not have by default.
        head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        asked = KCacheConfig(v_block_tokens=options.v_block_tokens or "auto")
        assert asked.resolved_v_block_tokens(head_size, 2, 16) == V_BLOCK_TOKENS


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree in which benchmarks only say that they were called."""
    for folder in ("tools", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / SCRIPT, tmp_path / SCRIPT)
    (tmp_path / "benchmarks/results/layer.jsonl").write_text('{"old": 1}\n')
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def run(tree: Path, *names: str, out: str = "out") -> subprocess.CompletedProcess[str]:
    """The script in that tree."""
    return subprocess.run(
        [tree / SCRIPT, *names],
        env={**os.environ, "PYTHON": str(tree / "python"), "OUT": str(tree / out)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_all_run_and_new_rows_are_brought(tree: Path) -> None:
    done = run(tree, "layer", "--", "mixed", "acceptance")
    assert done.returncode == 0, done.stdout + done.stderr
    calls = (tree / "calls").read_text().splitlines()
    assert calls[0] == "-m benchmarks.ops.layer"
    assert sorted(calls[1:])[1] == "-m benchmarks.engine.mixed_load --minutes 15 --k-bits 4"
    assert '--settings {"k_bits":4}' in sorted(calls[1:])[0]
    assert (tree / "out/layer.jsonl").read_text() == '{"new": 1}\n' * 3
    assert (tree / "out/mixed.1.log").exists()


def test_one_that_fails_is_told_and_stops_no_other(tree: Path) -> None:
    done = run(tree, "drafts", "--", "mixed-drafts", "layer")
    assert done.returncode == 1
    assert done.stdout.count("exit code 3") == 2
    assert "ok    layer, ops.layer" in done.stdout
    assert len((tree / "calls").read_text().splitlines()) == 3


def test_an_unknown_name_starts_nothing(tree: Path) -> None:
    done = run(tree, "layer", "laier")
    assert done.returncode == 2
    assert "unknown name laier; accepted: 7b acceptance" in done.stderr
    assert not (tree / "calls").exists()


def test_rows_are_not_written_over(tree: Path) -> None:
    done = run(tree, "layer", out="benchmarks/results")
    assert done.returncode == 2
    assert "name another folder" in done.stderr
    assert (tree / "benchmarks/results/layer.jsonl").read_text() == '{"old": 1}\n'
