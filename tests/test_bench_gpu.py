# SPDX-License-Identifier: Apache-2.0
"""tools/bench_gpu.sh without a GPU: its commands exist, and what it does with those that fail."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(("name", "words"), commands())
def test_commands_exist(name: str, words: list[str]) -> None:
    module = f"benchmarks.{words[0]}"
    found = importlib.util.find_spec(module)
    assert found is not None, module
    assert found.origin is not None, module
    # Some take what all operations take, and a package has its commands in __main__.
    files = [Path(found.origin), ROOT / "benchmarks/ops/common.py", ROOT / "benchmarks/rows.py"]
    files += Path(found.origin).parent.glob("*.py") if words[0] == "accuracy" else []
    source = "".join(file.read_text() for file in files)
    for word in words[1:]:
        if word.startswith("--"):
            assert f'"{word}"' in source, f"{module} does not take {word}"
        elif "/" in word and word.startswith("benchmarks/"):
            assert (ROOT / word / "config.json").exists(), word


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


def run(tree: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """The script in that tree."""
    return subprocess.run(
        [tree / SCRIPT, *names],
        env={**os.environ, "PYTHON": str(tree / "python"), "OUT": str(tree / "out")},
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
