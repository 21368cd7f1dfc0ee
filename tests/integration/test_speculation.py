# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: the text is the one without it, whatever is drafted.

Drafts are n-grams of the text, or known to be right up to a place that changes from step to step
(drafting.py).
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration import drafting
from tests.integration.engines import GATE, run_engine, tokens_of
from tests.integration.tiny_models import write_llama, write_window_model

pytestmark = pytest.mark.slow

LAYERS, KV_HEADS, DRAFTS = 2, 2, 4
# Of so few words some come again, and not what came after them.
VOCABULARY = 32
PAGE, BLOCK, NEW = 32, 8, 64
# Prompts of several chunks, and a cache that cannot hold a crowd.
ENGINE = {
    "skip_tokenizer_init": True,
    "max_model_len": 512,
    "max_num_batched_tokens": 256,
    "num_gpu_blocks_override": 60,
}
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
KNOWN = {
    "method": "custom_class",
    "model": "tests.integration.drafting.KnownTexts",
    "num_speculative_tokens": DRAFTS,
}
SAMPLING = {"max_tokens": NEW, "ignore_eos": True, "detokenize": False}


def work() -> list[dict[str, Any]]:
    """Prompts that repeat themselves, one of them in two chunks, and a crowd."""
    generator = random.Random(0)
    prompts = []
    for length, period in ((5, 3), (70, 9), (300, 40), (90, 90)):
        words = generator.choices(range(3, VOCABULARY - 1), k=period)
        prompts.append(list(itertools.islice(itertools.cycle(words), length)))
    crowd = [generator.choices(range(3, VOCABULARY - 1), k=200) for _ in range(8)]
    return [
        {"prompts": prompts, "sampling": SAMPLING},
        {"prompts": crowd, "sampling": {**SAMPLING, "max_tokens": 96}},
    ]


def texts_of(batch: dict[str, Any], result: list[list[list[int]]]) -> list[list[int]]:
    """Each prompt with what came after it."""
    return [prompt + tokens for prompt, (tokens,) in zip(batch["prompts"], result, strict=True)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_llama(
        tmp_path_factory.mktemp("model") / "llama", num_key_value_heads=KV_HEADS,
        num_hidden_layers=LAYERS, vocab_size=VOCABULARY, max_position_embeddings=1024,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stock(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Stock vLLM, one token a step."""
    stock = run_engine(tmp_path_factory.mktemp("stock"), work(), model=model, **ENGINE)
    # Equal text says little where all text is equal.
    texts = [tokens for (tokens,) in tokens_of(stock)[0]]
    assert all(len(set(tokens)) > VOCABULARY // 3 for tokens in texts)
    return stock


def figures_of(result: dict[str, Any]) -> tuple[int, int, int]:
    """vLLM's own: steps with drafts, drafts, and of these accepted ones."""
    names = ("drafts", "draft_tokens", "accepted_tokens")
    return tuple(result["vllm_metrics"][f"vllm:spec_decode_num_{name}"] for name in names)


@pytest.mark.parametrize("k_bits", [4, pytest.param(16, marks=pytest.mark.full)])
def test_ngrams_leave_the_text_as_it_is(
    k_bits: int, model: str, stock: dict[str, Any], tmp_path: Path
) -> None:
    """With everything selected it is stock vLLM's, and drafts save steps."""
    settings = {**GATE, "k_bits": k_bits}
    found = run_engine(
        tmp_path, work()[:1], settings, model=model, speculative_config=NGRAM, **ENGINE
    )
    assert tokens_of(found) == tokens_of(stock)[:1]
    steps, drafts, accepted = figures_of(found)
    assert 0 < accepted < drafts <= 3 * steps
    # One list for each token of a step, with drafts: those that a request ends with stay unread.
    tokens = 4 * (NEW - 1)
    rows = found["kcache_metrics"]["selected_lists"] / (LAYERS * KV_HEADS)
    assert rows >= tokens - accepted + drafts - 3 * 4
    assert rows <= tokens - accepted + drafts + 3 * 4


@pytest.mark.full
@pytest.mark.parametrize("k_bits", [4, 16])
def test_a_selection_is_the_same_for_a_draft(k_bits: int, model: str, tmp_path: Path) -> None:
    """Where much is not selected the text is that of the same engine without drafts."""
    settings = {"top_n": 6, "sink_tokens": 8, "recent_tokens": 16, "k_bits": k_bits}
    runs = {
        name: run_engine(tmp_path, work()[:1], settings, model=model, **more, **ENGINE)
        for name, more in (("plain", {}), ("ngram", {"speculative_config": NGRAM}))
    }
    assert tokens_of(runs["ngram"]) == tokens_of(runs["plain"])
    assert 0 < figures_of(runs["ngram"])[2] < figures_of(runs["ngram"])[1]
    for run in runs.values():
        figures = run["kcache_metrics"]
        assert figures["dropped_mass"][0][1] < figures["selected_lists"] / 2


# Drafts that are known to be right up to a place.


@dataclass(frozen=True)
class VerificationStep:
    """Of one request: tokens before it, drafts, and how many of these are accepted."""

    length: int
    drafts: int
    accepted: int


def steps_of(prompt_tokens: int, total: int) -> Iterator[VerificationStep]:
    """The steps of a request that ends with so many tokens, after that of its prompt."""
    length = prompt_tokens + 1
    while length < total:
        drafts = min(DRAFTS, total - length)
        step = VerificationStep(length, drafts, min(drafting.right_drafts(length, DRAFTS), drafts))
        yield step
        length += step.accepted + 1


@pytest.fixture
def known_texts(
    stock: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[list[list[int]]]:
    """What will be drafted of: the texts of both batches, prompts first."""
    results = zip(work(), tokens_of(stock), strict=True)
    texts = [texts_of(batch, result) for batch, result in results]
    let_know(list(itertools.chain(*texts)), tmp_path, monkeypatch)
    return texts


def let_know(texts: list[list[int]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the texts where the drafts are made of them."""
    path = folder / "texts.json"
    path.write_text(json.dumps(texts))
    monkeypatch.setenv(drafting.TEXTS, str(path))


@pytest.mark.full
@pytest.mark.parametrize("k_bits", [4, 16])
def test_drafts_rejected_at_every_position(
    k_bits: int, model: str, known_texts: list[list[list[int]]], tmp_path: Path
) -> None:
    """The text is stock vLLM's, also where a later prompt finds blocks in the prefix cache that had
    drafts in them; and vLLM's figures are what was drafted and accepted."""
    (first, _), (texts, _) = work(), known_texts
    begun = [text[:-24] for text in texts]
    batches = [first, {"prompts": begun, "sampling": {**SAMPLING, "max_tokens": 24}}]
    found = run_engine(
        tmp_path, batches, {**GATE, "k_bits": k_bits}, model=model, speculative_config=KNOWN,
        **ENGINE,
    )  # fmt: skip
    for batch, result in zip(batches, tokens_of(found), strict=True):
        assert texts_of(batch, result) == texts
    hits = [row["cached_tokens"] for row in found["batches"][1]]
    assert all(hit > len(text) - NEW for hit, text in zip(hits, texts, strict=True) if hit > PAGE)
    assert sum(hit > PAGE for hit in hits) == 3
    steps = [
        step
        for prompt, text in zip([*first["prompts"], *begun], 2 * texts, strict=True)
        for step in steps_of(len(prompt), len(text))
    ]
    drafted = [step for step in steps if step.drafts]
    assert figures_of(found) == (
        len(drafted), sum(s.drafts for s in steps), sum(s.accepted for s in steps)
    )  # fmt: skip
    rows = sum(1 + step.drafts for step in steps)
    assert found["kcache_metrics"]["selected_lists"] == rows * LAYERS * KV_HEADS
    # Each number was accepted, and the first rejected one stood at each offset in a V block and at
    # both ends of a page.
    whole = [step for step in drafted if step.drafts == DRAFTS]
    assert {step.accepted for step in whole} == set(range(DRAFTS + 1))
    # Token n of a request stands at offset n - 1; the step's own one is before the drafts.
    rejected = [s.length + s.accepted for s in whole if s.accepted < DRAFTS]
    assert {place % BLOCK for place in rejected} == set(range(BLOCK))
    assert {0, PAGE - 1} <= {place % PAGE for place in rejected}


@pytest.mark.full
@pytest.mark.parametrize("k_bits", [4, 16])
def test_drafts_under_preemption(
    k_bits: int, model: str, known_texts: list[list[list[int]]], tmp_path: Path
) -> None:
    batch = work()[1]
    found = run_engine(
        tmp_path, [batch], {**GATE, "k_bits": k_bits}, model=model, speculative_config=KNOWN,
        **ENGINE,
    )  # fmt: skip
    assert found["vllm_metrics"]["vllm:num_preemptions"] > 0
    assert texts_of(batch, tokens_of(found)[0]) == known_texts[1]
    assert 0 < figures_of(found)[2] < figures_of(found)[1]


@pytest.mark.full
@pytest.mark.usefixtures("known_texts")
@pytest.mark.parametrize(
    ("settings", "more"),
    [
        pytest.param({"dense_layers": 1}, {}, id="dense layers"),
        pytest.param({}, {"tensor_parallel_size": 2}, id="two ranks"),
    ],
)
def test_drafts_beside(
    settings: dict[str, Any],
    more: dict[str, Any],
    model: str,
    stock: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers that run vLLM's own attention; ranks, of which the first drafts."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    settings = {**GATE, "k_bits": 4, **settings}
    found = run_engine(
        tmp_path, work()[:1], settings, model=model, speculative_config=KNOWN, **more, **ENGINE
    )
    assert tokens_of(found) == tokens_of(stock)[:1]
    assert 0 < figures_of(found)[2] < figures_of(found)[1]


@pytest.mark.full
@pytest.mark.parametrize("k_bits", [4, 16])
def test_drafts_beside_window_layers(
    k_bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their pool is another one; drafts cross the ends of blocks of both."""
    kinds = ["sliding_attention", "full_attention"] * 2
    model = write_window_model(
        tmp_path / "model", "gemma3_text", num_hidden_layers=4, layer_types=kinds,
        vocab_size=VOCABULARY,
    )  # fmt: skip
    engine = {**ENGINE, "model": model, "max_model_len": 448}
    batch = work()[0]
    stock = run_engine(tmp_path, [batch], **engine)
    let_know(texts_of(batch, tokens_of(stock)[0]), tmp_path, monkeypatch)
    found = run_engine(
        tmp_path, [batch], {**GATE, "k_bits": k_bits}, speculative_config=KNOWN, **engine
    )
    assert tokens_of(found) == tokens_of(stock)
    assert 0 < figures_of(found)[2] < figures_of(found)[1]
