# SPDX-License-Identifier: Apache-2.0
"""Figures of the task benchmark: what the split cache answered, item by item beside stock."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.accuracy_extraction import score_records
from benchmarks.accuracy_items import TaskItem
from benchmarks.accuracy_ruler import TASKS, score_references
from benchmarks.accuracy_score import FIELDS

# Figures that are averaged over the tasks after RULER, and those that have a standard error.
_AVERAGED = (
    "score", "stock_score", "difference", "answer_logprob", "answer_stock_logprob",
    "answer_logprob_change", "answer_kl", "answer_top1_agreement", "identical",
)  # fmt: skip
_WITH_ERROR = ("difference", "answer_logprob_change", "answer_kl")


@dataclass
class Outcome:
    """What became of an item.

    Attributes:
        item: the item.
        said: tokens of the answer, the end token included where there is one.
        text: the same as text, without special tokens.
        stock_said: tokens that stock said.
        stock_text: as text.
        positions: [answer tokens, 4] float64, columns as `accuracy_score.FIELDS`: the tokens of the
            right answer, forced; None where there is no right answer.
    """

    item: TaskItem
    said: list[int]
    text: str
    stock_said: list[int]
    stock_text: str
    positions: np.ndarray | None


def score(item: TaskItem, text: str) -> float | None:
    """Points of an answer, 0 to 100; None where there is no right answer."""
    if item.records:
        return 100 * score_records(item.begun + text, item.records)
    return 100 * score_references(text, item.references) if item.references else None


def first_difference(said: list[int], other: list[int]) -> int | None:
    """Tokens before the first that differs; None if all are the same."""
    if said == other:
        return None
    pairs = itertools.zip_longest(said, other)
    return next(place for place, (a, b) in enumerate(pairs) if a != b)


def summarise_tasks(outcomes: list[Outcome]) -> dict[str, Any]:
    """Figures of each task, and `average` over the tasks after RULER.

    Scores are points of 100; `difference` is the split cache's less stock's, and `answer_logprob_
    change` the same of the right answer's log-probability, nats a token. The first token of an
    answer comes from the prefill, which is exact, and does not count there. `*_error` is the
    standard error of a mean over items, of the paired difference where it is one. `identical` is
    the share of answers that are stock's, token by token, and `first_difference` the mean number of
    tokens before the first that differs, of those that are not.
    """
    by_task: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_task.setdefault(outcome.item.task, []).append(outcome)
    tasks = {task: _figures(group) for task, group in by_task.items()}
    return {"tasks": tasks, "average": _average([tasks[t] for t in TASKS if t in tasks])}


def _figures(outcomes: list[Outcome]) -> dict[str, Any]:
    places = [first_difference(o.said, o.stock_said) for o in outcomes]
    differing = [place for place in places if place is not None]
    figures: dict[str, Any] = {
        "items": len(outcomes),
        "identical": 1 - len(differing) / len(outcomes),
        "first_difference": float(np.mean(differing)) if differing else math.nan,
        "said_tokens": float(np.mean([len(o.said) for o in outcomes])),
    }
    scores = [score(o.item, o.text) for o in outcomes]
    if None not in scores:
        stock_scores = [score(o.item, o.stock_text) for o in outcomes]
        figures |= _paired("score", "difference", np.array(scores), np.array(stock_scores))
        figures |= {"scores": scores, "stock_scores": stock_scores}
    if all(o.positions is not None for o in outcomes):
        figures |= _answer_figures([o.positions for o in outcomes])
    return figures


def _answer_figures(positions: list[np.ndarray]) -> dict[str, Any]:
    """Of the right answers: mean over the tokens of each, then over items."""
    means = np.array([item[1:].mean(0) for item in positions])
    logprob, stock_logprob, kl, agrees = (means[:, FIELDS.index(name)] for name in FIELDS)
    names = ("answer_logprob", "answer_logprob_change")
    return {
        "answer_tokens": sum(len(item) - 1 for item in positions),
        **_paired(*names, logprob, stock_logprob),
        "answer_kl": float(kl.mean()),
        "answer_kl_error": _standard_error(kl),
        "answer_top1_agreement": float(agrees.mean()),
    }


def _paired(name: str, change: str, ours: np.ndarray, stock: np.ndarray) -> dict[str, float]:
    stock_name = f"stock_{name}" if name == "score" else name.replace("answer_", "answer_stock_")
    return {
        name: float(ours.mean()),
        stock_name: float(stock.mean()),
        change: float((ours - stock).mean()),
        f"{change}_error": _standard_error(ours - stock),
    }


def _average(tasks: list[dict[str, Any]]) -> dict[str, float]:
    """Every task counts alike; their items are independent."""
    figures = {name: float(np.mean([task[name] for task in tasks])) for name in _AVERAGED}
    for name in _WITH_ERROR:
        errors = np.array([task[f"{name}_error"] for task in tasks])
        figures[f"{name}_error"] = float(np.sqrt((errors**2).sum()) / len(tasks))
    return figures


def _standard_error(values: np.ndarray) -> float:
    """Of the mean; NaN with one item."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
