# SPDX-License-Identifier: Apache-2.0
"""Passages of real text for the accuracy benchmark: half prose, half source code."""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import ROOT

DATA = ROOT / "benchmarks/data"
# Prose is half King James Bible, half Jargon File (benchmarks/data/README.md).
SOURCES = (
    ("prose", ("kjv.txt.gz", "jargon.txt.gz")),
    ("code", ("stdlib.py.txt.gz",)),
)


@dataclass(frozen=True)
class Passage:
    """One item: a context, and what follows it in the text.

    Attributes:
        kind: "prose" or "code".
        tokens: the longest context and the tokens to force after it.
        first_tokens: what the tokenizer puts before every text, such as a BOS token.
        num_forced: how many of `tokens` are forced.
    """

    kind: str
    tokens: tuple[int, ...]
    first_tokens: tuple[int, ...]
    num_forced: int

    def prompt(self, length: int) -> list[int]:
        """The last tokens before the forced ones, `length` in all with `first_tokens`."""
        context = self.tokens[: -self.num_forced]
        kept = length - len(self.first_tokens)
        if not 0 < kept <= len(context):
            raise ValueError(
                f"length={length}: must be {len(self.first_tokens) + 1} to "
                f"{len(self.first_tokens) + len(context)}"
            )
        return [*self.first_tokens, *context[-kept:]]

    @property
    def forced(self) -> list[int]:
        """The tokens to force, the same for every length of context."""
        return list(self.tokens[-self.num_forced :])


def read_text(name: str) -> str:
    """One of the bundled texts."""
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        return file.read()


def make_passages(
    tokenizer: Any, num_items: int, longest_context: int, num_forced: int
) -> list[Passage]:
    """Cut the bundled texts into passages at equal distances.

    What is forced never overlaps. Contexts overlap only where the texts are too short for all of
    them: then each is still continued by tokens of its own.

    Args:
        tokenizer: a Hugging Face tokenizer.
        num_items: passages; half of them prose, rounded up.
        longest_context: tokens of the longest prompt.
        num_forced: tokens after it.

    Raises:
        ValueError: the texts are too short.
    """
    first_tokens = tuple(tokenizer("")["input_ids"])
    passages: list[Passage] = []
    shares = {"prose": -(-num_items // 2), "code": num_items // 2}
    for kind, names in SOURCES:
        for index, name in enumerate(names):
            count = (shares[kind] + len(names) - 1 - index) // len(names)
            stream = tokenizer(read_text(name), add_special_tokens=False)["input_ids"]
            passages += [
                Passage(kind, span, first_tokens, num_forced)
                for span in cut(stream, name, count, longest_context, num_forced)
            ]
    return passages


def cut(
    stream: list[int], name: str, count: int, longest_context: int, num_forced: int
) -> list[tuple[int, ...]]:
    """Spans of `longest_context` + `num_forced` tokens at equal distances.

    Raises:
        ValueError: the forced parts would overlap.
    """
    span = longest_context + num_forced
    room = len(stream) - span
    if count and (room < 0 or (count > 1 and room // (count - 1) < num_forced)):
        raise ValueError(
            f"{name} has {len(stream)} tokens, too few for {count} passages of {longest_context} + "
            f"{num_forced}: ask for fewer items or shorter ones"
        )
    starts = [room * index // max(count - 1, 1) for index in range(count)]
    return [tuple(stream[start : start + span]) for start in starts]


def save_passages(path: Path, passages: list[Passage]) -> None:
    """Write them for the engine's process."""
    path.write_text(json.dumps([vars(passage) for passage in passages]))


def load_passages(path: Path) -> list[Passage]:
    """Passages that `save_passages` wrote."""
    return [
        Passage(p["kind"], tuple(p["tokens"]), tuple(p["first_tokens"]), p["num_forced"])
        for p in json.loads(path.read_text())
    ]


def hash_of(passages: list[Passage]) -> str:
    """Names the tokens, whatever machine they were made on."""
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(repr((passage.first_tokens, passage.tokens, passage.num_forced)).encode())
    return digest.hexdigest()[:16]
