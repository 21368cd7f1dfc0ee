# SPDX-License-Identifier: Apache-2.0
"""Builds the CUDA extension with nvcc: `python csrc/build.py`, or by setup.py at install time.

The extension uses PyTorch's stable ABI only, so one build serves PyTorch 2.11 and newer, and every
CPython. KCACHE_CUDA_ARCHS names the compute capabilities, e.g. "80;90"; empty, no extension.
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
SOURCES = tuple(sorted(path.name for kind in ("*.cpp", "*.cu") for path in SOURCE.glob(kind)))
# sm_80 code runs on 8.6 and 8.9, too; what is newer than the last compiles its PTX.
DEFAULT_ARCHS = "80;90;100"
TORCH_TARGET = "0x020b000000000000"  # PyTorch 2.11
# The compiler as packages. 13.0: each driver that runs PyTorch for CUDA 13 reads its PTX.
NVCC_REQUIREMENT = "cuda-toolkit[nvcc,nvvm,cccl]==13.0.*"
TORCH_REQUIREMENT = "torch>=2.11"


def find_nvcc() -> str | None:
    """The CUDA compiler: $CUDA_HOME/bin/nvcc, the packages', the PATH's, or /usr/local/cuda's."""
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else []
    packages = importlib.util.find_spec("nvidia")
    candidates += [
        f"{folder}/cu13/bin/nvcc"
        for folder in (packages and packages.submodule_search_locations) or ()
    ]
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


def has_nvidia_gpu() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    listing = subprocess.run([command, "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def wanted() -> bool:
    """Whether an install must have the extension: it is built then, or the install fails.

    KCACHE_CUDA_ARCHS decides if it is set. Else an installed torch decides by what it is made for,
    and where there is none yet, a GPU does. So an install for the CPU downloads no compiler.
    """
    archs = os.environ.get("KCACHE_CUDA_ARCHS")
    if archs is not None:
        return archs != ""
    torch = torch_root()
    if torch is None:
        return has_nvidia_gpu()
    return "cuda: Optional[str] = None" not in (torch / "version.py").read_text()


def requirements() -> list[str]:
    """What pip has to install for the build, none without the extension."""
    if not wanted():
        return []
    missing = [NVCC_REQUIREMENT] if find_nvcc() is None else []
    return missing + ([TORCH_REQUIREMENT] if torch_root() is None else [])


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
    libraries = ["-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    # The CUDA runtime is the one that libtorch brings. nvcc's static one would need the glibc of
    # the machine that builds.
    runtime = ["-cudart", "none", "-cudadevrt", "none"]
    return [
        *(nvcc, *flags, *runtime, "-t", "0", *sources),
        *(f"-L{torch / 'lib'}", *libraries, "-o", str(output)),
    ]


def build(output: Path = OUTPUT) -> Path:
    """Compile to `output`. Raises RuntimeError when a tool is missing, or nvcc fails."""
    nvcc, torch = find_nvcc(), torch_root()
    if nvcc is None or torch is None or shutil.which("g++") is None:
        missing = {"nvcc": nvcc, "torch": torch, "g++": shutil.which("g++")}
        raise RuntimeError(
            "cannot build the CUDA extension of vllm-kcache, missing: "
            + ", ".join(name for name, found in missing.items() if found is None)
            + ". Install the wheel, which has it; or install these and try again; or, for a "
            "machine that will not serve on a GPU, set KCACHE_CUDA_ARCHS to nothing"
        )
    archs = os.environ.get("KCACHE_CUDA_ARCHS") or DEFAULT_ARCHS
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
