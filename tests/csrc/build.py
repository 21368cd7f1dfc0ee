# SPDX-License-Identifier: Apache-2.0
"""Builds csrc/ for the host, so that its kernels run where there is no GPU.

The sources are those of csrc/ but for the headers that emulator/ replaces, and for what C++ has no
words for: launches, shared memory and the dispatch key. Needs a C++ compiler and torch's
headers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from torch import __version__ as torch_version

from csrc.build import SOURCE, SOURCES, TORCH_TARGET, torch_root
from tests.kept import digest, digest_of_files

EMULATOR = Path(__file__).resolve().parent / "emulator"
# The emulator's longjmp between stacks is what _FORTIFY_SOURCE, some compilers' default, forbids.
# Fused multiply-adds would make a mass depend on the host's instruction set.
FLAGS = (
    "-shared", "-fPIC", "-std=c++20", "-O1", "-pthread", "-Wno-unknown-pragmas",
    "-U_FORTIFY_SOURCE",
    "-ffp-contract=off",
)  # fmt: skip


def compiler() -> str | None:
    """The C++ compiler: $CXX, or g++ or clang++ of the PATH."""
    candidates = [os.environ.get("CXX", ""), "g++", "clang++"]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def translate(text: str) -> str:
    """CUDA C++ of csrc/ to C++."""
    text = re.sub(
        r"__shared__ ([\w<>]+) (\w+)(\[\w+\])?;",
        r"auto& \2 = emulator::shared_variable<\1\3>(__LINE__);",
        text,
    )
    text = re.sub(
        r"(\w+(?:<[\w(), ]+>)?)\s*<<<(.*?)>>>\(",
        r"emulator::launch(\1, \2)(",
        text,
        flags=re.DOTALL,
    )
    library = "STABLE_TORCH_LIBRARY_IMPL(kcache, {},"
    return text.replace(library.format("CUDA"), library.format("CPU"))


def compile_library(sources: list[Path], folder: Path, name: str, *flags: str) -> Path:
    """Compile sources, and the emulator, to `folder / name`; RuntimeError when that fails.

    What the sources include is looked for in their own folder first.
    """
    output = folder / name
    emulator = [f"-I{EMULATOR}", str(EMULATOR / "emulator.cpp")]
    command = [str(compiler()), *FLAGS, *map(str, sources), *emulator, *flags, "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return output


def key() -> str:
    """Of all that decides what `build` makes: the sources, the emulator, the compiler, torch."""
    sources = [*SOURCE.glob("*.cu*"), *SOURCE.glob("*.h"), *SOURCE.glob("*.cpp")]
    emulator = [path for path in EMULATOR.iterdir() if path.is_file()]
    recipes = [Path(__file__), SOURCE / "build.py"]
    done = subprocess.run(
        [str(compiler()), "--version"], capture_output=True, text=True, check=True
    )
    files = digest_of_files(*sorted(sources), *sorted(emulator), *recipes)
    return digest(files, done.stdout, torch_version)


def build(folder: Path) -> Path:
    """Compile csrc/ into `folder`, which must exist.

    Returns:
        A library for `torch.ops.load_library`: the operations of csrc/bindings.cpp on the CPU.
    """
    for path in [*SOURCE.glob("*.cu*"), *SOURCE.glob("*.h"), *SOURCE.glob("*.cpp")]:
        target = folder / path.name
        if path.suffix == ".cu":
            target = target.with_suffix(".cpp")
        target.write_text(translate(path.read_text()))
    for name in ("ptx.cuh", "device.h", "dependent.cuh"):
        shutil.copy(EMULATOR / name, folder / name)
    torch = torch_root()
    assert torch is not None
    return compile_library(
        [(folder / name).with_suffix(".cpp") for name in SOURCES],
        folder,
        "kcache_emulated.so",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        f"-I{torch / 'include'}",
        f"-L{torch / 'lib'}",
        *("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"),
    )
