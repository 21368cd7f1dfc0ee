# SPDX-License-Identifier: Apache-2.0
"""Check the house rules that ruff and mypy do not know. Exit code 1 and one line for each breach.

- Every source file that is not empty begins with its licence and has at most 600 lines.
- No body of a Python function has more than 60 lines, its docstring not counted. Bodies of Triton
  kernels may have 120: what they keep in registers cannot be handed around freely.
- Only vllm_kcache/integration/ and the tests of it import vLLM.
- No file is called utils.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LICENSE_LINE = "SPDX-License-Identifier: Apache-2.0"
SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh", ".sh"}
MOST_FILE_LINES = 600
MOST_FUNCTION_LINES = 60
MOST_KERNEL_LINES = 120
CORE = Path("vllm_kcache")
INTEGRATION = CORE / "integration"


def main() -> int:
    breaches = [breach for path in source_files() for breach in check_file(path)]
    for breach in breaches:
        print(breach)
    return 1 if breaches else 0


def source_files() -> list[Path]:
    """Sources that git knows or would add, relative to the repository."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = {Path(name) for name in listing.stdout.split("\0") if name}
    return sorted(
        path for path in paths if path.suffix in SOURCE_SUFFIXES and (REPOSITORY / path).is_file()
    )


def check_file(path: Path) -> Iterator[str]:
    text = (REPOSITORY / path).read_text()
    lines = text.splitlines()
    if lines and not any(LICENSE_LINE in line for line in lines[:2]):
        yield f"{path}:1: the line '{LICENSE_LINE}' is missing"
    if len(lines) > MOST_FILE_LINES:
        yield f"{path}: {len(lines)} lines; at most {MOST_FILE_LINES}"
    if path.stem == "utils":
        yield f"{path}: 'utils' says nothing about what is in it"
    if path.suffix == ".py":
        yield from check_python(path, ast.parse(text))


def check_python(path: Path, tree: ast.Module) -> Iterator[str]:
    core = CORE in path.parents and INTEGRATION not in path.parents
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines, most = body_lines(node), most_lines(node)
            if lines > most:
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines; at most {most}"
        elif core and any(name.split(".")[0] == "vllm" for name in imported_names(node)):
            yield f"{path}:{node.lineno}: imports vllm; only {INTEGRATION} may"


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement after the docstring to the last."""
    statements = function.body
    if ast.get_docstring(function, clean=False) is not None:
        statements = statements[1:]
    if not statements:
        return 0
    return (statements[-1].end_lineno or statements[-1].lineno) - statements[0].lineno + 1


def most_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    is_kernel = any(name.startswith("triton.jit") for name in decorators)
    return MOST_KERNEL_LINES if is_kernel else MOST_FUNCTION_LINES


def imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
        return [node.module]
    return []


if __name__ == "__main__":
    sys.exit(main())
