# SPDX-License-Identifier: Apache-2.0
"""Builds the CUDA extension with nvcc: `python csrc/build.py`, or by setup.py at install time.

The extension uses PyTorch's stable ABI only, so one build serves PyTorch 2.11 and newer, and every
CPython. KCACHE_CUDA_ARCHS names the compute capabilities, e.g. "80;90" (the default).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCE = Path(__file__).resolve().parent
OUTPUT = SOURCE.parent / "vllm_kcache" / "_C.abi3.so"
SOURCES = ("bindings.cpp", "select.cu", "fetch.cu", "follow.cu")
DEFAULT_ARCHS = "80;90"
TORCH_TARGET = "0x020b000000000000"  # PyTorch 2.11


def find_nvcc() -> str | None:
    """The CUDA compiler: $CUDA_HOME/bin/nvcc, nvcc of the PATH, or /usr/local/cuda's."""
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else []
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def torch_root() -> Path | None:
    """Folder of the installed torch, found without importing it.

    A build that pip isolates does not see the packages of its environment, so they are looked for.
    """
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    return next((path for path in candidates if (path / "include").is_dir()), None)


def reason_not_to_build() -> str | None:
    """Why an install goes without the extension; None when it should be built."""
    torch = torch_root()
    if find_nvcc() is None:
        return "nvcc was not found"
    if torch is None:
        return "torch is not installed yet (install it, then vllm-kcache again)"
    if "cuda: Optional[str] = None" in (torch / "version.py").read_text():
        return "this torch is a CPU build"
    return None


def compile_command(nvcc: str, torch: Path, output: Path, archs: str) -> list[str]:
    flags = ["-shared", "-Xcompiler", "-fPIC", "-std=c++20", "-O3", "-Xptxas", "-v"]
    for arch in archs.split(";"):
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    newest = archs.split(";")[-1]
    # The driver compiles this for GPUs newer than all of the above.
    flags += ["-gencode", f"arch=compute_{newest},code=compute_{newest}"]
    flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DUSE_CUDA", f"-I{torch / 'include'}"]
    sources = [str(SOURCE / name) for name in SOURCES]
    # Nothing here names a symbol of torch at link time that the linker would keep a library for.
    libraries = [
        f"-L{torch / 'lib'}",
        "-Xlinker",
        "--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]
    return [nvcc, *flags, "-cudart", "static", "-t", "0", *sources, *libraries, "-o", str(output)]


def build(output: Path = OUTPUT) -> Path:
    """Compile to `output`. Raises RuntimeError when nvcc or torch is missing, or nvcc fails."""
    nvcc, torch = find_nvcc(), torch_root()
    if nvcc is None or torch is None:
        raise RuntimeError(f"cannot build the CUDA extension: {reason_not_to_build()}")
    archs = os.environ.get("KCACHE_CUDA_ARCHS", DEFAULT_ARCHS)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(".tmp")
    command = compile_command(nvcc, torch, temporary, archs)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    temporary.replace(output)
    if "-v" in sys.argv:
        print(result.stderr)
    return output


if __name__ == "__main__":
    print(f"built {build()}")
