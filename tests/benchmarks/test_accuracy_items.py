# SPDX-License-Identifier: Apache-2.0
"""The items of the task benchmark: lengths, needles, what is refused."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from benchmarks.accuracy_extraction import (
    draw_records,
    make_extraction,
)
from benchmarks.accuracy_items import (
    Filling,
    Prompter,
    TaskItem,
    fill,
    hash_of_items,
    load_items,
    save_items,
)
from benchmarks.accuracy_ruler import KEYS, MAX_TOKENS, TASKS, Ruler
from benchmarks.accuracy_task_score import score
from benchmarks.accuracy_tasks import CONTINUATION, CONTINUATION_TOKENS, make_items
from tests.benchmarks.pieces import Pieces

LENGTHS = (1024, 4096)


@pytest.fixture(scope="module")
def tokenizer() -> Pieces:
    return Pieces()


@pytest.fixture(scope="module")
def items(tokenizer: Pieces) -> dict[int, list[TaskItem]]:
    return make_items(tokenizer, list(LENGTHS), 3, 4)


def of_task(items: dict[int, list[TaskItem]], task: str) -> list[tuple[int, TaskItem]]:
    return [(n, item) for n, group in items.items() for item in group if item.task == task]


def test_the_same_items_on_every_machine(items: dict[int, list[TaskItem]]) -> None:
    again = make_items(Pieces(), list(LENGTHS), 3, 4)
    for length in LENGTHS:
        texts = [item.references + tuple(map(str, item.records)) for item in items[length]]
        assert texts == [i.references + tuple(map(str, i.records)) for i in again[length]]
        # The numbers of this tokenizer depend on what it saw first: only for the first length.
    assert hash_of_items(items[1024]) == hash_of_items(again[1024])
    assert hash_of_items(items[1024]) != hash_of_items(items[1024][:-1])
    # Seeds are fixed for ever: rows of other days are of the same items.
    assert items[1024][0].references == ("6841360",)


def test_prompt_and_answer_fit_the_length(items: dict[int, list[TaskItem]]) -> None:
    for length, group in items.items():
        assert len(group) == 3 * (len(TASKS) + 2)
        for item in group:
            left = length - len(item.prompt) - item.max_tokens
            # A verse or an entry more would not have fitted.
            assert 0 <= left < 250, item.task
            assert len(item.answer) <= item.max_tokens


def test_prompts_hold_what_is_asked_for(
    tokenizer: Pieces, items: dict[int, list[TaskItem]]
) -> None:
    for length, item in [pair for task in TASKS for pair in of_task(items, task)]:
        prompt = tokenizer.decode(item.prompt)
        assert prompt.startswith("<user>")
        assert prompt.endswith("<assistant>\n" + item.begun)
        for reference in item.references:
            assert reference in prompt, (item.task, length)
        answer = tokenizer.decode(item.answer)
        places = [answer.index(reference) for reference in item.references]
        assert places == sorted(places)
        assert answer.startswith(" ")
        # The answer is what the tokenizer makes of it after the prompt.
        assert tokenizer(prompt + answer)["input_ids"] == [*item.prompt, *item.answer]


def test_needles_lie_in_the_order_of_the_answer(
    tokenizer: Pieces, items: dict[int, list[TaskItem]]
) -> None:
    for task in ("multivalue", "variables", "extraction"):
        for _, item in of_task(items, task):
            prompt = tokenizer.decode(item.prompt)
            wanted = item.references or tuple(record["city"] for record in item.records)
            places = [prompt.index(reference) for reference in wanted]
            assert places == sorted(places)
            assert len(set(places)) == len(places)
    for task, keys, values in (("single", 1, 1), ("multikey", 4, 4), ("multivalue", 1, 4)):
        for _, item in of_task(items, task):
            prompt = tokenizer.decode(item.prompt)
            needles = re.findall(r"magic numbers? for ([\w-]+) is: (\d{7})\.", prompt)
            assert len({key for key, _ in needles}) == keys
            assert len({value for _, value in needles}) == values
            assert {key for key, _ in needles} <= set(KEYS)
            asked = re.search(r"for ([\w-]+) in the text are|for ([\w-]+) in the text is", prompt)
            assert asked is not None
            key = asked[1] or asked[2]
            assert sorted(v for k, v in needles if k == key) == sorted(item.references)


def test_common_words_are_the_most_common(
    tokenizer: Pieces, items: dict[int, list[TaskItem]]
) -> None:
    for length, item in of_task(items, "words"):
        entries = re.findall(r"\d+\. (\w+)", tokenizer.decode(item.prompt))
        counts = {word: entries.count(word) for word in set(entries)}
        often = {word for word, count in counts.items() if count == max(counts.values())}
        assert often == set(item.references)
        assert len(often) == 10
        assert max(counts.values()) >= 10 * min(counts.values())
        assert list(dict.fromkeys(w for w in entries if w in often)) == list(item.references)
        assert len(counts) > 12, length


def test_variables_form_one_chain(tokenizer: Pieces, items: dict[int, list[TaskItem]]) -> None:
    for _, item in of_task(items, "variables"):
        steps = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", tokenizer.decode(item.prompt))
        assert [name for name, _ in steps] == list(item.references)
        assert steps[0][1].isdigit()
        assert [source for _, source in steps[1:]] == [name for name, _ in steps[:-1]]


def test_the_same_needles_at_every_length(items: dict[int, list[TaskItem]]) -> None:
    for task in ("single", "multikey", "multivalue", "variables"):
        short, long = ([i.references for n, i in of_task(items, task) if n == at] for at in LENGTHS)
        assert short == long
        assert len(set(short)) == 3


def test_continuation_has_no_right_answer(items: dict[int, list[TaskItem]]) -> None:
    for length, item in of_task(items, CONTINUATION):
        assert len(item.prompt) == length - CONTINUATION_TOKENS
        assert item.answer == ()
        assert not item.stops
        assert score(item, "anything") is None


def test_too_short_a_length_is_refused() -> None:
    ruler = Ruler(Prompter(Pieces()))
    with pytest.raises(ValueError, match=r"task 'words', 300 tokens: the shortest prompt has \d+"):
        ruler.item("words", 0, 300)
    with pytest.raises(ValueError, match="task 'extraction', 200 tokens"):
        make_extraction(ruler.prompter, ruler.filling, 0, 200, 4)
    with pytest.raises(ValueError, match="21 records: must be 1 to 20"):
        draw_records(21, random.Random(0))
    with pytest.raises(ValueError, match="the filling has"):
        ruler.item("single", 0, 10**7)


def test_an_answer_longer_than_what_is_generated_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(MAX_TOKENS, "multivalue", 5)
    with pytest.raises(ValueError, match="more than the 5 to generate"):
        Ruler(Prompter(Pieces())).item("multivalue", 0, 1024)


def test_a_tokenizer_that_joins_prompt_and_answer_is_refused() -> None:
    prompter = Prompter(Pieces())
    assert prompter.answer("is", " 12.") == prompter.encode(" 12.")
    with pytest.raises(ValueError, match="joins"):
        prompter.answer("is", "land")


def test_without_a_chat_template_the_question_stands_alone() -> None:
    tokenizer = Pieces()
    tokenizer.chat_template = ""
    prompter = Prompter(tokenizer)
    assert tokenizer.decode(prompter.prompt("What is it?", "It is")) == "What is it?\nIt is"


def test_fill_stops_at_the_room() -> None:
    def question(pieces: int) -> str:
        return "x" * (10 + 3 * pieces)

    # The estimate is too low by one a piece.
    assert fill(question, lambda pieces: 2 * pieces, len, 25, 100) == ("x" * 25, 5)
    assert fill(question, lambda pieces: 3 * pieces, len, 24, 100) == ("x" * 22, 4)
    assert fill(question, lambda pieces: 3 * pieces, len, 1000, 6)[1] == 6
    with pytest.raises(ValueError, match="has 10 tokens and there is room for 9"):
        fill(question, lambda pieces: 3 * pieces, len, 9, 100)


def test_filling_puts_sentences_in_their_places() -> None:
    filling = Filling(["a b.", "c d.", "e f.", "g h."], Prompter(Pieces()))
    text = filling.text(1, 3, ["LAST", "FIRST", "MID", "MID2"], [1.0, 0.0, 0.34, 0.35])
    assert text == "FIRST c d. MID MID2 e f. g h. LAST"


def test_items_survive_the_file(tmp_path: Path, items: dict[int, list[TaskItem]]) -> None:
    save_items(tmp_path / "items.json", items)
    assert load_items(tmp_path / "items.json") == items
