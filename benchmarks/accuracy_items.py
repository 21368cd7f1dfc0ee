# SPDX-License-Identifier: Apache-2.0
"""Items of the task benchmark: a prompt of a wanted length, the right answer, and how to score.

Prompt and answer are counted with the model's own tokenizer, so that both fit the length.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TaskItem:
    """One question.

    Attributes:
        task: name of the task.
        prompt: its tokens, chat template and start of the answer included.
        answer: tokens of the right answer; none where there is no right one.
        max_tokens: tokens to generate.
        stops: generation ends at the end of the answer; else it goes on to `max_tokens`.
        references: texts that a right answer contains.
        records: what an extraction should find; else none.
        begun: the start of the answer, which is in the prompt.
    """

    task: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    max_tokens: int
    stops: bool
    references: tuple[str, ...] = ()
    records: tuple[dict[str, Any], ...] = ()
    begun: str = ""


def save_items(path: Path, items: dict[int, list[TaskItem]]) -> None:
    """Write the items of each length for the engine's process."""
    path.write_text(
        json.dumps({length: [vars(i) for i in group] for length, group in items.items()})
    )


def load_items(path: Path) -> dict[int, list[TaskItem]]:
    """Items that `save_items` wrote."""
    tuples = ("prompt", "answer", "references", "records")
    return {
        int(length): [TaskItem(**{**i, **{name: tuple(i[name]) for name in tuples}}) for i in group]
        for length, group in json.loads(path.read_text()).items()
    }


def hash_of_items(items: list[TaskItem]) -> str:
    """Names the items, whatever machine they were made on."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(vars(item), sort_keys=True).encode())
    return digest.hexdigest()[:16]


class Prompter:
    """Puts questions into the model's chat template and counts tokens.

    Args:
        tokenizer: a Hugging Face tokenizer. Without a chat template the question stands alone.
    """

    _PLACE = "QUESTION-HERE"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.first_tokens: list[int] = []
        if getattr(tokenizer, "chat_template", None):
            chat = [{"role": "user", "content": self._PLACE}]
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            self.before, self.after = text.split(self._PLACE)
        else:
            self.first_tokens = list(tokenizer("")["input_ids"])
            self.before, self.after = "", "\n"

    def encode(self, text: str) -> list[int]:
        """Tokens of a text alone."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def counts(self, pieces: Sequence[str]) -> list[int]:
        """Tokens of each piece."""
        if not pieces:
            return []
        encoded = self.tokenizer(list(pieces), add_special_tokens=False)["input_ids"]
        return [len(tokens) for tokens in encoded]

    def prompt(self, question: str, begun: str) -> list[int]:
        """Tokens of a question and the start of its answer."""
        return [*self.first_tokens, *self.encode(self.before + question + self.after + begun)]

    def answer(self, begun: str, rest: str) -> list[int]:
        """Tokens that continue `begun` in the prompt.

        Raises:
            ValueError: the tokenizer joins the two.
        """
        start = self.encode(self.after + begun)
        both = self.encode(self.after + begun + rest)
        if both[: len(start)] != start:
            raise ValueError(
                f"this tokenizer joins the prompt's end {begun[-20:]!r} and {rest[:20]!r}"
            )
        return both[len(start) :]


def fill(
    question: Callable[[int], str],
    estimate: Callable[[int], int],
    count: Callable[[str], int],
    room: int,
    most: int,
) -> tuple[str, int]:
    """Make the question as long as fits.

    Args:
        question: makes the question with a number of pieces of filling.
        estimate: about how many tokens so many pieces add; grows with the number.
        count: tokens of the prompt with a question.
        room: most tokens of the prompt.
        most: most pieces.

    Returns:
        The question and its number of pieces.

    Raises:
        ValueError: not even the question without filling fits.
    """
    base = count(question(0))
    if base > room:
        raise ValueError(f"the shortest prompt has {base} tokens and there is room for {room}")
    left = room - base
    pieces = bisect.bisect_right(range(most + 1), left, key=estimate) - 1
    text = question(pieces)
    # Tokens at the joints may differ from the estimate.
    while pieces and count(text) > room:
        pieces -= 1
        text = question(pieces)
    return text, pieces


class Filling:
    """Sentences that lie between what a question is about.

    Args:
        sentences: in their order.
        prompter: counts their tokens, with the space before them.
    """

    def __init__(self, sentences: list[str], prompter: Prompter) -> None:
        self.sentences = sentences
        self.sums = [0]
        for tokens in prompter.counts([" " + sentence for sentence in sentences]):
            self.sums.append(self.sums[-1] + tokens)

    def start(self, room: int, draw: random.Random) -> int:
        """A first sentence that leaves `room` tokens after it.

        Raises:
            ValueError: there are too few.
        """
        last = bisect.bisect_right(self.sums, self.sums[-1] - room) - 1
        if last < 0:
            raise ValueError(f"the filling has {self.sums[-1]} tokens and {room} are wanted")
        return draw.randrange(last + 1)

    def text(self, start: int, count: int, inserted: Sequence[str], places: Sequence[float]) -> str:
        """`count` sentences with others among them.

        Args:
            start: first sentence.
            count: how many.
            inserted: what goes among them, in this order where places are equal.
            places: where each goes, 0 (before the first) to 1.
        """
        parts = self.sentences[start : start + count]
        order = sorted(range(len(inserted)), key=lambda i: places[i])
        for index in reversed(order):
            parts.insert(round(places[index] * count), inserted[index])
        return " ".join(parts)

    def fill(
        self,
        question: Callable[[str], str],
        inserted: Sequence[str],
        places: Sequence[float],
        prompter: Prompter,
        begun: str,
        room: int,
        draw: random.Random,
    ) -> list[int]:
        """Tokens of a prompt of at most `room`, its text as long as fits.

        Args:
            question: makes the question from the text.
            inserted, places: see `text`.
            prompter: makes the prompt.
            begun: start of the answer.
            room: most tokens.
            draw: chooses the first sentence.
        """
        start = self.start(room, draw)
        made: dict[str, list[int]] = {}

        def count(text: str) -> int:
            made[text] = prompter.prompt(text, begun)
            return len(made[text])

        text, _ = fill(
            lambda number: question(self.text(start, number, inserted, places)),
            lambda number: self.sums[start + number] - self.sums[start],
            count,
            room,
            len(self.sentences) - start,
        )
        return made[text]
