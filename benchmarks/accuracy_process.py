# SPDX-License-Identifier: Apache-2.0
"""One engine of the accuracy benchmark, in a process of its own.

    python -m benchmarks.accuracy_process SPEC.json

The specification, made by the benchmark's commands: `kind` ("forced" or "tasks"); `engine`,
arguments of `vllm.LLM`; `kcache`, the settings that the split cache starts with, or null for stock;
`v_block_tokens`; `work`, a folder for what stock leaves; `results`, the file that rows are added
to; `jobs`, a list of {"length", "settings": [{"kcache", "row"}]}; and where the texts are:
`passages` or `items`. Each row is written when it is known.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.accuracy_rows import ROOT

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # One process for an engine: its files and counters are at hand, and it ends when told to.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def run_engine(
    name: str, spec: dict[str, Any], work: Path, gpu: bool, cpu_cache_gib: int | None
) -> None:
    """Run this module in a fresh process. Its log is shown when it fails.

    Args:
        name: what is printed of it.
        spec: see the module.
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
            [sys.executable, "-m", "benchmarks.accuracy_process", str(path)],
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


def main() -> None:
    """Entry point: the path of the specification."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    begin = time.perf_counter()
    if spec["kind"] == "tasks":
        from benchmarks.accuracy_answers import AnswersRun as Run
    else:
        from benchmarks.accuracy_forced import ForcedRun as Run
    run = Run(spec)
    print(f"engine started in {time.perf_counter() - begin:.0f} s", flush=True)
    for job in spec["jobs"]:
        run.measure_length(job["length"], job["settings"])


if __name__ == "__main__":
    main()
