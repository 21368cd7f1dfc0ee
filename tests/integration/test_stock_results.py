# SPDX-License-Identifier: Apache-2.0
"""A kept result of stock vLLM is taken only for what made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import kept
from tests.integration import stock_results


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(kept, "FOLDER", tmp_path / "kept")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    return {"engine": {"model": str(model), "dtype": "float32"}, "batches": [{"prompts": ["a"]}]}


def test_a_result_is_found_again(spec: dict[str, Any], tmp_path: Path) -> None:
    key = stock_results.key_of(spec)
    assert stock_results.read(key) is None
    stock_results.write(key, {"batches": [1]})
    assert stock_results.read(key) == {"batches": [1]}
    # The same files in another folder.
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    spec["engine"]["model"] = str(tmp_path / "elsewhere")
    assert stock_results.key_of(spec) == key


@pytest.mark.parametrize("what", ["weights", "engine", "batches", "variable", "package", "program"])
def test_nothing_stale_is_found(
    what: str, spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = stock_results.key_of(spec)
    if what == "weights":
        (tmp_path / "model/model.safetensors").write_bytes(b"weighty")
    elif what == "engine":
        spec["engine"]["dtype"] = "bfloat16"
    elif what == "batches":
        spec["batches"][0]["prompts"] = ["b"]
    elif what == "variable":
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    elif what == "package":
        monkeypatch.setattr(stock_results, "PACKAGES", ("torch",))
    else:
        changed = tmp_path / "generate.py"
        changed.write_text("# something else")
        monkeypatch.setattr(stock_results, "PROGRAM", [changed])
    assert stock_results.key_of(spec) != key


def test_only_the_newest_are_kept(spec: dict[str, Any]) -> None:
    for number in range(kept.MOST + 3):
        stock_results.write(f"{number:03d}", {"number": number})
    assert len(list(kept.FOLDER.iterdir())) == kept.MOST
    assert stock_results.read(f"{kept.MOST + 2:03d}") == {"number": kept.MOST + 2}
