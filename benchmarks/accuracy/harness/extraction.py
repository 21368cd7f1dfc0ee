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

from benchmarks.accuracy.texts import read_text

DOCUMENTS = 100
RECORDS = 10
FIELDS = ("name", "city", "year")
# As in extraction.yaml: tokens of an answer, and how it begins.
ANSWER_TOKENS = 320
BEGUN = '[{"name":'
# For a chat template around the question.
TEMPLATE_TOKENS = 64
GIVEN = (
    "Agnes Boris Clara Dmitri Elena Felix Greta Hugo Irene Jonas Karin Leon Marta Nils Olga Pavel"
)
FAMILY = (
    "Abbott Barker Carver Dalton Everett Fisher Gardner Harper Irving Jensen Keller Lambert Mercer "
    "Norton Osborne Parker"
)
CITIES = (
    "Athens Berlin Boston Cairo Chicago Dublin Geneva Hamburg Istanbul Lisbon London Madrid Moscow "
    "Naples Oslo Paris"
)
SENTENCES = (
    "{name} was born in {city} in the year {year}.",
    "In {year} a child called {name} came into the world in {city}.",
    "The city of {city} is where {name} was born, in {year}.",
    "It was in {year}, in {city}, that {name} was born.",
)
_PAIR = re.compile(r"""["'](\w+)["']\s*:\s*(?:"([^"]*)"|'([^']*)'|(-?\d+))""")


def documents(**metadata: Any) -> dict[str, Any]:
    """The dataset, as the harness asks for it.

    Args:
        metadata: `pretrained`, whose tokenizer counts; `max_seq_lengths`, tokens of prompt and
            answer, of which the first counts.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(metadata["pretrained"], model_max_length=1 << 30)
    length = metadata["max_seq_lengths"][0]
    made = make_documents(tokenizer, length, DOCUMENTS)
    return {"test": Dataset.from_list(made)}


def make_documents(tokenizer: Any, length: int, count: int) -> list[dict[str, Any]]:
    """`count` documents of at most `length` tokens with their answers, the same always.

    Raises:
        ValueError: not even the records fit.
    """
    verses = read_text("kjv.txt.gz").splitlines()
    encoded = tokenizer(verses, add_special_tokens=False)["input_ids"]
    # And the space before it; joints may have a token more.
    sizes = [len(tokens) + 1 for tokens in encoded]
    made = []
    for number in range(count):
        draw = random.Random(f"extraction {number}")
        records = draw_records(draw)
        told = [draw.choice(SENTENCES).format(**record) for record in records]
        spent = len(tokenizer(question(" ".join(told)))["input_ids"])
        room = length - spent - ANSWER_TOKENS - TEMPLATE_TOKENS
        if room < 0:
            raise ValueError(f"length={length}: the records alone need {length - room} tokens")
        at = draw.randrange(len(verses))
        filling: list[str] = []
        while room >= sizes[at]:
            room -= sizes[at]
            filling.append(verses[at])
            at = (at + 1) % len(verses)
        places = sorted(draw.randrange(len(filling) + 1) for _ in told)
        # From the end, so that no place moves and records of one place keep their order.
        for place, sentence in reversed(list(zip(places, told, strict=True))):
            filling.insert(place, sentence)
        answer = json.dumps(records)
        made.append({"input": question(" ".join(filling)), "answer": answer})
    return made


def question(text: str) -> str:
    """What the model is asked."""
    return (
        "The following text tells, among other things, where and when some people were born.\n\n"
        f"{text}\n\nList the {RECORDS} people whose birth the text above tells with city and year, "
        "in the order of the text. Answer with a JSON list only, which has one object with the "
        "keys name, city and year for each of them."
    )


def draw_records(draw: random.Random) -> list[dict[str, Any]]:
    """People with different given names, family names, cities and years."""
    columns = [draw.sample(words.split(), RECORDS) for words in (GIVEN, FAMILY, CITIES)]
    years = draw.sample(range(1900, 2000), RECORDS)
    return [
        {"name": f"{given} {family}", "city": city, "year": year}
        for given, family, city, year in zip(*columns, years, strict=True)
    ]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The score of an answer, as the harness asks for it."""
    answer = results[0]
    begun = answer if answer.lstrip().startswith("[") else BEGUN + answer
    return {"fields": score(begun, json.loads(doc["answer"]))}


def score(text: str, records: list[dict[str, Any]]) -> float:
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


def read_records(text: str) -> list[dict[str, str]]:
    """What can be read of a JSON list of flat objects, as text.

    A value that breaks off is not read; nor is anything outside of braces.
    """
    records = []
    for piece in text.split("{")[1:]:
        pairs: dict[str, str] = {}
        for key, *values in _PAIR.findall(piece.split("}")[0]):
            pairs.setdefault(key.lower(), " ".join("".join(values).split()).lower())
        if pairs:
            records.append(pairs)
    return records
