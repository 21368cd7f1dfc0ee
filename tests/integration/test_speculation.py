# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: the text is the one without it, whatever is drafted.

Drafts are n-grams of the text, a smaller model's, those of a head over hidden states
(draft_heads.py), or known to be right up to a place that changes from step to step (drafting.py).
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
from tests.integration.draft_heads import write_eagle_head, write_mimo_model, write_mtp_model
from tests.integration.engines import GATE, Runs, run_engine, run_engines, spec_of, tokens_of
from tests.integration.tiny_models import cut_model, write_llama, write_window_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

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
# Few of the blocks of all prompts but one.
SELECTION = {"top_n": 6, "sink_tokens": 8, "recent_tokens": 16}
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
def runs(model: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Stock vLLM, one token a step; and codes, with n-grams as drafts."""
    specs = {
        "stock": spec_of(work()[:1], model=model, **ENGINE),
        "ngram, 4": spec_of(
            work()[:1], {**GATE, "k_bits": 4}, model=model, speculative_config=NGRAM, **ENGINE
        ),
    }
    return run_engines(tmp_path_factory.mktemp("runs"), specs)


@pytest.fixture(scope="module")
def stock(runs: Runs) -> dict[str, Any]:
    """What comes without the split cache and without drafts."""
    # Equal text says little where all text is equal.
    texts = [tokens for (tokens,) in tokens_of(runs["stock"])[0]]
    assert all(len(set(tokens)) > VOCABULARY // 3 for tokens in texts)
    return runs["stock"]


@pytest.fixture(scope="module")
def window_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two of its four layers have a window."""
    kinds = ["sliding_attention", "full_attention"] * 2
    return write_window_model(
        tmp_path_factory.mktemp("model") / "gemma", "gemma3_text", num_hidden_layers=4,
        layer_types=kinds, vocab_size=VOCABULARY,
    )  # fmt: skip


@pytest.fixture(scope="module")
def long_stock(model: str, window_model: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Stock vLLM, one token a step: a crowd, and the model with window layers."""
    first, crowd = work()
    specs = {
        "crowd": spec_of([crowd], model=model, **ENGINE),
        "windows": spec_of([first], model=window_model, **ENGINE),
    }
    return run_engines(tmp_path_factory.mktemp("stock"), specs)


@pytest.fixture(scope="module")
def known(stock: dict[str, Any]) -> list[list[int]]:
    """The texts of the first batch, prompts first."""
    return texts_of(work()[0], tokens_of(stock)[0])


@pytest.fixture(scope="module")
def long_runs(
    model: str,
    window_model: str,
    long_stock: Runs,
    known: list[list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    """All other engines, those with drafts of known texts among them."""
    first, crowd = work()
    again = begun(known)
    folder = tmp_path_factory.mktemp("long")
    smaller = smaller_model(model, folder)
    specs = {"stock, draft": spec_of([first], model=model, speculative_config=smaller, **ENGINE)}
    for k_bits in (4, 16):
        everything, few = {**GATE, "k_bits": k_bits}, {**SELECTION, "k_bits": k_bits}
        for name, model_of, batches, settings, drafts in (
            ("selection", model, [first], few, None),
            ("selection, ngram", model, [first], few, NGRAM),
            ("ngram", model, [first], everything, NGRAM),
            ("known", model, [first, again], everything, KNOWN),
            ("crowd", model, [crowd], everything, KNOWN),
            ("dense", model, [first], {**everything, "dense_layers": 1}, KNOWN),
            ("windows", window_model, [first], everything, KNOWN),
            ("draft", model, [first], everything, smaller),
            ("draft, crowd", model, [crowd], everything, smaller),
            # As many layers as the smaller model has.
            ("draft, dense", model, [first], {**everything, "dense_layers": 1}, smaller),
            ("draft, windows", window_model, [first], everything, smaller),
        ):
            if (name, k_bits) != ("ngram", 4):
                specs[f"{name}, {k_bits}"] = spec_of(
                    batches, settings, model=model_of, speculative_config=drafts, **ENGINE
                )
    texts = [*known]
    for batch, name in ((crowd, "crowd"), (first, "windows")):
        texts += texts_of(batch, tokens_of(long_stock[name])[0])
    with pytest.MonkeyPatch.context() as patch:
        let_know(texts, folder, patch)
        return run_engines(folder, specs)


def smaller_model(model: str, folder: Path) -> dict[str, Any]:
    """How vLLM is asked for drafts of the first layer alone."""
    path = cut_model(Path(model), folder / "smaller", [0])
    return {"method": "draft_model", "model": path, "num_speculative_tokens": 3}


def let_know(texts: list[list[int]], folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Leave the texts where the drafts are made of them."""
    path = folder / "texts.json"
    path.write_text(json.dumps(texts))
    patch.setenv(drafting.TEXTS, str(path))


def begun(texts: list[list[int]]) -> dict[str, Any]:
    """A batch that has the ends of the texts written once more."""
    prompts = [text[:-24] for text in texts]
    return {"prompts": prompts, "sampling": {**SAMPLING, "max_tokens": 24}}


def figures_of(result: dict[str, Any]) -> tuple[int, int, int]:
    """vLLM's own: steps with drafts, drafts, and of these accepted ones."""
    names = ("drafts", "draft_tokens", "accepted_tokens")
    return tuple(result["vllm_metrics"][f"vllm:spec_decode_num_{name}"] for name in names)


def check_ngrams(found: dict[str, Any], stock: dict[str, Any]) -> None:
    """The text is stock vLLM's; some drafts are accepted, and some are not."""
    assert tokens_of(found) == tokens_of(stock)
    steps, drafts, accepted = figures_of(found)
    assert 0 < accepted < drafts <= 3 * steps


def test_ngrams_leave_the_text_as_it_is(runs: Runs, stock: dict[str, Any]) -> None:
    """With everything selected it is stock vLLM's."""
    check_ngrams(runs["ngram, 4"], stock)
    figures = runs["ngram, 4"]["kcache_metrics"]
    assert figures["dropped_mass"][0] == [1e-4, figures["selected_lists"]]


@pytest.mark.full
def test_ngrams_with_exact_keys(long_runs: Runs, stock: dict[str, Any]) -> None:
    check_ngrams(long_runs["ngram, 16"], stock)


@pytest.mark.full
@pytest.mark.parametrize("k_bits", [4, 16])
def test_a_selection_is_the_same_for_a_draft(k_bits: int, long_runs: Runs) -> None:
    """Where much is not selected the text is that of the same engine without drafts."""
    plain, ngram = (long_runs[f"{name}, {k_bits}"] for name in ("selection", "selection, ngram"))
    check_ngrams(ngram, plain)
    for run in (plain, ngram):
        figures = run["kcache_metrics"]
        assert figures["dropped_mass"][0][1] < figures["selected_lists"] / 2


@pytest.mark.full
@pytest.mark.parametrize("k_bits", [4, 16])
def test_suffixes(k_bits: int, model: str, stock: dict[str, Any], tmp_path: Path) -> None:
    """Drafts of as many tokens as each request's text gives, another number in each step."""
    pytest.importorskip("arctic_inference.suffix_decoding", reason="vLLM asks for this package")
    drafts = {"method": "suffix", "num_speculative_tokens": 8}
    found = run_engine(
        tmp_path, work()[:1], {**GATE, "k_bits": k_bits}, model=model, speculative_config=drafts,
        **ENGINE,
    )  # fmt: skip
    assert tokens_of(found) == tokens_of(stock)
    assert 0 < figures_of(found)[2] < figures_of(found)[1]


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


@pytest.mark.full
@pytest.mark.parametrize("k_bits", [4, 16])
def test_drafts_rejected_at_every_position(
    k_bits: int, long_runs: Runs, known: list[list[int]]
) -> None:
    """The text is stock vLLM's, also where a later prompt finds blocks in the prefix cache that had
    drafts in them; and vLLM's figures are what was drafted and accepted."""
    found, texts = long_runs[f"known, {k_bits}"], known
    batches = work()[0], begun(texts)
    for batch, result in zip(batches, tokens_of(found), strict=True):
        assert texts_of(batch, result) == texts
    # Into what was decoded, where that fills a page.
    hits = [row["cached_tokens"] for row in found["batches"][1]]
    prompts = [len(prompt) for prompt in batches[0]["prompts"]]
    assert all(hit > prompt for hit, prompt in zip(hits, prompts, strict=True))
    steps = [
        step
        for batch in batches
        for prompt, text in zip(batch["prompts"], texts, strict=True)
        for step in steps_of(len(prompt), len(text))
    ]
    drafted = [step for step in steps if step.drafts]
    assert figures_of(found) == (
        len(drafted), sum(s.drafts for s in steps), sum(s.accepted for s in steps)
    )  # fmt: skip
    # One list for each token of a step.
    tokens = sum(1 + step.drafts for step in steps)
    assert found["kcache_metrics"]["selected_lists"] == tokens * LAYERS * KV_HEADS
    # Each number was accepted, and the first rejected one stood at each offset in a V block and at
    # both ends of a page. The token of a step that is no draft is the last of its length.
    whole = [step for step in drafted if step.drafts == DRAFTS]
    assert {step.accepted for step in whole} == set(range(DRAFTS + 1))
    rejected = [step.length + step.accepted for step in whole if step.accepted < DRAFTS]
    assert {place % BLOCK for place in rejected} == set(range(BLOCK))
    assert {0, PAGE - 1} <= {place % PAGE for place in rejected}


@pytest.mark.full
@pytest.mark.parametrize("k_bits", [4, 16])
def test_drafts_under_preemption(k_bits: int, long_runs: Runs, long_stock: Runs) -> None:
    found = long_runs[f"crowd, {k_bits}"]
    assert found["vllm_metrics"]["vllm:num_preemptions"] > 0
    assert tokens_of(found) == tokens_of(long_stock["crowd"])
    assert 0 < figures_of(found)[2] < figures_of(found)[1]


@pytest.mark.full
@pytest.mark.parametrize("k_bits", [4, 16])
@pytest.mark.parametrize("name", ["dense", "windows"])
def test_drafts_beside_other_layers(
    name: str, k_bits: int, long_runs: Runs, long_stock: Runs, stock: dict[str, Any]
) -> None:
    """Layers that run vLLM's own attention, over K and V of drafts of their own."""
    found = long_runs[f"{name}, {k_bits}"]
    expected = long_stock["windows"] if name == "windows" else stock
    assert tokens_of(found) == tokens_of(expected)
    assert 0 < figures_of(found)[2] < figures_of(found)[1]


@pytest.mark.full
@pytest.mark.parametrize("k_bits", [4, 16])
def test_a_draft_model(
    k_bits: int, long_runs: Runs, long_stock: Runs, stock: dict[str, Any]
) -> None:
    """Its layers keep K and V in pages of their own, beside the split ones; and as many of its
    drafts are accepted as by stock vLLM."""
    found = {
        name: long_runs[f"{name}, {k_bits}"]
        for name in ("draft", "draft, crowd", "draft, dense", "draft, windows")
    }
    assert tokens_of(found["draft"]) == tokens_of(found["draft, dense"]) == tokens_of(stock)
    assert tokens_of(found["draft, crowd"]) == tokens_of(long_stock["crowd"])
    assert found["draft, crowd"]["vllm_metrics"]["vllm:num_preemptions"] > 0
    assert tokens_of(found["draft, windows"]) == tokens_of(long_stock["windows"])
    assert figures_of(found["draft"]) == figures_of(long_runs["stock, draft"])
    assert figures_of(found["draft"]) == figures_of(found["draft, dense"])
    for run in found.values():
        _, drafts, accepted = figures_of(run)
        assert 0 < accepted < drafts


# Heads over hidden states.

HEADS = ("eagle", "eagle3", "mtp", "mimo")
# A random model of this family says fewer words.
MTP_WORDS = 3
MTP_MODEL = {
    "num_hidden_layers": 4, "num_attention_heads": 24, "head_dim": 64, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 64, "first_k_dense_replace": 1,
    "use_qk_norm": True, "vocab_size": VOCABULARY, "initializer_range": 0.4,
}  # fmt: skip


def heads_of(model: str, folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """The model that is served by method, and how vLLM is asked for drafts."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for method in ("eagle", "eagle3"):
        head = write_eagle_head(Path(model), folder / method, method)
        found[method] = model, {"method": method, "model": head, "num_speculative_tokens": 3}
    glm = write_mtp_model(folder / "mtp", **MTP_MODEL)
    return {**found, "mtp": (glm, {"method": "mtp", "num_speculative_tokens": 3})}


def hits_of(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch that begins with the same prompts."""
    return {**batch, "prompts": [[*prompt, 5, 7, 9] for prompt in batch["prompts"]]}


@pytest.fixture(scope="module")
def head_runs(model: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Stock vLLM without drafts and with those of each head, and the split cache with these."""
    folder = tmp_path_factory.mktemp("heads")
    specs: dict[str, dict[str, Any]] = {}
    batches = [work()[0], hits_of(work()[0])]
    mimo = write_mimo_model(
        folder / "mimo", num_hidden_layers=4, use_sliding_window=False, vocab_size=VOCABULARY,
        max_position_embeddings=1024,
    )  # fmt: skip
    # Its MTP makes one draft (vLLM 0.32).
    heads = {"mimo": (mimo, {"method": "mtp", "num_speculative_tokens": 1})}
    heads |= heads_of(model, folder)
    _, eagle3 = heads["eagle3"]
    for method, (served, drafts) in heads.items():
        engine: dict[str, Any] = {**ENGINE, "model": served}
        specs[f"plain, {method}"] = spec_of(batches, **engine)
        engine["speculative_config"] = drafts
        specs[f"stock, {method}"] = spec_of(batches, **engine)
        for kind, settings in (("4", {"k_bits": 4}), ("16", {}), ("dense", {"dense_layers": 1})):
            specs[f"{method}, {kind}"] = spec_of(batches, {**GATE, **settings}, **engine)
    specs["crowd"] = spec_of(work()[1:], {**GATE, "k_bits": 4}, **engine)
    del engine["speculative_config"]
    specs["plain, crowd"] = spec_of(work()[1:], **engine)
    # A head of the other model's sizes, which are those of this one.
    kinds = ["sliding_attention", "full_attention"] * 2
    engine["model"] = write_window_model(
        folder / "gpt-oss", "gpt_oss", num_hidden_layers=4, layer_types=kinds,
        vocab_size=VOCABULARY,
    )  # fmt: skip
    specs["plain, windows"] = spec_of(batches, **engine)
    engine["speculative_config"] = eagle3
    for k_bits in (4, 16):
        specs[f"windows, {k_bits}"] = spec_of(batches, {**GATE, "k_bits": k_bits}, **engine)
    return run_engines(folder, specs)


@pytest.mark.full
@pytest.mark.parametrize("method", HEADS)
@pytest.mark.parametrize("kind", ["4", "16", "dense"])
def test_heads(method: str, kind: str, head_runs: Runs) -> None:
    """Their layers keep K and V in pages of their own, beside the split ones; each draft is the one
    of stock vLLM, and so are prefix hits."""
    found, plain, stock = (head_runs[f"{x}, {y}"] for x, y in (
        (method, kind), ("plain", method), ("stock", method),
    ))  # fmt: skip
    least = MTP_WORDS if method == "mtp" else VOCABULARY // 3
    assert all(len(set(tokens)) > least for (tokens,) in tokens_of(plain)[0])
    assert tokens_of(found) == tokens_of(plain)
    assert figures_of(found) == figures_of(stock)
    _, drafts, accepted = figures_of(found)
    assert 0 < accepted < drafts
    hits = [[row["cached_tokens"] for row in run["batches"][1]] for run in (found, stock)]
    assert hits[0] == hits[1]
    assert max(hits[0]) > 0


@pytest.mark.full
def test_a_head_under_preemption(head_runs: Runs) -> None:
    found = head_runs["crowd"]
    assert found["vllm_metrics"]["vllm:num_preemptions"] > 0
    assert tokens_of(found) == tokens_of(head_runs["plain, crowd"])
    assert 0 < figures_of(found)[2] < figures_of(found)[1]


@pytest.mark.full
@pytest.mark.parametrize("k_bits", [4, 16])
def test_a_head_beside_window_layers(k_bits: int, head_runs: Runs) -> None:
    """Its layer has pages of the full layers' pool, beside gpt-oss's windows and sinks."""
    found = head_runs[f"windows, {k_bits}"]
    assert tokens_of(found) == tokens_of(head_runs["plain, windows"])
    assert 0 < figures_of(found)[2] < figures_of(found)[1]
    assert max(row["cached_tokens"] for row in found["batches"][1]) > 0


@pytest.mark.full
@pytest.mark.parametrize("method", ["custom_class", "draft_model", "eagle3"])
def test_drafts_on_two_ranks(
    method: str,
    model: str,
    known: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # vLLM asks for a NUMA node for each rank, to bind its threads there.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    let_know(known, tmp_path, monkeypatch)
    drafts = KNOWN
    if method == "draft_model":
        drafts = {**smaller_model(model, tmp_path), "draft_tensor_parallel_size": 2}
    elif method == "eagle3":
        drafts = {**heads_of(model, tmp_path)[method][1], "draft_tensor_parallel_size": 2}
    batch = work()[0]
    found = run_engine(
        tmp_path, [batch], {**GATE, "k_bits": 4}, model=model, speculative_config=drafts,
        tensor_parallel_size=2, **ENGINE,
    )  # fmt: skip
    assert texts_of(batch, tokens_of(found)[0]) == known
    assert 0 < figures_of(found)[2] < figures_of(found)[1]
