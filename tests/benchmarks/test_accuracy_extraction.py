# SPDX-License-Identifier: Apache-2.0
"""The extraction task: its documents fit, tell every record, and are scored by field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.accuracy.harness import extraction
from benchmarks.accuracy.harness.extraction import make_documents, process_results, score


class Words:
    """A tokenizer with a token for each word."""

    def __call__(self, text: str | list[str], add_special_tokens: bool = True) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [one.split() for one in text]}
        return {"input_ids": text.split()}


RECORDS = [
    {"name": "Agnes Abbott", "city": "Oslo", "year": 1950},
    {"name": "Boris Barker", "city": "Rome", "year": 1960},
]


@pytest.mark.parametrize("length", [700, 2048, 8000])
def test_documents_fit_and_tell_every_record(length: int) -> None:
    documents = make_documents(Words(), length, 6)
    assert documents == make_documents(Words(), length, 6)
    assert len({document["input"] for document in documents}) == 6
    for document in documents:
        records = json.loads(document["answer"])
        assert len(records) == extraction.RECORDS
        for field in extraction.FIELDS:
            assert len({record[field] for record in records}) == len(records)
        tokens = len(document["input"].split()) + extraction.ANSWER_TOKENS
        # The answer and a template fit, too, and little more than a verse is left.
        assert 0.9 * length - 120 < tokens <= length - extraction.TEMPLATE_TOKENS
        names = [document["input"].index(record["name"]) for record in records]
        assert names == sorted(names)
        assert document["answer"].startswith(extraction.BEGUN)


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="length=400: the records alone need"):
        make_documents(Words(), 400, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (json.dumps(RECORDS), 1.0),
        ('[{"name": "agnes  ABBOTT", "city": "oslo", "year": "1950"}', 1 / 2),
        ("[{'name': 'Agnes Abbott', 'year': 1951, 'city': 'Oslo'}, {'name': 'Bo", 2 / 6),
        ('[{"name": "Agnes Abbott"}, {"name": "Agnes Abbott", "city": "Oslo"}]', 1 / 6),
        ('[{"name": "Carl", "city": "Oslo", "year": 1950}]', 0.0),
        ("Agnes Abbott was born in Oslo in 1950.", 0.0),
    ],
)
def test_fields_that_are_right(text: str, expected: float) -> None:
    assert score(text, RECORDS) == pytest.approx(expected)


@pytest.mark.parametrize("cut", [0, len(extraction.BEGUN)])
def test_an_answer_goes_on_where_the_prompt_ends(cut: int) -> None:
    answer = json.dumps(RECORDS)
    # The harness leaves out what stopped the answer.
    said = answer[cut:].removesuffix("]")
    assert process_results({"answer": answer}, [said]) == {"fields": 1.0}
