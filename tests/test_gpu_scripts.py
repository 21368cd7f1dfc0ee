# SPDX-License-Identifier: Apache-2.0
"""tools/test_gpu.sh without a GPU: what it starts, how many at a time, and how it ends."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.name for path in (ROOT / "tests/gpu").glob("test_*.py"))
IN_PARTS = ["test_code_steps.py", "test_decode.py", "test_kernels.py", "test_lists.py"]
# A GPU is there; a test file notes how many run beside it, and one of them fails.
PYTHON = """#!/bin/sh
[ "$1" = -c ] && exit 0
for file; do :; done
mkdir "$OUT/running.$$"
echo "$(basename "$file") $GPU_TEST_SHARD $(ls -d "$OUT"/running.* | wc -l)" >>"$OUT/calls"
sleep 0.3
rmdir "$OUT/running.$$"
case "$file" in *test_lists.py) exit 5 ;; esac
echo "7 passed"
"""


def run(tmp_path: Path, *files: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """The script, and of each file it started: name, part, how many ran then."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    done = subprocess.run(
        [ROOT / "tools/test_gpu.sh", *files],
        env={**os.environ, "PYTHON": str(python), "OUT": str(tmp_path), "JOBS": "9"},
        capture_output=True,
        text=True,
        check=False,
    )
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    return done, calls


def test_every_file_runs_and_a_failure_is_the_end_result(tmp_path: Path) -> None:
    done, calls = run(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert sorted({name for name, *_ in calls}) == FILES
    parts = sorted(f"{name} {part}" for name, part, _ in calls if name in IN_PARTS)
    assert parts == [f"{name} {part}/3" for name in IN_PARTS for part in (1, 2, 3)]
    assert done.stdout.count("FAIL  test_lists_") == 3
    assert done.stdout.count(": 7 passed") == len(calls) - 3
    assert 1 < max(int(beside) for *_, beside in calls) <= 9


def test_named_files_alone(tmp_path: Path) -> None:
    done, calls = run(tmp_path, "tests/gpu/test_codes.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert calls == [["test_codes.py", "1/1", "1"]]
