# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding beside window layers, and states, on a GPU: refused until this has passed.

The engines run without those two refusals. As tests/integration/test_speculation.py, where a CPU
serves the same.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.comparing import GRAPHS
from tests.integration import drafting
from tests.integration.engines import GATE, Runs, in_forks, spec_of, tokens_of
from tests.integration.families import FAMILIES
from tests.integration.generate import run
from tests.integration.test_speculation import (
    KNOWN,
    KV_HEADS,
    LAYERS,
    NGRAM,
    VOCABULARY,
    figures_of,
    smaller_model,
    texts_of,
    work,
)
from tests.integration.test_window_models import FULL, WINDOW
from tests.integration.tiny_models import write_llama, write_random_model, write_window_model
from vllm_kcache.integration import refusals

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

REFUSED = ("drafts_beside_windows", "states_with_drafts")
ENGINE: dict[str, Any] = {
    **GRAPHS, "dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 512,
    "max_num_seqs": 16, "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 1 << 30,
}  # fmt: skip


def run_all_the_same(spec: dict[str, Any]) -> dict[str, Any]:
    """What an engine makes of a specification that is refused."""
    kept = tuple(each for each in refusals.REFUSALS if each.name not in REFUSED)
    assert len(kept) == len(refusals.REFUSALS) - len(REFUSED)
    refusals.REFUSALS = kept
    return run(spec)


def run_one(folder: Path, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """The result of an engine, in a process of its own."""
    own = folder / name.replace(" ", "-")
    own.mkdir()
    return Runs(in_forks(own, {name: ["tests.gpu.test_refused_drafts:run_all_the_same", spec]}))[
        name
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of stock vLLM without drafts, and of both kinds of K with each kind of draft."""
    folder, batches = tmp_path_factory.mktemp("drafts"), work()
    model = write_window_model(
        folder / "gemma", "gemma3_text", num_hidden_layers=4, layer_types=[WINDOW, FULL] * 2,
        vocab_size=VOCABULARY,
    )  # fmt: skip
    llama = write_llama(
        folder / "llama", num_key_value_heads=KV_HEADS, num_hidden_layers=LAYERS,
        vocab_size=VOCABULARY, max_position_embeddings=1024,
    )  # fmt: skip
    family = FAMILIES["Granite 4-H"]
    states = write_random_model(
        folder / "granite", family.model_type, **{**family.changes, "vocab_size": VOCABULARY}
    )
    engine, with_states = {**ENGINE, "model": model}, {**ENGINE, **family.engine, "model": states}
    found = {"stock": run_one(folder, "stock", spec_of(batches, **engine))}
    texts = folder / "texts.json"
    pairs = zip(batches, tokens_of(found["stock"]), strict=True)
    texts.write_text(json.dumps([text for pair in pairs for text in texts_of(*pair)]))
    drafts = {"ngram": NGRAM, "known": KNOWN, "draft": smaller_model(llama, folder)}
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(6) as pool:
        patch.setenv(drafting.TEXTS, str(texts))
        specs = (
            {
                f"{name} {k_bits}": spec_of(
                    batches, {**GATE, "k_bits": k_bits}, speculative_config=config, **engine
                )
                for name, config in drafts.items()
                for k_bits in (16, 4)
            }
            | {
                f"states {k_bits}": spec_of(
                    batches, {**GATE, "k_bits": k_bits}, speculative_config=NGRAM, **with_states
                )
                for k_bits in (16, 4)
            }
            | {"stock states": spec_of(batches, **with_states)}
        )
        running = {name: pool.submit(run_one, folder, name, spec) for name, spec in specs.items()}
        return found | {name: each.result() for name, each in running.items()}


@pytest.mark.parametrize("k_bits", [16, 4])
@pytest.mark.parametrize("name", ["ngram", "known", "draft"])
def test_the_text_is_the_one_without_drafts(
    name: str, k_bits: int, results: dict[str, dict[str, Any]]
) -> None:
    """Stock vLLM's, with some drafts accepted and some not, behind prompts of several chunks and
    in a crowd."""
    stock, split = results["stock"], results[f"{name} {k_bits}"]
    # Equal text says little where a text repeats itself, as one of these does.
    distinct = sorted(len(set(tokens)) for batch in tokens_of(stock) for (tokens,) in batch)
    assert distinct[len(distinct) // 2] > VOCABULARY // 3
    assert tokens_of(split) == tokens_of(stock)
    steps, drafts, accepted = figures_of(split)
    assert steps > 0
    assert 0 < accepted < drafts
    figures = split["kcache_metrics"]
    assert figures["dropped_mass"][0] == [1e-4, figures["selected_lists"]]


@pytest.mark.parametrize("k_bits", [16, 4])
def test_drafts_beside_states(k_bits: int, results: dict[str, dict[str, Any]]) -> None:
    """A state after each draft is kept until it is known how many are accepted."""
    found = results[f"states {k_bits}"]
    assert tokens_of(found) == tokens_of(results["stock states"])
    _, drafts, accepted = figures_of(found)
    assert 0 < accepted < drafts
