# SPDX-License-Identifier: Apache-2.0
"""Texts, grids and resumption of the sweep, without an engine."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rows
from benchmarks.accuracy import __main__ as accuracy
from benchmarks.accuracy import sweep as sweep_module
from benchmarks.accuracy.grid import COVERAGES, listed, make_grid
from benchmarks.accuracy.texts import (
    Passage,
    cut,
    hash_of,
    load_passages,
    make_passages,
    read_text,
    save_passages,
)
from vllm_kcache.config import KCacheConfig, KCacheConfigError


class Letters:
    """A tokenizer: a token for each of the first characters, and a BOS token."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        tokens = [ord(letter) for letter in text[:20_000]]
        return {"input_ids": [1, *tokens] if add_special_tokens else tokens}


@pytest.fixture(scope="module")
def passages() -> list[Passage]:
    return make_passages(Letters(), 9, 1000, 50)


def test_passages_have_the_asked_lengths(passages: list[Passage]) -> None:
    assert [p.kind for p in passages] == ["prose"] * 5 + ["code"] * 4
    for passage, length in itertools.product(passages, (2, 100, 1000)):
        prompt = passage.prompt(length)
        assert len(prompt) == length
        assert prompt[0] == 1
        assert prompt[1:] == list(passage.tokens[: -len(passage.forced)][-(length - 1) :])
    assert {len(p.forced) for p in passages} == {50}
    with pytest.raises(ValueError, match="length=1002"):
        passages[0].prompt(1002)


def test_the_same_tokens_are_forced_after_every_length(passages: list[Passage]) -> None:
    text = [ord(letter) for letter in read_text("kjv.txt.gz")[:20_000]]
    first = passages[0]
    assert first.prompt(500)[1:] + first.forced == text[501:1000] + text[1000:1050]


def test_passages_are_distinct_and_named(passages: list[Passage], tmp_path: Path) -> None:
    save_passages(tmp_path / "passages.json", passages)
    assert load_passages(tmp_path / "passages.json") == passages
    assert len({tuple(p.forced) for p in passages}) == len(passages)
    assert hash_of(passages) == hash_of(make_passages(Letters(), 9, 1000, 50))
    assert hash_of(passages) != hash_of(make_passages(Letters(), 9, 1000, 49))


def test_forced_parts_never_overlap() -> None:
    spans = cut(list(range(1000)), "text", 10, 500, 50)
    forced = [set(span[-50:]) for span in spans]
    assert all(not a & b for a, b in itertools.combinations(forced, 2))
    assert spans[0][0] == 0
    assert spans[-1][-1] == 999
    with pytest.raises(ValueError, match="too few for 11"):
        cut(list(range(1000)), "text", 11, 500, 50)
    with pytest.raises(ValueError, match="too few for 1"):
        cut(list(range(10)), "text", 1, 20, 5)


@pytest.mark.parametrize("name", ["default", "quick"])
@pytest.mark.parametrize("v_block_tokens", [4, 8, 16, 32])
@pytest.mark.parametrize("has_mean_tail", [True, False])
def test_every_setting_of_a_grid_is_valid(
    name: str, v_block_tokens: int, has_mean_tail: bool
) -> None:
    engines = make_grid(name, v_block_tokens, None, None, has_mean_tail)
    assert engines[0].start == {"v_block_tokens": v_block_tokens, "dense_layers": 0}
    starts = [json.dumps(engine.start) for engine in engines]
    assert len(set(starts)) == len(starts)
    for engine in engines:
        assert {"top_n": "all"} in engine.settings
        for setting in engine.settings:
            config = KCacheConfig.from_user({**engine.start, **setting})
            config.selection(engine.v_block_tokens)
            assert has_mean_tail or config.tail != "mean"
    if name == "default":
        assert {engine.start["dense_layers"] for engine in engines} == {0, 1, 2}
        assert all({"coverage": c, "head_combine": "max"} in engines[0].settings for c in COVERAGES)
        noted = [reason for _, reason in engines[0].skipped]
        assert has_mean_tail == ("only the CPU implementation has it" not in noted)


def test_fixed_tokens_are_those_asked_for() -> None:
    main = make_grid("default", 16, None, None, False)[0]
    fixed = [s for s in main.settings if "coverage" not in s and s.get("top_n", "all") != "all"]
    assert {s["top_n"] * 16 for s in fixed} == {32, 64, 128, 256, 512, 1024}
    # 32 tokens have no room for the 8 + 32 that are kept by default.
    assert {"top_n": 2, "sink_tokens": 8, "recent_tokens": 1} in fixed


def test_listed_settings_share_an_engine() -> None:
    settings = [{"coverage": 0.9}, {"dense_layers": 1, "top_n": 8}, {"top_n": "all"}]
    engines = listed(settings, 16)
    assert [engine.settings for engine in engines] == [
        [{"coverage": 0.9}, {"top_n": "all"}],
        [{"top_n": 8}],
    ]
    with pytest.raises(KCacheConfigError, match="top_m"):
        listed([{"top_m": 8}], 16)


MODEL_CONFIG = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_attention_heads": 2,
    "vocab_size": 1000,
}


@pytest.fixture
def sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes sweeps whose engines only write the rows they are asked for."""
    from transformers import AutoTokenizer

    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(MODEL_CONFIG))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path: Letters())
    started: list[tuple[str, list[tuple[int, int]]]] = []

    def run_engine(name: str, spec: dict[str, Any], *rest: Any) -> None:
        jobs = [(job["length"], len(job["settings"])) for job in spec["jobs"]]
        started.append((name, jobs))
        for job in spec["jobs"]:
            for setting in job["settings"]:
                with open(spec["results"], "a") as file:
                    file.write(json.dumps(setting["row"]) + "\n")

    monkeypatch.setattr(sweep_module, "run_engine", run_engine)

    def sweep(*more: str) -> list[tuple[str, list[tuple[int, int]]]]:
        started.clear()
        accuracy.main(
            ["sweep", str(tmp_path / "model"), "--items", "4", "--forced", "20", "--work",
             str(tmp_path), "--results", str(tmp_path / "rows.jsonl"), *more]
        )  # fmt: skip
        return list(started)

    return sweep


def test_a_repeated_sweep_runs_what_is_missing(sweeps: Any, monkeypatch: Any) -> None:
    settings = ["--settings", '[{"coverage": 0.9}, {"top_n": 8, "dense_layers": 1}]']
    one, other = (json.dumps({"v_block_tokens": 8, "dense_layers": layers}) for layers in (0, 1))
    first = sweeps("--lengths", "500", "300", *settings)
    both = [(300, 1), (500, 1)]
    assert first == [("stock", both), (one, both), (other, both)]
    assert sweeps("--lengths", "300", "500", *settings) == []
    more = ["--settings", '[{"coverage": 0.9}, {"coverage": 0.8}]']
    assert sweeps("--lengths", "300", "500", *more) == [("stock", both), (one, both)]
    # Other code is another measurement.
    monkeypatch.setattr(rows, "commit", lambda: "another")
    assert sweeps("--lengths", "300", "500", *settings) == first


def test_stock_is_not_run_again_while_its_logits_are_there(sweeps: Any) -> None:
    kept = ["--lengths", "300", "--keep-work", "--settings"]
    one = json.dumps({"v_block_tokens": 8, "dense_layers": 0})
    assert sweeps(*kept, '[{"coverage": 0.9}]') == [("stock", [(300, 1)]), (one, [(300, 1)])]
    assert sweeps(*kept, '[{"coverage": 0.8}]') == [(one, [(300, 1)])]


def test_bad_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for given, message in (("0", "at least 1"), ("1", "must be JSON objects")):
        with pytest.raises(SystemExit):
            accuracy.parse(
                [
                    "sweep",
                    "model",
                    "--items",
                    given,
                    "--settings",
                    "[{}]" if given == "0" else "[1]",
                ]
            )
        assert message in capsys.readouterr().err
