# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding beside window layers and chunks, on a GPU: the text is the one without it.

As tests/integration/test_drafts_in_two_pools.py: vLLM's second runner with n-grams, a draft model
and a head over hidden states, the first one with a class of one's own.
"""

from __future__ import annotations

import json
import random
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.comparing import GRAPHS
from tests.gpu.test_window_models import has_expert_kernels
from tests.integration import drafting
from tests.integration.draft_heads import write_eagle_head
from tests.integration.engines import GATE, run_engine, tokens_of
from tests.integration.test_drafts_in_two_pools import batches as smaller_batches
from tests.integration.test_drafts_in_two_pools import check
from tests.integration.test_speculation import (
    KNOWN,
    KV_HEADS,
    LAYERS,
    NGRAM,
    SAMPLING,
    VOCABULARY,
    smaller_model,
    texts_of,
)
from tests.integration.test_window_models import FULL, WINDOW
from tests.integration.tiny_models import write_llama, write_window_model

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

ENGINE: dict[str, Any] = {
    **GRAPHS, "dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 512,
    "max_num_seqs": 16, "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 1 << 30,
}  # fmt: skip
# Blocks of window layers, for nine requests of the crowd, which come to ask for 25 pages each: with
# the blocks go 65 pages of K, or 129 of codes.
FEW = {"num_gpu_blocks_override": 60}
CROWD, NEW = 16, 192
# By the model: drafts and values of k_bits. Llama 4 has chunks, with which vLLM captures no steps;
# gpt-oss learned sinks. Both have experts.
CASES = {
    "gemma3_text": [("ngram", 16), ("ngram", 4), ("ngram_gpu", 4), ("known", 16), ("known", 4),
                    ("draft", 16), ("draft", 4)],
    "llama4_text": [("ngram", 4)],
    "gpt_oss": [("eagle3", 4)],
}  # fmt: skip
EXPERTS = ("llama4_text", "gpt_oss")
MODELS = [name for name in CASES if name not in EXPERTS or has_expert_kernels()]
# Engines; each takes a core and most of a minute.
AT_ONCE = 6

Results = dict[Any, Future[dict[str, Any]]]

# Drafts that are made while the step before is still on its way.
AHEAD = ("ngram_gpu", "draft", "eagle3")


def batches() -> list[dict[str, Any]]:
    """Prompts, the same once more with another end, and a crowd."""
    generator = random.Random(1)
    crowd = [generator.choices(range(3, VOCABULARY - 1), k=200) for _ in range(CROWD)]
    return [
        *smaller_batches()[:2],
        {"prompts": crowd, "sampling": {**SAMPLING, "max_tokens": NEW}},
    ]


def drafts_of(folder: Path) -> dict[str, dict[str, Any]]:
    """How vLLM is asked for drafts, by name."""
    llama = write_llama(
        folder / "llama", num_key_value_heads=KV_HEADS, num_hidden_layers=LAYERS,
        vocab_size=VOCABULARY, max_position_embeddings=1024,
    )  # fmt: skip
    head = write_eagle_head(Path(llama), folder / "head", "eagle3")
    eagle3 = {"method": "eagle3", "model": head, "num_speculative_tokens": 3}
    return {
        "ngram": NGRAM, "ngram_gpu": {**NGRAM, "method": "ngram_gpu"}, "known": KNOWN,
        "draft": smaller_model(llama, folder), "eagle3": eagle3,
    }  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """By model and drafts, and "stock"; all have ended."""
    folder = tmp_path_factory.mktemp("drafts")
    drafts, texts = drafts_of(folder), folder / "texts.json"
    running: Results = {}

    def start(pool: ThreadPoolExecutor, case: tuple[Any, ...], **changes: Any) -> None:
        name, *drafted = case
        own = folder / "-".join(map(str, case))
        own.mkdir()
        engine = {**ENGINE, "model": str(folder / name), **changes}
        settings = None
        if drafted != ["stock"]:
            settings = {**GATE, "k_bits": drafted[1]}
            engine |= {**FEW, "speculative_config": drafts[drafted[0]]}
        running[case] = pool.submit(run_engine, own, batches(), settings, **engine)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(AT_ONCE) as pool:
        patch.setenv(drafting.TEXTS, str(texts))
        for name in MODELS:
            write_window_model(
                folder / name, name, num_hidden_layers=4, layer_types=[WINDOW, FULL] * 2,
                vocab_size=VOCABULARY,
            )  # fmt: skip
            start(pool, (name, "stock"))
        cases = [(name, *each) for name in MODELS for each in CASES[name]]
        for case in cases:
            if case[1] != "known":
                start(pool, case)
        pairs = zip(batches(), tokens_of(running["gemma3_text", "stock"].result()), strict=True)
        texts.write_text(json.dumps([text for pair in pairs for text in texts_of(*pair)]))
        for case in cases:
            if case[1] == "known":
                start(pool, case)
    return running


@pytest.mark.parametrize(
    ("model", "name", "k_bits"),
    [
        pytest.param(
            model, *each,
            marks=pytest.mark.skipif(
                model not in MODELS, reason="vLLM without kernels of experts"
            ),
        )
        for model, some in CASES.items()
        for each in some
    ],
)  # fmt: skip
def test_the_text_is_the_one_without_drafts(
    model: str, name: str, k_bits: int, results: Results
) -> None:
    """Stock vLLM's, with some drafts accepted and some not, behind prompts of several chunks, from
    prefix hits, and in a crowd that has to wait."""
    found = results[model, name, k_bits].result()
    check(found, results[model, "stock"].result())
    assert found["async_scheduling"] == (name in AHEAD)
