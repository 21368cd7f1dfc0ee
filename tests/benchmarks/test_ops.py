# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of the operations run through, without a GPU: every call is made, none is timed.

`python -m tests.csrc.interpreted LIBRARY tests.benchmarks.test_ops` does so, with
TRITON_INTERPRET=1 in the environment.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = ("write", "score", "select", "fetch", "attend", "overlap", "layer")


@pytest.mark.slow
def test_every_call_is_made(library: Path) -> None:
    """In a process of its own: the interpreter must be on before Triton is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.csrc.interpreted", str(library), __name__],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert "every operation left its rows" in done.stdout


class OnCPU(TorchFunctionMode):
    """Tensors asked for on a GPU are made on the CPU."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def main() -> None:
    """Run every operation on a small problem; the figures of a hit and of a miss must be theirs."""
    from benchmarks.ops import common
    from benchmarks.rows import load

    folder = Path(tempfile.mkdtemp())
    small = common.Problem("small", 2, 512, 2, 2, head_size=64)
    make, pool = common.DecodeWorkspace.make, common.HostPool

    def call_all(calls: Sequence[Callable[[], Any]], replays: int = 15) -> common.Timing:
        for call in calls:
            call()
        return common.Timing(1.0, 2.0, 3.0)

    common.time_calls = call_all
    common.PROBLEMS = (small,)
    common.hbm_copy_bandwidth = lambda: 1e12
    common.link_bandwidths = lambda: (1e10, 1e10)
    common.arguments = lambda *_, **__: Namespace(results=folder, sweep=False)
    common.DecodeWorkspace.make = (
        lambda *given, **named: make(  # type: ignore[assignment]
            *given[:-1], "cpu", **named
        )
    )
    common.HostPool = lambda *given, pinned: pool(*given, pinned=False)  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.Tensor.pin_memory = lambda self: self  # type: ignore[assignment,method-assign]
    for name in OPERATIONS:
        module = importlib.import_module(f"benchmarks.ops.{name}")
        fewer = {
            "BLOCKS": (4, 8), "PLANS": getattr(module, "PLANS", ())[:2],
            "CODED_PROBLEMS": (small,), "CODED_BLOCKS": 8, "PROBLEMS": (small,),
            "SPECULATED": (small,),
        }  # fmt: skip
        for constant, value in {**fewer, "Problem": lambda *_: small}.items():
            if hasattr(module, constant):
                setattr(module, constant, value)
        if name == "layer":
            module.Layers.kernel_us = lambda self: {}
        with OnCPU():
            module.main()
    rows = {name: load(folder / f"{name}.jsonl") for name in OPERATIONS}
    for name, found in rows.items():
        assert found, name
        assert all(row["operation"] == name and row["ms"]["p50"] == 2.0 for row in found), name
    for row in rows["fetch"]:
        # Of the calls of one cache, eight over four lists, the first four miss.
        assert ("all hit" in row["shape"]) == (row["hit_rate"] >= 0.5), row
    assert any("no followers" in row["shape"] for row in rows["overlap"])
    alone, together = rows["layer"]
    assert 4 <= alone["mean_blocks"] <= 64
    assert 4 <= together["mean_blocks"] < together["mean_shared_blocks"] <= 64
    print("every operation left its rows")


if __name__ == "__main__":
    main()
