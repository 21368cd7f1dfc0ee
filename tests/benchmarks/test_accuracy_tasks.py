# SPDX-License-Identifier: Apache-2.0
"""Scores, pairing and resumption of the task benchmark, without an engine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import accuracy, accuracy_process
from benchmarks.accuracy_answers import AnswersRun
from benchmarks.accuracy_extraction import (
    FIELDS,
    read_records,
    score_records,
)
from benchmarks.accuracy_items import (
    TaskItem,
    load_items,
)
from benchmarks.accuracy_ruler import score_references
from benchmarks.accuracy_task_score import Outcome, first_difference, score, summarise_tasks
from benchmarks.accuracy_tasks import make_items
from tests.benchmarks.pieces import Pieces


def test_reference_scores() -> None:
    references = ("1234567", "Abc")
    assert score_references(" 1234567 and ABC.", references) == 1
    assert score_references("abc, abc", references) == 0.5
    assert score_references("", references) == 0
    assert score_references("123456", references) == 0


RECORDS = ({"name": "Olga Keller", "city": "Paris", "year": 1974},
           {"name": "Jonas Harper", "city": "Boston", "year": 1987})  # fmt: skip
ANSWER = json.dumps(RECORDS)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (ANSWER, 6),
        (ANSWER.lower().replace('"', "'"), 6),
        ("```json\n" + json.dumps(RECORDS, indent=2) + "\n```\nThese are all.", 6),
        ('{"people": ' + ANSWER + "}", 6),
        (json.dumps(RECORDS[::-1]), 6),
        (ANSWER.replace("1974", '"1974"'), 6),
        (ANSWER.replace("1974", "1975"), 5),
        (ANSWER.replace("Paris", "London").replace("1987", "null"), 4),
        # A wrong name loses its record.
        (ANSWER.replace("Olga", "Olaf"), 3),
        # Broken off in a number, a string, a key; before the brace.
        (ANSWER[: ANSWER.index("987")], 5),
        (ANSWER[: ANSWER.index("ston")], 4),
        (ANSWER[: ANSWER.index('ity": "Bos')], 4),
        (ANSWER[: ANSWER.index("}")], 3),
        # The second record of a name does not count, wherever it is right.
        (json.dumps([{**RECORDS[0], "city": "Rome"}, RECORDS[0]]), 2),
        (json.dumps([*RECORDS, {"name": "Other", "city": "Paris", "year": 1}]), 6),
        ("Olga Keller was born in Paris in 1974.", 0),
        ("", 0),
    ],
)
def test_record_scores(text: str, right: int) -> None:
    assert score_records(text, RECORDS) == pytest.approx(right / (len(RECORDS) * len(FIELDS)))


def test_records_are_read_leniently() -> None:
    assert read_records('[{"name": "A  B", "n": -3, "name": "C"}, {}, {"x": 1') == [
        {"name": "a b", "n": "-3"},
        {"x": "1"},
    ]
    assert read_records("nothing") == []


def test_the_right_answers_get_all_points() -> None:
    tokenizer = Pieces()
    for group in make_items(tokenizer, [1024], 3, 4).values():
        for item in group:
            if not item.answer:
                continue
            text = tokenizer.decode(item.answer)
            assert score(item, text) == 100, item.task
            assert score(item, "") == 0
            cut = score(item, text[: len(text) // 2])
            assert cut is not None
            assert 0 <= cut < 100, item.task


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], [1]) == 0


def outcome(
    task: str, said: list[int], text: str, stock_said: list[int], stock_text: str,
    positions: list[list[float]] | None,
) -> Outcome:  # fmt: skip
    references = ("yes",) if positions is not None else ()
    item = TaskItem(task, (1,), (1, 2, 3)[: len(positions or ())], 3, True, references)
    array = None if positions is None else np.array(positions)
    return Outcome(item, said, text, stock_said, stock_text, array)


def test_items_are_paired() -> None:
    first = [9.0, 9.0, 9.0, 0.0]  # of the prefill: not counted
    outcomes = [
        outcome("single", [1], "yes", [1], "yes", [first, [-1, -2, 0.1, 1], [-3, -2, 0.3, 0]]),
        outcome("single", [1], "yes", [2], "no", [first, [-1, -3, 0.4, 1]]),
        outcome("multikey", [1, 2], "no", [1, 3], "yes", [first, [-4, -2, 0.0, 1]]),
        outcome("multikey", [2], "no", [2], "no", [first, [-2, -2, 0.0, 1]]),
        outcome("text", [1, 2, 3, 4], "abc", [1, 2, 3, 5], "abd", None),
    ]
    result = summarise_tasks(outcomes)
    single, multikey = result["tasks"]["single"], result["tasks"]["multikey"]
    assert (single["score"], single["stock_score"], single["difference"]) == (100, 50, 50)
    assert single["difference_error"] == pytest.approx(50)
    assert single["scores"] == [100, 100]
    assert single["stock_scores"] == [100, 0]
    assert single["identical"] == 0.5
    assert single["first_difference"] == 0
    # Items: -2 against -2, -1 against -3.
    assert single["answer_tokens"] == 3
    assert single["answer_logprob"] == pytest.approx(-1.5)
    assert single["answer_stock_logprob"] == pytest.approx(-2.5)
    assert single["answer_logprob_change"] == pytest.approx(1)
    assert single["answer_logprob_change_error"] == pytest.approx(1)
    assert single["answer_kl"] == pytest.approx(0.3)
    assert single["answer_top1_agreement"] == pytest.approx(0.75)
    assert multikey["difference"] == -50
    assert multikey["first_difference"] == 1
    average = result["average"]
    assert average["score"] == 50
    assert average["difference"] == 0
    assert average["difference_error"] == pytest.approx(math.sqrt(50**2 + 50**2) / 2)
    assert average["answer_logprob_change"] == pytest.approx(0)
    text = result["tasks"]["text"]
    assert "score" not in text
    assert "answer_kl" not in text
    assert (text["identical"], text["first_difference"], text["said_tokens"]) == (0, 3, 4)


class FakeRun(AnswersRun):
    """An engine that says `answers` of each item and thinks `thoughts` of the right ones."""

    def __init__(self, spec: dict[str, Any], answers: dict[str, str]) -> None:
        from benchmarks.accuracy_rows import Rows

        self.spec, self.answers = spec, answers
        self.work = Path(spec["work"])
        self.rows = Rows(Path(spec["results"]))
        self.is_stock = spec["kcache"] is None
        self.items = load_items(Path(spec["items"]))
        self.calls: list[int] = []
        cache = SimpleNamespace(block_size=16, num_gpu_blocks=200)
        config = SimpleNamespace(cache_config=cache)
        self.llm = SimpleNamespace(
            llm_engine=SimpleNamespace(vllm_config=config), reset_prefix_cache=lambda: True
        )
        self._files_made = 0

    def use(self, setting: dict[str, Any] | None) -> None:
        return None

    def metrics(self) -> dict[str, Any]:
        return {}

    def selection(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        return {"selected_tokens": 1.0}

    def generate(self, prompts: list[list[int]], *options: dict[str, Any]) -> list[Any]:
        self.calls.append(len(prompts))
        every = options if len(options) == len(prompts) else options * len(prompts)
        return [self._output(*pair) for pair in zip(prompts, every, strict=True)]

    def _output(self, prompt: list[int], options: dict[str, Any]) -> Any:
        tokens, text = [7] * options["max_tokens"], ""
        forced = options.get("extra_args", {}).get("accuracy")
        if forced:
            tokens = forced["tokens"]
            file = np.memmap(forced["positions"], np.float64, "r+", shape=(forced["num_rows"], 4))
            at = np.arange(len(tokens)) * forced["row_stride"] + forced["first_row"]
            assert np.isnan(file[at]).all()
            # By stock -2 a token; by the split cache half a nat less where a prompt is long.
            file[at] = [-2.0 if self.is_stock else -2.5, -2.0, 0.0 if self.is_stock else 0.25, 1.0]
        else:
            item = next(i for i in self.items[1024] if list(i.prompt) == prompt)
            text = self.answers.get(item.task, "")
        output = SimpleNamespace(token_ids=tokens, text=text)
        return SimpleNamespace(outputs=[output], num_cached_tokens=len(prompt))


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `tasks` with engines that only repeat an answer; returns the rows."""
    from transformers import AutoTokenizer

    config = {"model_type": "llama", "hidden_size": 128, "num_attention_heads": 2,
              "vocab_size": 1000}  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    tokenizer = Pieces()
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path: tokenizer)
    started: list[str] = []

    def run_engine(name: str, spec: dict[str, Any], *rest: Any) -> None:
        started.append(name)
        spec = json.loads(json.dumps(spec))
        assert spec["kind"] == "tasks"
        right = spec["kcache"] is None
        answers = {"single": "6841360 9701595 1111111" if right else "9701595"}
        run = FakeRun(spec, answers)
        for job in spec["jobs"]:
            run.measure_length(job["length"], job["settings"])
        # Not everything fits 200 pages: there are groups, each prefilled once.
        assert len(run.calls) > 2

    monkeypatch.setattr(accuracy_process, "run_engine", run_engine)

    def tasks(*more: str) -> tuple[list[str], list[dict[str, Any]]]:
        started.clear()
        results = tmp_path / "rows.jsonl"
        accuracy.main(["tasks", str(tmp_path / "model"), "--lengths", "1024", "--items", "2",
                       "--work", str(tmp_path), "--results", str(results), *more])  # fmt: skip
        return list(started), [json.loads(line) for line in results.read_text().splitlines()]

    return tasks


def test_a_command_pairs_the_answers_and_repeats_nothing(command: Any) -> None:
    started, rows = command("--settings", '{"coverage": 0.9}', '[{"top_n": 8}, {"top_n": "all"}]')
    assert [name == "stock" for name in started] == [True, False]
    assert [row["kcache"] and row["kcache"].get("top_n", 0) for row in rows] == [None, 0, 8, "all"]
    assert len({row["key"] for row in rows}) == 4
    for row in rows[1:]:
        single = row["tasks"]["single"]
        assert (single["scores"], single["stock_scores"]) == ([0, 100], [100, 100])
        assert (single["difference"], single["difference_error"]) == (-50, 50)
        assert single["answer_logprob_change"] == pytest.approx(-0.5)
        assert single["answer_kl"] == pytest.approx(0.25)
        assert row["tasks"]["text"]["identical"] == 1
        assert row["length"] == 1024
    assert rows[0]["tasks"]["single"]["difference"] == 0
    assert command("--settings", '{"coverage": 0.9}')[0] == []
    # Another number of items is another measurement.
    assert command("--settings", '{"coverage": 0.9}', "--records", "3")[0] != []


def test_default_settings(command: Any) -> None:
    _, rows = command()
    assert [row["kcache"] for row in rows[1:]] == [
        {"v_block_tokens": 8, "dense_layers": 0, "mass_threshold": 0.002},
        {"v_block_tokens": 8, "dense_layers": 0, "top_n": 64},
    ]


@pytest.mark.parametrize("given", ["[1]", "{", "[]", '"a"'])
def test_bad_settings_are_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.parse(["tasks", "model", "--settings", given])
    assert "--settings" in capsys.readouterr().err
