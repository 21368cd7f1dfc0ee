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
from benchmarks.accuracy import engine as engine_module
from benchmarks.accuracy import sweep as sweep_module
from benchmarks.accuracy.engine import EngineRun
from benchmarks.accuracy.settings import by_engine, default_settings
from benchmarks.accuracy.texts import (
    Passage,
    cut,
    hash_of,
    load_passages,
    make_passages,
    read_text,
    save_passages,
)
from benchmarks.engine.decode_engine import SPARE_TOKENS
from benchmarks.figures import family_of
from vllm_kcache.config import KCacheConfigError


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


@pytest.mark.parametrize("v_block_tokens", [4, 8, 16, 32])
def test_default_settings_are_valid(v_block_tokens: int) -> None:
    (engine,) = by_engine(default_settings(v_block_tokens), v_block_tokens)
    assert engine.start == {"v_block_tokens": v_block_tokens, "dense_layers": 0}
    fixed = [s["top_n"] for s in engine.settings if s.get("top_n", "all") != "all"]
    assert [top_n * v_block_tokens for top_n in fixed] == [128, 512]


def test_settings_share_an_engine() -> None:
    settings = [{"coverage": 0.9}, {"dense_layers": 1, "top_n": 8}, {"top_n": "all"}]
    engines = by_engine(settings, 16)
    assert [engine.settings for engine in engines] == [
        [{"coverage": 0.9}, {"top_n": "all"}],
        [{"top_n": 8}],
    ]
    with pytest.raises(KCacheConfigError, match="top_m"):
        by_engine([{"top_m": 8}], 16)


def test_stock_settings_have_engines_of_their_own() -> None:
    fp8 = {"kv_cache_dtype": "fp8"}
    engines = by_engine([{"coverage": 0.9}, fp8, {"k_bits": 4}, dict(fp8)], 8)
    assert [(engine.start, engine.settings, engine.arguments) for engine in engines] == [
        ({"v_block_tokens": 8, "dense_layers": 0}, [{"coverage": 0.9}], {}),
        (None, [{}], fp8),
        ({"v_block_tokens": 8, "dense_layers": 0, "k_bits": 4}, [{}], {}),
    ]


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
        assert spec["is_reference"] == (name == "stock")
        assert (spec["kcache"] is None) == (name == "stock" or "kv_cache_dtype" in spec["engine"])
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


def test_an_fp8_cache_is_stock_beside_stock(sweeps: Any, tmp_path: Path) -> None:
    settings = ["--lengths", "300", "--settings", '[{"kv_cache_dtype": "fp8"}, {"k_bits": 4}]']
    four = json.dumps({"v_block_tokens": 8, "dense_layers": 0, "k_bits": 4})
    jobs = [(300, 1)]
    assert sweeps(*settings) == [
        ("stock", jobs), ('{"kv_cache_dtype": "fp8"}', jobs), (four, jobs)
    ]  # fmt: skip
    assert sweeps(*settings) == []
    found = [(row["engine"].get("kv_cache_dtype"), row["kcache"]) for row in rows.load(
        tmp_path / "rows.jsonl")]  # fmt: skip
    split = {**json.loads(four), "threshold_length": 8192}
    assert found == [(None, None), ("fp8", None), (None, split)]


def test_rows_name_what_auto_was(sweeps: Any, tmp_path: Path) -> None:
    given = [{}, {"coverage": 0.9}, {"k_bits": 16, "mass_threshold": 0.003}]
    sweeps("--lengths", "300", "--settings", json.dumps([*given, {"threshold_length": None}]))
    found = [row["kcache"] for row in rows.load(tmp_path / "rows.jsonl")][1:]
    assert sorted(found, key=str) == sorted(
        (
            {"v_block_tokens": 8, "dense_layers": 0, **setting}
            for setting in (
                {"k_bits": 4, "threshold_length": 8192},
                {"coverage": 0.9, "k_bits": 4},
                {"k_bits": 16, "mass_threshold": 0.003, "threshold_length": 8192},
                {"threshold_length": None, "k_bits": 4},
            )
        ),
        key=str,
    )
    # So that no curve has rows of exact K and of codes.
    assert [family_of(setting) for setting in found] == [None] * 4


@pytest.mark.parametrize(
    ("setting", "bytes_a_token"),
    [
        ({"k_bits": 16}, 4 * 64),  # V
        ({}, 2 * 4 * 64),  # K and V
        ({"k_bits": 4, "host_dtype": "int8"}, 2 * (64 + 2)),
    ],
)
def test_memory_is_that_of_rows(
    sweeps: Any, tmp_path: Path, setting: dict[str, Any], bytes_a_token: int
) -> None:
    """One request of one layer of one KV head and a page too many on both sides, in float32."""
    (tmp_path / "model/config.json").write_text(
        json.dumps({**MODEL_CONFIG, "num_key_value_heads": 1, "num_hidden_layers": 1})
    )
    options = accuracy.parse(["sweep", str(tmp_path / "model"), "--items", "1", "--forced", "20",
                              "--lengths", "300", "--block-size", "16"])  # fmt: skip
    sweep = sweep_module.Sweep(options, "")
    memory = sweep._gpu_memory({"v_block_tokens": 8, **setting})
    assert memory["hot_cache_gib"] * 2**30 == pytest.approx(1.1 * 352 * bytes_a_token)
    assert memory["host_memory_gib"] * 2**30 == pytest.approx(1.2 * 352 * bytes_a_token)


def test_contexts_are_decoded_in_groups_that_fit(
    passages: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as the engine holds at once with what is forced, by each of its pools."""
    run = EngineRun.__new__(EngineRun)
    run.llm, run.passages = "llm", passages
    fits = {("llm", 1000 + 50 + SPARE_TOKENS): 4}
    monkeypatch.setattr(engine_module, "requests_that_fit", lambda *request: fits.get(request, 0))
    assert run.groups(1000) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    with pytest.raises(RuntimeError, match="no context of 2050 tokens fits"):
        run.groups(2000)


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
