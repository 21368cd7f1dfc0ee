# SPDX-License-Identifier: Apache-2.0
"""Acceptance, free and along a text, against figures worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.accuracy.acceptance import Follower, compared, parse

PROMPT = [1000, 1001, 1002]
# What stock writes after the prompt, and would go on with.
TEXT = list(range(20))
PAGE_TOKENS = 16


class FakeEngine:
    """Verifies drafts as vLLM does, with a model and a draft that are lists of tokens by place.

    Args:
        decoded: tokens that a step of decoding puts elsewhere than `TEXT`, by place.
        prefilled: the same of a prompt's pass.
        drafted: tokens that are drafted elsewhere than `TEXT`, by place.
        num_drafts: drafted in a step; by place of its first where it is a dict, else none.
    """

    def __init__(
        self,
        decoded: dict[int, int] | None = None,
        prefilled: dict[int, int] | None = None,
        drafted: dict[int, int] | None = None,
        num_drafts: int | dict[int, int] = 3,
    ) -> None:
        self.decoded, self.prefilled = decoded or {}, prefilled or {}
        self.drafts, self.num_drafts = drafted or {}, num_drafts
        self.running: dict[str, Any] = {}
        self.asked: list[tuple[list[int], int, bool]] = []
        self.drafted = self.accepted = 0

    def add_request(self, name: str, prompt: dict[str, list[int]], params: Any) -> None:
        assert name not in self.running
        assert params.temperature == 0.0
        assert params.ignore_eos
        written = prompt["prompt_token_ids"][len(PROMPT) :]
        self.asked.append((written, params.max_tokens, params.skip_reading_prefix_cache))
        request = SimpleNamespace(start=len(written), written=[], most=params.max_tokens)
        self.running[name] = request

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            del self.running[name]

    def step(self) -> list[Any]:
        outputs = []
        for name, request in list(self.running.items()):
            place = request.start + len(request.written)
            if request.written:
                request.written += self._verify(place)
            else:
                request.written.append(self.prefilled.get(place, TEXT[place]))
            del request.written[request.most :]
            finished = len(request.written) == request.most
            if finished:
                del self.running[name]
            said = SimpleNamespace(token_ids=tuple(request.written))
            outputs.append(SimpleNamespace(request_id=name, finished=finished, outputs=[said]))
        return outputs

    def _verify(self, place: int) -> list[int]:
        count = self.num_drafts
        count = count if isinstance(count, int) else count.get(place, 0)
        self.drafted += count
        tokens = []
        for at in range(place, place + count + 1):
            tokens.append(self.decoded.get(at, TEXT[at]))
            if at == place + count or tokens[-1] != self.drafts.get(at, TEXT[at]):
                break
        self.accepted += len(tokens) - 1
        return tokens


def follow(engine: FakeEngine, *texts: list[int]) -> tuple[int, int, dict[str, int]]:
    """Drafted, accepted, and what the follower counts."""
    counts = Follower(engine, PAGE_TOKENS).follow([PROMPT] * len(texts), list(texts))
    return engine.drafted, engine.accepted, counts


def test_an_engine_that_stays_writes_once() -> None:
    """A token of the prompt's pass, then steps of 4: from places 1 and 5 for 8 tokens."""
    engine = FakeEngine()
    assert follow(engine, TEXT[:8]) == (6, 6, {"partings": 0, "not_verified": 0})
    assert engine.asked == [([], 8, False)]


@pytest.mark.parametrize(
    ("wrong", "drafted", "accepted"),
    [
        # Steps from 1 (0 of 3), then from 2: 3 of 3, and from 6: 3 of 3.
        (1, 9, 6),
        # From 1: 1 of 3; from 3, 7.
        (2, 9, 7),
        # From 1: 2 of 3; from 4, with 8 the end: no other.
        (3, 6, 5),
        # From 1: 3 of 3, and another token after them; from 5.
        (4, 6, 6),
        # From 1: 3 of 3; from 5: 2 of 3; nothing is left after place 7.
        (7, 6, 5),
    ],
)
def test_a_step_that_leaves_is_the_last_of_its_request(
    wrong: int, drafted: int, accepted: int
) -> None:
    engine = FakeEngine(decoded={wrong: 99})
    assert follow(engine, TEXT[:8]) == (drafted, accepted, {"partings": 1, "not_verified": 0})
    again = [] if wrong == 7 else [(TEXT[:wrong], 8 - wrong, False)]
    assert engine.asked == [([], 8, False), *again]


def test_drafts_that_only_this_engine_accepts_count() -> None:
    """Stock rejects the draft of place 2; this engine writes it and the bonus that follows."""
    assert follow(FakeEngine(drafted={2: 99}), TEXT[:6]) == (
        6, 4, {"partings": 0, "not_verified": 0},
    )  # fmt: skip
    # From 1: 3 of 3, for the draft of 3 is what comes after the wrong one, too; from 3: 3 of 3.
    assert follow(FakeEngine(decoded={2: 99}, drafted={2: 99}), TEXT[:6]) == (
        6, 6, {"partings": 1, "not_verified": 0},
    )  # fmt: skip


def test_steps_without_drafts() -> None:
    """As n-grams that are not found: they may leave the text, and nothing was drafted."""
    engine = FakeEngine(decoded={2: 99}, num_drafts={4: 2})
    assert follow(engine, TEXT[:6]) == (2, 2, {"partings": 1, "not_verified": 0})
    assert engine.asked == [([], 6, False), (TEXT[:2], 4, False)]


def test_the_prompts_pass_may_leave_the_text() -> None:
    """Then the text's token is given as well, and the step after it is lost: from 4 on to 7."""
    engine = FakeEngine(decoded={2: 99}, prefilled={2: 99})
    assert follow(engine, TEXT[:8]) == (6, 4, {"partings": 1, "not_verified": 1})
    assert engine.asked == [([], 8, False), (TEXT[:2], 6, False), (TEXT[:3], 5, False)]


@pytest.mark.parametrize("length", [0, 1])
def test_texts_too_short_for_a_draft(length: int) -> None:
    engine = FakeEngine()
    assert follow(engine, TEXT[:length]) == (0, 0, {"partings": 0, "not_verified": 0})
    assert engine.asked == []


def test_texts_of_a_group_do_not_mix() -> None:
    """The second is left twice, by a step and by a prompt's pass, while the others go on."""
    texts = [TEXT[:8], [0, 55, *TEXT[2:8]], TEXT[:3]]
    engine = FakeEngine()
    # Steps from 1 and 5; from 1, then from 3 and 7; from 1: of 3 drafts each, all accepted.
    assert follow(engine, *texts) == (6 + 9 + 3, 18, {"partings": 1, "not_verified": 1})
    assert engine.asked[3:] == [(texts[1][:1], 7, False), (texts[1][:2], 6, False)]


def test_a_pass_of_one_token_is_not_read_from_the_cache() -> None:
    """Prompts that end one token after a page: 3 + 14 tokens with pages of 16."""
    engine = FakeEngine(decoded={14: 99, 15: 98})
    follow(engine, TEXT[:18])
    assert [(len(w), skip) for w, _, skip in engine.asked] == [(0, False), (14, True), (15, False)]


def group(
    kind: str, drafted: int, accepted: int, *texts: list[int], along: tuple[int, int] = (0, 0)
) -> dict[str, Any]:
    """What an engine tells of one group."""
    followed = {"drafted": along[0], "accepted": along[1], "partings": 2, "not_verified": 0}
    return {
        "kind": kind,
        "texts": list(texts),
        "free": {"drafted": drafted, "accepted": accepted},
        "along": followed,
    }


def test_groups_are_pooled_and_paired() -> None:
    """Shares are of all drafts of a kind, not means of shares; the error is over groups."""
    stock = [group("code", 10, 5, [1, 2]), group("code", 30, 9, [3, 4]), group("prose", 20, 2, [5])]
    ours = [group("code", 10, 6, [1, 2]), group("code", 30, 9, [3, 7]), group("prose", 20, 4, [5])]
    figures = compared(ours, stock)
    assert list(figures) == ["all", "code", "prose"]
    assert figures["code"]["drafted"] == 40
    assert figures["code"]["acceptance"] == pytest.approx(15 / 40)
    assert figures["code"]["stock"] == pytest.approx(14 / 40)
    assert figures["code"]["difference"] == pytest.approx(1 / 40)
    assert figures["code"]["same_texts"] == 0.5
    # Without the first group the difference is 0, without the second .1: sqrt(1 * .05 ** 2).
    assert figures["code"]["error"] == pytest.approx(0.05)
    assert figures["all"]["difference"] == pytest.approx(3 / 60)
    assert figures["all"]["same_texts"] == pytest.approx(2 / 3)


def test_free_runs_and_those_along_a_text_are_apart() -> None:
    stock = [group("code", 10, 5, [1], along=(8, 4)), group("code", 30, 9, [3], along=(12, 4))]
    ours = [group("code", 10, 1, [1], along=(8, 4)), group("code", 30, 9, [3], along=(16, 4))]
    figures = compared(ours, stock)["code"]
    assert (figures["drafted"], figures["acceptance"]) == (40, 10 / 40)
    along = figures["along"]
    assert (along["drafted"], along["partings"], along["not_verified"]) == (24, 4, 0)
    assert (along["acceptance"], along["stock"]) == (8 / 24, 8 / 20)
    assert along["difference"] == pytest.approx(8 / 24 - 8 / 20)
    # Without the first group 4/16 - 4/12, without the second 0: half of their distance.
    assert along["error"] == pytest.approx((4 / 12 - 4 / 16) / 2)


def test_nothing_drafted_is_no_share() -> None:
    figures = compared([group("prose", 0, 0, [1])] * 2, [group("prose", 0, 0, [1])] * 2)
    assert math.isnan(figures["prose"]["acceptance"])


def test_groups_are_of_one_kind(capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the passages are prose: 24 of them are not groups of 8 of either kind."""
    with pytest.raises(SystemExit):
        parse(["model", "--items", "24"])
    assert "--items 24: must be a multiple of 16" in capsys.readouterr().err
