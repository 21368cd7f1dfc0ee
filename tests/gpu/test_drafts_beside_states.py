# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding beside layers with a state, on a GPU: the text is the one without it.

vLLM keeps a state after each draft until it is known how many are accepted, and with prefix caching
moves one from page to page. A small Granite 4-H runs in float32; a small Qwen3.5 with its own MTP,
whose kernels take bfloat16 only, up to ties. All by vLLM's second runner.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.comparing import assert_same_text_or_tie, distance
from tests.gpu.test_drafts_beside_windows import AHEAD, AT_ONCE, ENGINE, Results, batches, drafts_of
from tests.gpu.test_window_models import STATE_LAYERS, STATES
from tests.integration.draft_heads import write_qwen_mtp_model
from tests.integration.engines import GATE, run_engine
from tests.integration.families import FAMILIES, FULL, UNCACHED
from tests.integration.test_drafts_in_two_pools import check
from tests.integration.test_speculation import VOCABULARY, figures_of
from tests.integration.tiny_models import write_random_model

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

# States, for 15 requests of the crowd with three drafts, which come to ask for 25 pages each: with
# the states go at most 210 pages of K, and 330 of codes.
FEW = {"num_gpu_blocks_override": 64}
# Drafts, k_bits, and whether prefixes are cached.
CASES = [
    ("ngram", 16, True), ("ngram", 4, True), ("ngram", 16, False), ("ngram_gpu", 4, True),
    ("draft", 16, True), ("draft", 4, True), ("draft", 16, False),
]  # fmt: skip
MTP = {"method": "mtp", "num_speculative_tokens": 3}


def write_models(folder: Path) -> tuple[str, str]:
    """Granite 4-H, and Qwen3.5 with a layer that drafts."""
    family = FAMILIES["Granite 4-H"]
    granite = write_random_model(
        folder / "granite", family.model_type, **{**family.changes, "vocab_size": VOCABULARY}
    )
    layers = {**STATE_LAYERS, "layer_types": [*STATE_LAYERS["layer_types"], FULL]}
    qwen = write_qwen_mtp_model(
        folder / "qwen", STATES, **layers, num_hidden_layers=5, vocab_size=VOCABULARY
    )
    return granite, qwen


def with_logprobs() -> list[dict[str, Any]]:
    """What Qwen3.5 is asked, where ties are looked at."""
    return [{**batch, "sampling": {**batch["sampling"], "logprobs": 5}} for batch in batches()]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Granite's by case, Qwen3.5's by k_bits, and stock vLLM's; all have ended."""
    folder = tmp_path_factory.mktemp("states")
    (granite, qwen), drafts = write_models(folder), drafts_of(folder)
    running: Results = {}

    def start(
        pool: ThreadPoolExecutor, name: Any, settings: dict[str, Any] | None, **engine: Any
    ) -> None:
        own = folder / str(len(running))
        own.mkdir()
        work = batches() if engine["model"] == granite else with_logprobs()
        running[name] = pool.submit(run_engine, own, work, settings, **{**ENGINE, **engine})

    with ThreadPoolExecutor(AT_ONCE) as pool:
        start(pool, "stock", None, model=granite)
        gdn = {"model": qwen, "dtype": "bfloat16", "gdn_prefill_backend": "triton"}
        start(pool, "stock qwen", None, **gdn)
        start(pool, "stock mtp", None, **gdn, speculative_config=MTP)
        for k_bits in (16, 4):
            start(pool, k_bits, {**GATE, "k_bits": k_bits}, **gdn, **FEW, speculative_config=MTP)
        for case in CASES:
            name, k_bits, is_cached = case
            engine = {**FEW, **({} if is_cached else UNCACHED)}
            start(
                pool, case, {**GATE, "k_bits": k_bits}, model=granite,
                speculative_config=drafts[name], **engine,
            )  # fmt: skip
    return running


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_text_is_the_one_without_drafts(case: tuple[str, int, bool], results: Results) -> None:
    """Behind prompts of several chunks, from prefix hits, and in a crowd that has to wait."""
    found = results[case].result()
    check(found, results["stock"].result(), hits=case[2])
    assert found["async_scheduling"] == (case[0] in AHEAD)


@pytest.mark.parametrize("k_bits", [16, 4])
def test_mtp_of_a_model_with_states(k_bits: int, results: Results) -> None:
    """Qwen3.5's layer that drafts has K and V beside the pages; drafts are made while the step
    before is on its way."""
    found, stock = results[k_bits].result(), results["stock qwen"].result()
    print("stock with these drafts:", distance(results["stock mtp"].result(), stock))
    assert_same_text_or_tie(found, stock)
    assert found["async_scheduling"]
    _, drafts, accepted = figures_of(found)
    assert 0 < accepted < drafts
    assert found["vllm_metrics"]["vllm:num_preemptions"] > 0
    assert max(row["cached_tokens"] for row in found["batches"][1]) > 200
