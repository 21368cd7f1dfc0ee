# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding beside layers with windows, chunks or states: they have their own pool.

The text is stock vLLM's without drafts: through prompts of several chunks, prefix hits, and in a
crowd that has to wait for both pools. Beside states drafts run with kernels that forget those which
are rejected (state_kernels.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.engines import GATE, Runs, in_forks, run_engines, spec_of, tokens_of
from tests.integration.families import FAMILIES, UNCACHED
from tests.integration.test_speculation import (
    ENGINE,
    KNOWN,
    NGRAM,
    VOCABULARY,
    figures_of,
    hits_of,
    let_know,
    texts_of,
    work,
)
from tests.integration.test_window_models import FULL, WINDOW
from tests.integration.tiny_models import write_llama, write_random_model, write_window_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Blocks of window layers, and states, so few that some of a crowd must wait.
WINDOW_BLOCKS, STATES = 24, 30
CODES: dict[str, Any] = {**GATE, "k_bits": 4}


def batches() -> list[dict[str, Any]]:
    """Prompts, the same once more with another end, and a crowd."""
    first, crowd = work()
    return [first, hits_of(first), crowd]


def window_specs(folder: Path, model_type: str, settings: list[dict[str, Any]]) -> dict[str, Any]:
    """Stock vLLM without drafts, and the split cache with n-grams, by k_bits."""
    model = write_window_model(
        folder / model_type, model_type, num_hidden_layers=4, layer_types=[WINDOW, FULL] * 2,
        vocab_size=VOCABULARY,
    )  # fmt: skip
    engine = {**ENGINE, "model": model}
    specs = {"plain": spec_of(batches(), **engine)}
    engine |= {"num_gpu_blocks_override": WINDOW_BLOCKS, "speculative_config": NGRAM}
    return specs | {str(each["k_bits"]): spec_of(batches(), each, **engine) for each in settings}


class StateEngines:
    """Engines of a model of which some layers keep a state."""

    def __init__(self, folder: Path) -> None:
        self.folder, family = folder, FAMILIES["Granite 4-H"]
        self._model = write_random_model(
            folder / "model", family.model_type, **{**family.changes, "vocab_size": VOCABULARY}
        )

    def spec(self, settings: dict[str, Any], **engine: Any) -> dict[str, Any]:
        """With few states."""
        few = {"num_gpu_blocks_override": STATES}
        return spec_of(batches(), settings, **{**ENGINE, "model": self._model, **few, **engine})

    def stock_spec(self) -> dict[str, Any]:
        """Stock vLLM without drafts."""
        return spec_of(batches(), **{**ENGINE, "model": self._model, **UNCACHED})

    def run_stock(self) -> dict[str, Any]:
        """What stock vLLM says."""
        return run_engines(self.folder, {"stock": self.stock_spec()})["stock"]

    def run(self, name: str, specs: dict[str, dict[str, Any]]) -> Runs:
        folder = self.folder / name
        folder.mkdir()
        calls = {each: ["tests.integration.state_kernels:run", s] for each, s in specs.items()}
        return Runs(in_forks(folder, calls))


@pytest.fixture(scope="module")
def state_engines(tmp_path_factory: pytest.TempPathFactory) -> StateEngines:
    return StateEngines(tmp_path_factory.mktemp("states"))


@pytest.fixture(scope="module")
def plain_states(state_engines: StateEngines) -> dict[str, Any]:
    return state_engines.run_stock()


def check(
    found: dict[str, Any], plain: dict[str, Any], hits: bool = True, waits: bool = True
) -> None:
    """Equal texts, of which each says many words; drafts of both kinds, hits, and requests that
    had to wait."""
    texts = [tokens for batch in tokens_of(plain) for row in batch for tokens in row]
    # Equal text says little where all text is equal.
    assert sorted(len(set(tokens)) for tokens in texts)[len(texts) // 2] > VOCABULARY // 3
    assert tokens_of(found) == tokens_of(plain)
    _, drafts, accepted = figures_of(found)
    assert 0 < accepted < drafts
    assert (found["vllm_metrics"]["vllm:num_preemptions"] > 0) == waits
    # The second prompts begin with the first.
    assert (max(row["cached_tokens"] for row in found["batches"][1]) > 200) == hits
    figures = found["kcache_metrics"]
    assert figures["dropped_mass"][0] == [1e-4, figures["selected_lists"]]


def test_drafts_beside_window_layers(tmp_path: Path) -> None:
    runs = run_engines(tmp_path, window_specs(tmp_path, "gemma3_text", [CODES]))
    check(runs["4"], runs["plain"])


@pytest.mark.full
@pytest.mark.parametrize(
    ("model_type", "kinds"), [("gemma3_text", [16]), ("llama4_text", [4, 16])], ids=str
)
def test_drafts_beside_other_windows(model_type: str, kinds: list[int], tmp_path: Path) -> None:
    """With K itself, and beside chunks."""
    settings = [{**GATE, "k_bits": k_bits} for k_bits in kinds]
    runs = run_engines(tmp_path, window_specs(tmp_path, model_type, settings))
    for k_bits in kinds:
        check(runs[str(k_bits)], runs["plain"])


def test_drafts_beside_states(plain_states: dict[str, Any], state_engines: StateEngines) -> None:
    """A request has a block for the state after each draft, and keeps those of whole pages."""
    runs = state_engines.run("quick", {"4": state_engines.spec(CODES, speculative_config=NGRAM)})
    check(runs["4"], plain_states)


@pytest.mark.full
def test_other_drafts_beside_states(
    plain_states: dict[str, Any], state_engines: StateEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With K itself, without prefix caching, rejected everywhere, and by a model whose K and V lie
    beside the pages."""
    texts = []
    for batch, result in zip(batches(), tokens_of(plain_states), strict=True):
        texts += texts_of(batch, result)
    let_know(texts, state_engines.folder, monkeypatch)
    drafts = {
        "method": "draft_model", "num_speculative_tokens": 3,
        "model": write_llama(
            state_engines.folder / "drafts", vocab_size=VOCABULARY, max_position_embeddings=1024
        ),
    }  # fmt: skip
    exact = {**GATE, "k_bits": 16}
    specs = {
        "exact": state_engines.spec(exact, speculative_config=NGRAM),
        "uncached": state_engines.spec(
            exact, speculative_config=NGRAM, num_gpu_blocks_override=16, **UNCACHED
        ),
        "known": state_engines.spec(CODES, speculative_config=KNOWN),
        "draft": state_engines.spec(CODES, speculative_config=drafts),
        "draft, exact": state_engines.spec(exact, speculative_config=drafts),
    }
    runs = state_engines.run("others", specs)
    for name in specs:
        # With half of the drafts right requests are gone before blocks run out.
        check(runs[name], plain_states, hits=name != "uncached", waits=name != "known")
