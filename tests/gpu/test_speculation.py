# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding on a GPU: the text is the one without it, whatever is drafted.

As tests/integration/test_speculation.py, with vLLM's runners of a GPU: the second one with n-grams,
a draft model and heads over hidden states, the first one with a class of one's own. All engines run
at the same time.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.comparing import GRAPHS
from tests.integration import drafting
from tests.integration.engines import GATE, run_engine, tokens_of
from tests.integration.test_speculation import (
    BLOCK,
    DRAFTS,
    KNOWN,
    KV_HEADS,
    LAYERS,
    MTP_WORDS,
    NGRAM,
    SELECTION,
    VOCABULARY,
    begun,
    figures_of,
    heads_of,
    smaller_model,
    steps_of,
    texts_of,
    work,
)
from tests.integration.tiny_models import write_llama

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

PAGE = 16
ENGINE = {
    **GRAPHS,
    "dtype": "float32",
    "block_size": PAGE,
    "skip_tokenizer_init": True,
    "max_model_len": 512,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    # Too few for the crowd.
    "num_gpu_blocks_override": 100,
}
EAGER = {"enforce_eager": True}
HOT = {"hot_cache_gib": 0.25}
# Tokens of a request have one list.
HALF = {
    **HOT, "k_bits": 4, "host_dtype": "int8", "mass_threshold": 0.02, "sink_tokens": 8,
    "recent_tokens": 16,
}  # fmt: skip

Result = dict[str, Any]


class Engines:
    """Engines by name; what comes of each is waited for where it is asked for."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor, model: str) -> None:
        self._folder, self._pool, self._model = folder, pool, model
        self._running: dict[str, Future[Result]] = {}

    def start(
        self,
        name: str,
        batches: Callable[[], list[dict[str, Any]]],
        kcache: dict[str, Any] | None = None,
        **engine: Any,
    ) -> None:
        """Run what the call returns, as soon as it does."""
        folder = self._folder / name.replace(" ", "-")
        folder.mkdir()

        def run() -> Result:
            return run_engine(
                folder, batches(), kcache, **{**ENGINE, "model": self._model, **engine}
            )

        self._running[name] = self._pool.submit(run)

    def __getitem__(self, name: str) -> Result:
        return self._running[name].result()


def start_heads(
    found: Engines, model: str, folder: Path, settings: dict[int, dict[str, Any]]
) -> None:
    """Engines with drafts of heads, and stock's."""
    heads = heads_of(model, folder)
    found.start("stock plain mtp", work, model=heads["mtp"][0])
    for method, (served, drafts) in heads.items():
        found.start(f"stock {method}", work, model=served, speculative_config=drafts)
    for method, k_bits, eager in (
        ("eagle", 4, False), ("eagle3", 16, False), ("eagle3", 4, False), ("mtp", 4, False),
        ("mtp", 16, True),
    ):  # fmt: skip
        served, drafts = heads[method]
        found.start(
            f"{method} {k_bits}", work, settings[k_bits], model=served,
            speculative_config=drafts, enforce_eager=eager,
        )  # fmt: skip


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("speculation")
    model = write_llama(
        folder / "llama", num_key_value_heads=KV_HEADS, num_hidden_layers=LAYERS,
        vocab_size=VOCABULARY, max_position_embeddings=1024,
    )  # fmt: skip
    smaller = smaller_model(model, folder)
    texts = folder / "texts.json"
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(16) as pool:
        patch.setenv(drafting.TEXTS, str(texts))
        found = Engines(folder, pool, model)
        found.start("stock", work)
        found.start("stock draft", work, speculative_config=smaller)
        settings = {k_bits: {**GATE, **HOT, "k_bits": k_bits} for k_bits in (16, 4)}
        on_gpu = {**NGRAM, "method": "ngram_gpu"}
        for name, k_bits, drafts, engine in (
            ("ngram 16", 16, NGRAM, {}),
            ("ngram 4", 4, NGRAM, {}),
            ("ngram eager", 16, NGRAM, EAGER),
            ("ngram_gpu", 4, on_gpu, {}),
            ("draft 16", 16, smaller, {}),
            ("draft 4", 4, smaller, EAGER),
        ):
            found.start(name, work, settings[k_bits], speculative_config=drafts, **engine)
        start_heads(found, model, folder, settings)
        few = {**SELECTION, **HOT, "k_bits": 4}
        found.start("selection", lambda: work()[:1], few)
        found.start("selection ngram", lambda: work()[:1], few, speculative_config=NGRAM)

        found.start("half", lambda: work()[:1], HALF, dtype="float16")
        found.start(
            "half ngram", lambda: work()[:1], HALF, dtype="float16", speculative_config=NGRAM
        )

        def known() -> list[dict[str, Any]]:
            """The first batch, and one that goes on with the ends of its texts."""
            batches = work()
            pairs = zip(batches, tokens_of(found["stock"]), strict=True)
            of_batches = [texts_of(batch, result) for batch, result in pairs]
            texts.write_text(json.dumps(list(itertools.chain(*of_batches))))
            return [batches[0], begun(of_batches[0]), batches[1]]

        for k_bits, engine in ((16, EAGER), (4, {})):
            found.start(
                f"known {k_bits}", known, settings[k_bits], speculative_config=KNOWN, **engine
            )
        yield found


def check_text(found: Result, stock: Result, words: int = VOCABULARY // 3) -> None:
    """Stock vLLM's, with everything selected; some drafts are accepted, and some are not."""
    # Equal text says little where all text is equal.
    assert all(len(set(tokens)) > words for (tokens,) in tokens_of(stock)[0])
    assert tokens_of(found) == tokens_of(stock)
    steps, drafts, accepted = figures_of(found)
    assert 0 < accepted < drafts
    assert steps > 0
    figures = found["kcache_metrics"]
    assert figures["dropped_mass"][0] == [1e-4, figures["selected_lists"]]
    assert found["vllm_metrics"]["vllm:num_preemptions"] > 0


@pytest.mark.parametrize(
    "name", ["ngram 16", "ngram 4", "ngram eager", "ngram_gpu", "draft 16", "draft 4"]
)
def test_the_text_is_the_one_without_drafts(name: str, engines: Engines) -> None:
    """Through captured graphs and without, under preemption, with prompts of several chunks."""
    check_text(engines[name], engines["stock"])
    # Drafts are made while the step before is still on its way.
    is_ahead = name == "ngram_gpu" or name.startswith("draft")
    assert engines[name]["async_scheduling"] == is_ahead


def test_verification_steps_are_replayed(engines: Engines) -> None:
    """Of the same steps most run in a graph; the others have prompts in them, or fewer drafts."""
    graphs, eager = (
        engines[name]["kcache_metrics"]["eager_decode_steps"]
        for name in ("ngram 16", "ngram eager")
    )
    print("steps outside a graph:", graphs, "and without graphs:", eager)
    assert graphs < eager / 2


@pytest.mark.parametrize("name", ["eagle 4", "eagle3 16", "eagle3 4", "mtp 4", "mtp 16"])
def test_heads_leave_the_text_as_it_is(name: str, engines: Engines) -> None:
    """Their layers, and what they are given of the model's, are vLLM's own."""
    if name.startswith("mtp"):
        check_text(engines[name], engines["stock plain mtp"], MTP_WORDS)
    else:
        check_text(engines[name], engines["stock"])


@pytest.mark.parametrize(
    "name", ["draft 16", "draft 4", "eagle 4", "eagle3 16", "eagle3 4", "mtp 4", "mtp 16"]
)
def test_drafts_are_as_right_as_with_stock(name: str, engines: Engines) -> None:
    shares = []
    for each in (name, f"stock {name.split()[0]}"):
        _, drafts, accepted = figures_of(engines[each])
        shares.append(accepted / drafts)
    assert abs(shares[0] - shares[1]) <= 0.01, shares


def test_a_selection_is_the_same_for_a_draft(engines: Engines) -> None:
    """Where much is not selected the text is that of the same engine without drafts."""
    plain, ngram = engines["selection"], engines["selection ngram"]
    assert tokens_of(ngram) == tokens_of(plain)
    assert 0 < figures_of(ngram)[2] < figures_of(ngram)[1]
    for run in (plain, ngram):
        figures = run["kcache_metrics"]
        assert figures["dropped_mass"][0][1] < figures["selected_lists"] / 2


def test_a_selection_is_the_same_where_tokens_have_one_list(engines: Engines) -> None:
    """In float16 another order of sums decides ties, after which texts are two texts; wrong lists
    would part them at once."""
    plain, ngram = engines["half"], engines["half ngram"]
    agreed = total = 0
    for (one,), (other,) in zip(tokens_of(plain)[0], tokens_of(ngram)[0], strict=True):
        total += len(one)
        parts = (at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
        agreed += next(parts, len(one))
    print("tokens before a text parts:", agreed, "of", total)
    assert agreed > total / 2
    assert 0 < figures_of(ngram)[2] < figures_of(ngram)[1]
    for run in (plain, ngram):
        figures = run["kcache_metrics"]
        assert figures["dropped_mass"][0][1] < figures["selected_lists"] / 2


@pytest.mark.parametrize("k_bits", [16, 4])
def test_drafts_rejected_at_every_position(k_bits: int, engines: Engines) -> None:
    """In V blocks and at the ends of pages; also where a later prompt finds blocks in the prefix
    cache that had drafts in them. vLLM's figures are what was drafted and accepted."""
    found, stock = engines[f"known {k_bits}"], engines["stock"]
    first, again, crowd = tokens_of(found)
    assert [first, crowd] == tokens_of(stock)
    prompts = work()[0]["prompts"]
    texts = texts_of(work()[0], first)
    assert texts_of(begun(texts), again) == texts
    hits = [row["cached_tokens"] for row in found["batches"][1]]
    assert all(hit > len(prompt) for hit, prompt in zip(hits, prompts, strict=True))
    _, drafts, accepted = figures_of(found)
    assert 0 < accepted < drafts
    starts = [*map(len, prompts), *map(len, begun(texts)["prompts"])]
    steps = [
        step
        for start, text in zip(starts, [*texts, *texts], strict=True)
        for step in steps_of(start, len(text))
        if step.drafts == DRAFTS
    ]
    assert {step.accepted for step in steps} == set(range(DRAFTS + 1))
    rejected = [step.length + step.accepted for step in steps if step.accepted < DRAFTS]
    assert {place % BLOCK for place in rejected} == set(range(BLOCK))
    assert {0, PAGE - 1} <= {place % PAGE for place in rejected}
