# SPDX-License-Identifier: Apache-2.0
"""Extraction of records from prose as JSON, after the Text2JSON of arXiv 2604.08426.

A long text tells of several people; the model is asked for a JSON list of all of them. Unlike a
needle, the answer needs many places of the text one after the other. The score is the share of
fields that are right. What can be read of an answer counts, also when it breaks off.
"""

from __future__ import annotations

import json
import random
import re
from typing import Any

from benchmarks.accuracy_items import Filling, Prompter, TaskItem

TASK = "extraction"
FIELDS = ("name", "city", "year")
# Tokens to generate for a record.
RECORD_TOKENS = 32
_GIVEN = (
    "Agnes Boris Clara Dmitri Elena Felix Greta Hugo Irene Jonas Karin Leon Marta Nils Olga Pavel "
    "Rosa Simon Tessa Viktor"
)
_FAMILY = (
    "Abbott Barker Carver Dalton Everett Fisher Gardner Harper Irving Jensen Keller Lambert Mercer "
    "Norton Osborne Parker Ramsey Sawyer Turner Walker"
)
_CITIES = (
    "Athens Berlin Boston Cairo Chicago Dublin Geneva Hamburg Istanbul Lisbon London Madrid Moscow "
    "Naples Oslo Paris Prague Rome Sydney Vienna"
)
_SENTENCES = (
    "{name} was born in {city} in the year {year}.",
    "In {year} a child called {name} came into the world in {city}.",
    "The city of {city} is where {name} was born, in {year}.",
    "It was in {year}, in {city}, that {name} was born.",
)
_PAIR = re.compile(
    r"""["'](?P<key>\w+)["']\s*:\s*
        (?: "(?P<double>[^"]*)" | '(?P<single>[^']*)' | (?P<number>-?\d+) )""",
    re.VERBOSE,
)


def draw_records(count: int, draw: random.Random) -> list[dict[str, Any]]:
    """People with different given names, family names, cities and years.

    Raises:
        ValueError: there are not so many names.
    """
    lists = [words.split() for words in (_GIVEN, _FAMILY, _CITIES)]
    most = min(len(words) for words in lists)
    if not 1 <= count <= most:
        raise ValueError(f"{count} records: must be 1 to {most}")
    columns = [draw.sample(words, count) for words in lists]
    years = draw.sample(range(1900, 2000), count)
    return [
        {"name": f"{given} {family}", "city": city, "year": year}
        for given, family, city, year in zip(*columns, years, strict=True)
    ]


def make_extraction(
    prompter: Prompter, filling: Filling, number: int, length: int, count: int
) -> TaskItem:
    """One item; prompt and answer have at most `length` tokens.

    Args:
        prompter: makes the prompt.
        filling: the prose around the records.
        number: which item.
        length: tokens of prompt and answer.
        count: records.

    Raises:
        ValueError: they do not fit.
    """
    draw = random.Random(f"{TASK} {number}")
    records = draw_records(count, draw)
    sentences = [draw.choice(_SENTENCES).format(**record) for record in records]
    places = sorted(draw.random() for _ in records)
    begun = '[{"name":'
    rest = json.dumps(records).removeprefix(begun)
    max_tokens = RECORD_TOKENS * count
    answer = prompter.answer(begun, rest)
    if len(answer) > max_tokens:
        raise ValueError(
            f"task {TASK!r}: the right answer has {len(answer)} tokens with this tokenizer, more "
            f"than the {max_tokens} to generate"
        )

    def question(text: str) -> str:
        return (
            "The following text tells, among other things, where and when some people were born."
            f"\n\n{text}\n\nList the {count} people whose birth the text above tells with city and "
            "year, in the order of the text. Answer with a JSON list only, which has one object "
            "with the keys name, city and year for each of them."
        )

    try:
        prompt = filling.fill(
            question, sentences, places, prompter, begun, length - max_tokens, draw
        )
    except ValueError as error:
        raise ValueError(f"task {TASK!r}, {length} tokens: {error}") from None
    return TaskItem(
        task=TASK,
        prompt=tuple(prompt),
        answer=tuple(answer),
        max_tokens=max_tokens,
        stops=True,
        records=tuple(records),
        begun=begun,
    )


def read_records(text: str) -> list[dict[str, str]]:
    """What can be read of a JSON list of flat objects, as text.

    A value that breaks off is not read; nor is anything outside of braces.
    """
    records = []
    for piece in text.split("{")[1:]:
        pairs: dict[str, str] = {}
        for match in _PAIR.finditer(piece.split("}")[0]):
            value = next(v for v in match.group("double", "single", "number") if v is not None)
            pairs.setdefault(match["key"].lower(), " ".join(value.split()).lower())
        if pairs:
            records.append(pairs)
    return records


def score_records(text: str, records: tuple[dict[str, Any], ...]) -> float:
    """Share of the fields that are right, 0 to 1.

    A record is found by its name; the name is a field, too. The first of two records of one name
    counts. Case and the number of spaces do not matter.

    Args:
        text: the answer from its beginning, the part in the prompt included.
        records: what is right.
    """
    by_name: dict[str, dict[str, str]] = {}
    for found in read_records(text):
        by_name.setdefault(found.get("name", ""), found)
    right = 0
    for record in records:
        found = by_name.get(record["name"].lower(), {})
        right += sum(found.get(field) == str(record[field]).lower() for field in FIELDS)
    return right / (len(records) * len(FIELDS))
