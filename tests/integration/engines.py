# SPDX-License-Identifier: Apache-2.0
"""Runs engines for the tests of this folder, and the texts they are given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration import stock_results
from tests.integration.generate import ENVIRONMENT

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


def spec_of(
    batches: list[dict[str, Any]], kcache: dict[str, Any] | None = None, **engine: Any
) -> dict[str, Any]:
    """The specification of an engine, for tests/integration/generate.py.

    Args:
        batches: See tests/integration/generate.py.
        kcache: Settings of the split cache, with k_bits 16 unless they say 4; None is stock vLLM.
        engine: Changes to `ENGINE`.
    """
    arguments = {**ENGINE, **engine}
    if kcache is not None:
        arguments.update(kv_backend="kcache", kcache_config={"k_bits": 16, **kcache})
    return {"engine": arguments, "batches": batches}


@dataclass(frozen=True)
class Runs:
    """What came of engines that ran one after the other.

    Attributes:
        outcomes: By name, see tests/integration/forked.py.
    """

    outcomes: dict[str, dict[str, Any]]

    def __getitem__(self, name: str) -> dict[str, Any]:
        """The result of an engine; AssertionError, with its output, when it failed."""
        outcome = self.outcomes[name]
        assert outcome["code"] == 0, f"{name} ended with {outcome['code']}:\n{self.error_of(name)}"
        return outcome["result"]

    def error_of(self, name: str) -> str:
        """The end of an engine's output."""
        outcome = self.outcomes[name]
        return outcome["stdout"][-3000:] + outcome["stderr"][-6000:]


def in_forks(folder: Path, calls: dict[str, list[Any]], *first: str) -> dict[str, dict[str, Any]]:
    """Outcome of each call, in a fork of one process that has imported vLLM (forked.py), and before
    it these modules."""
    source, target = folder / "calls.json", folder / "outcomes.json"
    source.write_text(json.dumps({"imports": [*first, "vllm.entrypoints.llm"], "calls": calls}))
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.forked", str(source), str(target)],
        cwd=ROOT,
        env={**ENVIRONMENT, **os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(target.read_text())


def run_engines(tmp_path: Path, specs: dict[str, dict[str, Any]]) -> Runs:
    """Run engines by name, each on the CPU in a fork of one process that has imported vLLM.

    What stock vLLM generates is kept between runs of the tests (stock_results.py).
    """
    keys = {
        name: stock_results.key_of(spec)
        for name, spec in specs.items()
        if "kv_backend" not in spec["engine"]
    }
    outcomes = {
        name: {"code": 0, "result": known}
        for name, key in keys.items()
        if (known := stock_results.read(key)) is not None
    }
    outcomes |= in_forks(
        tmp_path,
        {
            name: ["tests.integration.generate:run", spec]
            for name, spec in specs.items()
            if name not in outcomes
        },
    )
    for name, key in keys.items():
        if outcomes[name]["code"] == 0:
            stock_results.write(key, outcomes[name]["result"])
    return Runs(outcomes)


def run_engine(
    tmp_path: Path,
    batches: list[dict[str, Any]],
    kcache: dict[str, Any] | None = None,
    **engine: Any,
) -> dict[str, Any]:
    """Run batches on a fresh engine in its own process.

    Args:
        tmp_path: Where to put the specification and the result.
        batches, kcache, engine: See `spec_of`.
    """
    spec = spec_of(batches, kcache, **engine)
    name = "stock" if kcache is None else "kcache"
    source, target = tmp_path / f"{name}.spec.json", tmp_path / f"{name}.out.json"
    source.write_text(json.dumps(spec))
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
