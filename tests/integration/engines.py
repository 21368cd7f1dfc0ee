# SPDX-License-Identifier: Apache-2.0
"""Runs engines for the tests of this folder, and the texts they are given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODEL = os.environ.get("KCACHE_TEST_MODEL", str(ROOT / "models/SmolLM2-135M-Instruct"))
ENGINE = {
    "model": MODEL,
    "dtype": "float32",
    "max_model_len": 4096,
    "max_num_batched_tokens": 1024,
    "block_size": 32,
    "enforce_eager": True,
    "seed": 0,
}
GATE = {"top_n": "all"}


def kjv(first_line: int, num_lines: int) -> str:
    """Verses of the King James Bible (tests/data)."""
    lines = (ROOT / "tests/data/kjv.txt").read_text().splitlines()
    return " ".join(lines[first_line : first_line + num_lines])


def run_engine(
    tmp_path: Path,
    batches: list[dict[str, Any]],
    kcache: dict[str, Any] | None = None,
    **engine: Any,
) -> dict[str, Any]:
    """Run batches on a fresh engine in its own process.

    Args:
        tmp_path: Where to put the specification and the result.
        batches: See tests/integration/generate.py.
        kcache: Settings of the split cache; None runs stock vLLM.
        engine: Changes to `ENGINE`.
    """
    arguments = {**ENGINE, **engine}
    if kcache is not None:
        arguments.update(kv_backend="kcache", kcache_config=kcache)
    name = "stock" if kcache is None else "kcache"
    source, target = tmp_path / f"{name}.spec.json", tmp_path / f"{name}.out.json"
    source.write_text(json.dumps({"engine": arguments, "batches": batches}))
    log = tmp_path / f"{name}.log"
    with open(log, "w") as file:
        done = subprocess.run(
            [sys.executable, "-m", "tests.integration.generate", str(source), str(target)],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        raise AssertionError(f"engine failed ({done.returncode}):\n{log.read_text()[-6000:]}")
    return json.loads(target.read_text())


def tokens_of(result: dict[str, Any]) -> list[list[list[list[int]]]]:
    """Token ids by batch, request and completion."""
    return [[row["tokens"] for row in batch] for batch in result["batches"]]
