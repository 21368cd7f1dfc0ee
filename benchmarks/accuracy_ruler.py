# SPDX-License-Identifier: Apache-2.0
"""Synthetic tasks after RULER (arXiv 2404.06654), made on the spot from fixed seeds.

Needles, variables and words are those of RULER's tasks; the filling is the King James Bible, the
wording of the questions is ours, and there are no worked examples in the prompts, so scores are not
to be held against published ones. As there, a prompt ends with the start of its answer, and a score
is the share of the references that the answer contains, whatever its case.
"""

from __future__ import annotations

import itertools
import random
import re
import string
from collections.abc import Callable

from benchmarks.accuracy_items import Filling, Prompter, TaskItem, fill
from benchmarks.accuracy_texts import read_text

_FIRST = (
    "amber brave calm dusty eager faint gentle hollow icy jolly keen lively mellow narrow odd pale "
    "quiet rapid silent tidy urban vivid warm young zesty"
)
_SECOND = (
    "anchor basket candle dragon engine feather garden hammer island jacket kettle ladder mirror "
    "needle orchard pepper quilt river saddle teapot umbrella violin window yarn zebra"
)
KEYS = tuple(f"{first}-{second}" for first in _FIRST.split() for second in _SECOND.split())
NEEDLES = 4
HOPS = 4
COMMON_WORDS = 10
# Entries of a list of words: more than 128K tokens hold.
MOST_ENTRIES = 18_000
# Tokens to generate for an answer.
MAX_TOKENS = {"single": 32, "multikey": 32, "multivalue": 96, "variables": 64, "words": 96}
TASKS = tuple(MAX_TOKENS)


def score_references(text: str, references: tuple[str, ...]) -> float:
    """Share of the references that the text contains, 0 to 1; case does not matter."""
    lowered = text.lower()
    return sum(reference.lower() in lowered for reference in references) / len(references)


class Ruler:
    """Makes items. The same number has the same needles at every length.

    Args:
        prompter: makes prompts and counts tokens.
    """

    def __init__(self, prompter: Prompter) -> None:
        self.prompter = prompter
        self.filling = Filling(verses(), prompter)
        self.words = word_list()
        self.word_tokens = prompter.counts([" " + word for word in self.words])
        numbers = prompter.counts([f" {i}." for i in range(1, MOST_ENTRIES + 1)])
        self.number_sums = list(itertools.accumulate(numbers, initial=0))

    def item(self, task: str, number: int, length: int) -> TaskItem:
        """One item; prompt and answer have at most `length` tokens.

        Raises:
            ValueError: the length is too short for the task.
        """
        make: Callable[[random.Random, int], TaskItem] = getattr(self, f"_{task}")
        # Strings seed alike in every version of Python.
        draw = random.Random(f"{task} {number}")
        try:
            item = make(draw, length - MAX_TOKENS[task])
        except ValueError as error:
            raise ValueError(f"task {task!r}, {length} tokens: {error}") from None
        if len(item.answer) > item.max_tokens:
            raise ValueError(
                f"task {task!r}: the right answer has {len(item.answer)} tokens with this "
                f"tokenizer, more than the {item.max_tokens} to generate"
            )
        return item

    def _item(
        self, task: str, prompt: list[int], begun: str, rest: str, references: list[str]
    ) -> TaskItem:
        return TaskItem(
            task=task,
            prompt=tuple(prompt),
            answer=tuple(self.prompter.answer(begun, rest)),
            max_tokens=MAX_TOKENS[task],
            stops=True,
            references=tuple(references),
            begun=begun,
        )

    def _single(self, draw: random.Random, room: int) -> TaskItem:
        return self._needles("single", draw, room, keys=1, values=1)

    def _multikey(self, draw: random.Random, room: int) -> TaskItem:
        return self._needles("multikey", draw, room, keys=NEEDLES, values=1)

    def _multivalue(self, draw: random.Random, room: int) -> TaskItem:
        return self._needles("multivalue", draw, room, keys=1, values=NEEDLES)

    def _needles(
        self, task: str, draw: random.Random, room: int, keys: int, values: int
    ) -> TaskItem:
        """Numbers of seven digits, each with a key, hidden in prose; the first key is asked for."""
        names = draw.sample(KEYS, keys)
        numbers = [str(n) for n in draw.sample(range(10**6, 10**7), keys * values)]
        needles = [
            f"One of the special magic numbers for {names[i // values]} is: {number}."
            for i, number in enumerate(numbers)
        ]
        wanted = numbers[:values]
        what = f"the special magic numbers for {names[0]}"
        begun = f"The special magic numbers for {names[0]} in the text are"
        if values == 1:
            needles = [n.replace("numbers", "number").replace("One of the", "The") for n in needles]
            what, begun = what.replace("numbers", "number"), begun.replace("numbers", "number")
            begun = begun.removesuffix("are") + "is"
        places = [draw.random() for _ in needles]
        # In the order of the text.
        wanted = [w for _, w in sorted(zip(places, wanted, strict=False))]

        def question(text: str) -> str:
            return (
                "Special magic numbers are hidden in the following text. Remember them, I will ask "
                f"you about them afterwards.\n\n{text}\n\nWhat {'is' if values == 1 else 'are'} "
                f"{what} in the text above?"
            )

        prompt = self.filling.fill(question, needles, places, self.prompter, begun, room, draw)
        rest = " " + ", ".join(wanted[:-1]) + (", and " if values > 1 else "") + wanted[-1] + "."
        return self._item(task, prompt, begun, rest.replace("  ", " "), wanted)

    def _variables(self, draw: random.Random, room: int) -> TaskItem:
        """A value handed on from variable to variable; which have it?"""
        letters = [draw.sample(string.ascii_uppercase, 5) for _ in range(HOPS + 1)]
        names = ["".join(name) for name in letters]
        value = str(draw.randrange(10**4, 10**5))
        steps = [f"VAR {names[0]} = {value}."]
        steps += [f"VAR {after} = VAR {before}." for before, after in itertools.pairwise(names)]
        places = sorted(draw.random() for _ in steps)
        begun = f"{len(names)} variables are assigned the value {value}, directly or by way of "
        begun += "others; they are:"

        def question(text: str) -> str:
            return (
                "Remember the variable assignments hidden in the following text.\n\n"
                f"{text}\n\nFind all variables that are assigned the value {value} in the text "
                "above, directly or by way of other variables."
            )

        prompt = self.filling.fill(question, steps, places, self.prompter, begun, room, draw)
        return self._item("variables", prompt, begun, " " + ", ".join(names) + ".", names)

    def _words(self, draw: random.Random, room: int) -> TaskItem:
        """A numbered list in which ten words come far more often than all others."""
        common_times, other_times = (30, 3) if room >= 3500 else (10, 1)
        order = draw.sample(range(len(self.words)), len(self.words))
        common, others = order[:COMMON_WORDS], order[COMMON_WORDS:]
        begun = "The ten words that come most often in the list are:"
        shuffle_seed = draw.random()

        def listed(number: int) -> list[str]:
            chosen = [self.words[i] for i in common] * common_times
            chosen += [self.words[i] for i in others[:number]] * other_times
            random.Random(shuffle_seed).shuffle(chosen)
            return chosen

        def question(number: int) -> str:
            text = " ".join(f"{i}. {word}" for i, word in enumerate(listed(number), start=1))
            return (
                "Below is a numbered list of words. Some of them come often, most come seldom. "
                f"Remember those that come most often.\n\n{text}\n\nWhich ten words come most "
                "often in the list above?"
            )

        sums = list(itertools.accumulate((self.word_tokens[i] for i in others), initial=0))
        first = COMMON_WORDS * common_times

        def estimate(pieces: int) -> int:
            numbers = self.number_sums[first + pieces * other_times] - self.number_sums[first]
            return other_times * sums[pieces] + numbers

        text, number = fill(
            question,
            estimate,
            lambda text: len(self.prompter.prompt(text, begun)),
            room,
            min(len(others), (MOST_ENTRIES - first) // other_times),
        )
        wanted = {self.words[i] for i in common}
        names = [word for word in dict.fromkeys(listed(number)) if word in wanted]
        return self._item(
            "words", self.prompter.prompt(text, begun), begun, " " + ", ".join(names) + ".", names
        )


def verses() -> list[str]:
    """The filling: verses of the King James Bible, one after the other."""
    return [line.strip() for line in read_text("kjv.txt.gz").splitlines() if line.strip()]


def word_list() -> list[str]:
    """Distinct words of five to nine letters of the Jargon File, in alphabetic order."""
    found = re.findall(r"\b[a-z]{5,9}\b", read_text("jargon.txt.gz"))
    return sorted(set(found))
