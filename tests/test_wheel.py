# SPDX-License-Identifier: Apache-2.0
"""What a wheel holds, with and without the extension, and when a source install builds it."""

from __future__ import annotations

import configparser
import email
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from csrc import build as cuda_build

REPOSITORY = Path(__file__).resolve().parents[1]
BUILT_FROM = ("vllm_kcache", "csrc", "pyproject.toml", "setup.py", "README.md", "LICENSE")
# Stands for nvcc and g++: writes its own arguments where the library should go.
NVCC = """#!/bin/sh
for argument; do output=$argument; done
echo "$@" > "$output"
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that nothing that was built in the repository comes along."""
    folder = tmp_path_factory.mktemp("sources")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in BUILT_FROM:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
        else:
            shutil.copy(REPOSITORY / name, folder / name)
    return folder


def build_wheel(sources: Path, output: Path, **environment: str) -> Path:
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
        "--no-index", "--wheel-dir", str(output), str(sources),
    ]
    # fmt: on
    shutil.rmtree(sources / "build", ignore_errors=True)
    subprocess.run(command, check=True, env={**os.environ, **environment})
    (wheel,) = output.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def pure_wheel(
    sources: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[zipfile.ZipFile]:
    path = build_wheel(sources, tmp_path_factory.mktemp("pure"), KCACHE_CUDA_ARCHS="")
    with zipfile.ZipFile(path) as archive:
        yield archive


def read_dist_info(wheel: zipfile.ZipFile, name: str) -> str:
    (member,) = (m for m in wheel.namelist() if m.endswith(f".dist-info/{name}"))
    return wheel.read(member).decode()


def test_a_wheel_holds_the_package_and_nothing_else(
    pure_wheel: zipfile.ZipFile, sources: Path
) -> None:
    package = sources / "vllm_kcache"
    expected = {str(path.relative_to(sources)) for path in package.rglob("*") if path.is_file()}
    assert "vllm_kcache/py.typed" in expected
    found = {name for name in pure_wheel.namelist() if ".dist-info/" not in name}
    assert found == expected
    assert str(pure_wheel.filename).endswith("-py3-none-any.whl")


def test_the_metadata_names_pythons_commands_and_plugins(pure_wheel: zipfile.ZipFile) -> None:
    metadata = email.message_from_string(read_dist_info(pure_wheel, "METADATA"))
    assert metadata["Requires-Python"] == "<3.14,>=3.10"
    assert {"cpu", "cuda"} <= set(metadata.get_all("Provides-Extra", []))
    always = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert [requirement.split(">")[0] for requirement in always] == ["pydantic"]
    entry_points = configparser.ConfigParser()
    entry_points.read_string(read_dist_info(pure_wheel, "entry_points.txt"))
    assert "vllm-kcache" in entry_points["console_scripts"]
    for group in ("general_plugins", "platform_plugins", "stat_logger_plugins"):
        module = entry_points[f"vllm.{group}"]["kcache"].split(":")[0]
        assert f"{module.replace('.', '/')}.py" in pure_wheel.namelist()


def test_with_nvcc_one_wheel_has_the_extension_for_every_python(
    sources: Path, tmp_path: Path
) -> None:
    tools = tmp_path / "cuda" / "bin"
    tools.mkdir(parents=True)
    for name in ("nvcc", "g++"):
        (tools / name).write_text(NVCC)
        (tools / name).chmod(0o755)
    path = build_wheel(
        sources,
        tmp_path,
        CUDA_HOME=str(tools.parent),
        KCACHE_CUDA_ARCHS="80;100",
        PATH=f"{tools}:{os.environ['PATH']}",
    )
    assert "-cp310-abi3-linux_" in path.name
    with zipfile.ZipFile(path) as wheel:
        command = wheel.read("vllm_kcache/_C.abi3.so").decode().split()
    assert "arch=compute_80,code=sm_80" in command
    assert "arch=compute_100,code=compute_100" in command
    compiled = {Path(word).name for word in command if word.endswith((".cu", ".cpp"))}
    assert compiled == {p.name for p in (sources / "csrc").iterdir() if p.suffix in (".cu", ".cpp")}


def test_without_nvcc_the_build_asks_for_it_as_a_package(sources: Path) -> None:
    script = (
        "import shutil; shutil.which = lambda name: None\n"
        "import setuptools.build_meta as backend; print(backend.get_requires_for_build_wheel())"
    )
    for archs, asked in (("90", True), ("", False)):
        answer = subprocess.run(
            [sys.executable, "-c", script],
            check=True,
            capture_output=True,
            text=True,
            cwd=sources,
            env={**os.environ, "KCACHE_CUDA_ARCHS": archs},
        )
        assert (cuda_build.NVCC_REQUIREMENT in answer.stdout) == asked, answer


def test_without_nvcc_a_build_fails_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: None)
    with pytest.raises(RuntimeError, match=r"missing: nvcc.*wheel.*KCACHE_CUDA_ARCHS"):
        cuda_build.build(Path("unused"))


@pytest.mark.parametrize(
    ("archs", "cuda_of_torch", "gpu", "wanted"),
    [
        (None, "None", True, False),
        (None, "'13.0'", False, True),
        (None, None, True, True),
        (None, None, False, False),
        ("", "'13.0'", True, False),
        ("90", "None", False, True),
    ],
)
def test_who_wants_the_extension(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    archs: str | None,
    cuda_of_torch: str | None,
    gpu: bool,
    wanted: bool,
) -> None:
    monkeypatch.delenv("KCACHE_CUDA_ARCHS", raising=False)
    if archs is not None:
        monkeypatch.setenv("KCACHE_CUDA_ARCHS", archs)
    (tmp_path / "version.py").write_text(f"cuda: Optional[str] = {cuda_of_torch}\n")
    torch = None if cuda_of_torch is None else tmp_path
    monkeypatch.setattr(cuda_build, "torch_root", lambda: torch)
    monkeypatch.setattr(cuda_build, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: None)
    assert cuda_build.wanted() is wanted
    assert bool(cuda_build.requirements()) is wanted
