# SPDX-License-Identifier: Apache-2.0
"""The comparison on tasks of lm-evaluation-harness: arguments and pairing, without the harness."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from benchmarks.accuracy import tasks as adapter
from benchmarks.accuracy.tasks import OFFLINE_RULER
from vllm_kcache.config import KCacheConfigError


def sample(document: int, answer: str, value: float, filter_name: str = "none") -> dict[str, Any]:
    """As the harness logs it."""
    return {
        "doc_id": document, "prompt_hash": f"p{document}", "filter": filter_name,
        "resps": [[answer]], "metrics": ["exact_match"], "exact_match": value,
    }  # fmt: skip


def ruler_sample(document: int, value: float) -> dict[str, Any]:
    """One of RULER: a metric for each length, -1 where the document has another."""
    found = {**sample(document, "x", 0.0), "metrics": ["4096", "1024"], "4096": -1.0}
    return {**found, "1024": value}


class Harness:
    """Stands in for lm_eval: tasks `good` and `better` generate, `likely` compares likelihoods."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        self.drawn: list[float] = []  # by RULER, as its documents are loaded
        package, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
        package.simple_evaluate = self.simple_evaluate  # type: ignore[attr-defined]
        tasks.TaskManager = self.manager  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "lm_eval", package)
        monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)

    def manager(self, include_path: list[str], metadata: dict[str, Any]) -> Any:
        self.metadata = metadata
        kinds = {"good": "generate_until", "better": "generate_until", "likely": "loglikelihood"}
        known = {name: SimpleNamespace(OUTPUT_TYPE=kind) for name, kind in kinds.items()}
        known |= {name: SimpleNamespace(OUTPUT_TYPE="generate_until") for name in OFFLINE_RULER}
        known["both"] = {name: known[name] for name in ("good", "better")}  # type: ignore[assignment]

        def load(names: list[str]) -> dict[str, Any]:
            self.drawn.append(random.random())
            return {name: known[name] for name in names}

        return SimpleNamespace(load_task_or_group=load)

    def simple_evaluate(self, **arguments: Any) -> dict[str, Any]:
        self.calls.append(arguments)
        split = "kv_backend" in arguments["model_args"]
        good = [sample(0, "12", 1.0), sample(1, "no" if split else "7", 0.0 if split else 1.0)]
        good += [{**s, "filter": "loose", "exact_match": 1.0} for s in good]
        samples = {"good": good, "better": [sample(0, "x", 0.0), sample(1, "y", 1.0)]}
        samples |= {name: [ruler_sample(0, 1.0 - split)] for name in OFFLINE_RULER}
        return {"samples": samples, "group_subtasks": {"both": ["good", "better"]}}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Harness:
    """The engines run in this process, through the same files."""
    stand_in = Harness(monkeypatch)

    def run_engine(spec: dict[str, Any]) -> dict[str, Any]:
        return json.loads(json.dumps(adapter.evaluate(json.loads(json.dumps(spec)))))

    monkeypatch.setattr(adapter, "run_engine", run_engine)
    return stand_in


def test_stock_and_settings_are_paired(harness: Harness, tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    command = ["some/model", "--tasks", "both", "--settings", '{"coverage": 0.9}', "--limit", "2"]
    command += ["--model-args", '{"max_model_len": 512}', "--results", str(results)]
    adapter.main(command)
    first, second = (call["model_args"] for call in harness.calls)
    assert first == {"pretrained": "some/model", "enforce_eager": False, "max_model_len": 512}
    assert second == {**first, "kv_backend": "kcache", "kcache_config": {"coverage": 0.9}}
    for call in harness.calls:
        assert (call["model"], call["tasks"], call["limit"]) == ("vllm", ["both"], 2)
        assert call["log_samples"]
    stock, row = [json.loads(line) for line in results.read_text().splitlines()]
    assert (stock["kcache"], row["kcache"]) == (None, {"coverage": 0.9})
    good = row["tasks"]["good"]
    assert (good["items"], good["identical"]) == (2, 0.5)
    assert good["metrics"]["exact_match,none"] == {
        "value": 0.5, "stock_value": 1.0, "difference": -0.5, "difference_error": 0.5,
    }  # fmt: skip
    assert good["metrics"]["exact_match,loose"]["difference"] == 0
    assert row["tasks"]["better"]["identical"] == 1
    # All documents of the group together.
    both = row["tasks"]["both"]
    assert (both["items"], both["identical"]) == (4, 0.75)
    assert both["metrics"]["exact_match,none"]["difference"] == -0.25
    error = both["metrics"]["exact_match,none"]["difference_error"]
    # Differences 0, -1, 0, 0: variance 1/4, of four items.
    assert error == pytest.approx(math.sqrt(0.25 / 4))
    assert stock["tasks"]["good"]["metrics"]["exact_match,none"]["difference"] == 0


def test_an_fp8_cache_is_paired_with_stock(
    harness: Harness, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "rows.jsonl"
    command = ["some/model", "--tasks", "good", "--settings", '{"kv_cache_dtype": "fp8"}']
    adapter.main([*command, "--model-args", '{"seed": 1}', "--results", str(results)])
    first, second = (call["model_args"] for call in harness.calls)
    assert second == {**first, "kv_cache_dtype": "fp8"}
    _, row = [json.loads(line) for line in results.read_text().splitlines()]
    assert (row["kcache"], row["model_args"]) == (None, {"seed": 1, "kv_cache_dtype": "fp8"})
    assert "\nstock, fp8 cache\n" in capsys.readouterr().out


def test_tasks_of_ruler(harness: Harness, tmp_path: Path) -> None:
    """Made for the model's tokenizer and one length, and pooled; other lengths are left out."""
    results = tmp_path / "rows.jsonl"
    command = ["some/model", "--tasks", "offline_ruler", "better", "--length", "1024"]
    adapter.main([*command, "--results", str(results)])
    assert harness.metadata == {"pretrained": "some/model", "max_seq_lengths": [1024]}
    assert harness.calls[0]["tasks"] == [*OFFLINE_RULER, "better"]
    assert len(harness.drawn) == 2
    assert len(set(harness.drawn)) == 1
    _, row = [json.loads(line) for line in results.read_text().splitlines()]
    assert row["tasks"]["ruler_vt"]["metrics"].keys() == {"1024,none"}
    assert row["tasks"]["offline_ruler"]["items"] == 6
    assert row["tasks"]["offline_ruler"]["metrics"]["1024,none"]["difference"] == -1


def test_tasks_that_generate_nothing_are_refused(harness: Harness, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="tasks likely generate nothing"):
        adapter.main(["m", "--tasks", "likely", "both", "--results", str(tmp_path / "rows.jsonl")])
    assert harness.calls == []


def test_other_prompts_are_no_comparison() -> None:
    ours = {"good": [{"doc_id": 0, "prompt_hash": "a", "metrics": {}, "filter": "", "answer": ""}]}
    stock = {"good": [{**ours["good"][0], "prompt_hash": "b"}]}
    with pytest.raises(RuntimeError, match="not asked the same"):
        adapter.paired(ours, stock)


def test_bad_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for given in ('{"kv_backend": "x"}', "[1]", "{"):
        with pytest.raises(SystemExit):
            adapter.parse(["m", "--tasks", "t", "--model-args", given])
    assert "which this command sets" in capsys.readouterr().err
    with pytest.raises(KCacheConfigError, match="coverages"):
        adapter.model_arguments("m", {}, {"coverages": 1})
