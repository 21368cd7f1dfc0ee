# SPDX-License-Identifier: Apache-2.0
"""Many starts of vLLM for the price of one import: each in a fork of a process that imported it.

    python -m tests.integration.forked SPEC.json OUT.json

The specification: {"imports": [modules], "commands": {name: arguments of `vllm`}, "calls": {name:
["module:function", arguments...]}}. A fork starts from what a process knows right after these
imports: no parser has been built, and no plugin loaded beyond what importing did. The outcome of
each: {"code": exit code, "stdout", "stderr", "result": what a call returned}.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What `vllm` imports before it builds its parser, in its order (vllm/entrypoints/cli/main.py).
COMMAND_IMPORTS = [
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.benchmark.main",
    "vllm.entrypoints.cli.collect_env",
    "vllm.entrypoints.cli.download_kernels",
    "vllm.entrypoints.cli.launch",
    "vllm.entrypoints.cli.openai",
    "vllm.entrypoints.cli.preload",
    "vllm.entrypoints.cli.run_batch",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.cli.snapshot",
]


def run_command(arguments: list[str]) -> None:
    """What the `vllm` script does."""
    sys.argv = ["vllm", *arguments]
    from vllm.entrypoints.cli.main import main

    sys.exit(main())


def run_call(target: str, *arguments: Any) -> Any:
    """Call "module:function"."""
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)(*arguments)


def outcome(work: Callable[[], Any]) -> dict[str, Any]:
    """Run `work` in a fork of this process."""
    # Not a TemporaryDirectory: the child's exit functions would remove it.
    folder = Path(tempfile.mkdtemp())
    paths = {name: folder / name for name in ("stdout", "stderr", "result")}
    child = os.fork()
    if child == 0:
        _child(work, paths)
    _, status = os.waitpid(child, 0)
    result = paths["result"]
    found = {
        "code": os.waitstatus_to_exitcode(status),
        "stdout": paths["stdout"].read_text(),
        "stderr": paths["stderr"].read_text(),
        "result": json.loads(result.read_text()) if result.exists() else None,
    }
    shutil.rmtree(folder)
    return found


def _child(work: Callable[[], Any], paths: dict[str, Path]) -> None:
    """Run `work`, leave what came of it in files, and end the process."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        with open(paths[name], "w") as file:
            os.dup2(file.fileno(), descriptor)
    code = 0
    try:
        paths["result"].write_text(json.dumps(work()))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    # Leaving the way `sys.exit` does would run the parent's code after the fork.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Entry point: paths of the specification and of the outcomes."""
    source, target = map(Path, sys.argv[1:3])
    spec = json.loads(source.read_text())
    for name in spec["imports"]:
        importlib.import_module(name)
    outcomes = {
        name: outcome(lambda arguments=arguments: run_command(arguments))
        for name, arguments in spec.get("commands", {}).items()
    }
    for name, arguments in spec.get("calls", {}).items():
        outcomes[name] = outcome(lambda arguments=arguments: run_call(*arguments))
    target.write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
