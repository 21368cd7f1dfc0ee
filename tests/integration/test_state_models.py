# SPDX-License-Identifier: Apache-2.0
"""The gate for models of which some layers keep a state and no K and V: the others are split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import assert_close
from tests.integration.engines import GATE, in_forks, run_engines, spec_of, tokens_of
from tests.integration.families import FAMILIES
from tests.integration.test_window_models import ENGINE, work
from tests.integration.tiny_models import write_random_model

pytestmark = [pytest.mark.full, pytest.mark.slow, pytest.mark.timeout(900)]

FAMILY, FULL_LAYERS = FAMILIES["Granite 4-H"], 2
# Few blocks of states, and so few pages go with them that some of a crowd must wait.
STATES, PAGE_TOKENS = 15, 32
# Tokens of a piece of the text by which K is measured.
PIECE = 128


def test_text_equals_stock(tmp_path: Path) -> None:
    """Through chunked prefill, shared prefixes, n > 1 and preemption."""
    model = write_random_model(tmp_path / "model", FAMILY.model_type, **FAMILY.changes)
    engine: dict[str, Any] = {**ENGINE, **FAMILY.engine, "model": model}
    runs = run_engines(
        tmp_path,
        {
            "stock": spec_of(work(), **engine, **FAMILY.stock),
            "split": spec_of(
                work(), {**GATE, "k_bits": 16}, **engine, num_gpu_blocks_override=STATES
            ),
            "codes": spec_of(work(), {**GATE, "k_bits": 4}, **engine),
        },
    )
    stock, split = runs["stock"], runs["split"]
    assert tokens_of(split) == tokens_of(runs["codes"]) == tokens_of(stock)
    texts = [tokens for batch in tokens_of(stock) for row in batch for tokens in row]
    assert len(set(map(tuple, texts))) == len(texts)
    assert split["vllm_metrics"]["vllm:num_preemptions"] > 0
    assert split["num_blocks"] == STATES
    for cached in (split, runs["codes"]):
        # A prefix ends where a page does, one token before the prompt's end at the latest.
        assert [row["cached_tokens"] for row in cached["batches"][1]] == [0, 32, 384, 64]
    figures = split["kcache_metrics"]
    assert figures["decode_layer_steps"] % FULL_LAYERS == 0
    assert figures["dropped_mass"][0] == [1e-4, figures["selected_lists"]]
    # Pages are as small as the model's, whatever the size of a state.
    row_bytes = PAGE_TOKENS * 64 * 4
    assert figures["host_pool_bytes"] == figures["host_pool_blocks"] * FULL_LAYERS * 2 * row_bytes


def measured(spec: dict[str, Any]) -> list[list[Any]]:
    """Mean and deviation of K in each split layer, as an engine with codes starts with."""
    from vllm import LLM

    def stats(worker: Any) -> list[list[Any]]:
        of_layers = worker.split_cache.k_stats
        return [[each.mean.tolist(), each.deviation.tolist()] for each in of_layers]

    return LLM(**spec["engine"]).collective_rpc(stats)[0]


def seen(spec: dict[str, Any]) -> list[list[Any]]:
    """The same of the K that comes to the split layers when an engine with exact K is given the
    pieces of that text as prompts."""
    from vllm import LLM, SamplingParams

    from vllm_kcache.integration.backend import KCacheImpl
    from vllm_kcache.integration.calibration import _tokens

    llm, keys, forward = LLM(**spec["engine"]), {}, KCacheImpl.forward

    def recording(self: Any, layer: Any, query: Any, key: Any, *given: Any, **named: Any) -> Any:
        keys.setdefault(self._index, []).append(key.double().view(-1, self.num_kv_heads, 64))
        return forward(self, layer, query, key, *given, **named)

    KCacheImpl.forward = recording
    pieces = _tokens(llm.llm_engine.model_config).split(PIECE)
    prompts = [{"prompt_token_ids": piece.tolist()} for piece in pieces]
    llm.generate(prompts, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    together = [torch.cat(keys[index]) for index in range(FULL_LAYERS)]
    assert all(each.shape[0] == len(pieces) * PIECE for each in together)
    return [[k.mean(0).tolist(), k.std(0, correction=0).tolist()] for k in together]


@pytest.mark.parametrize("name", ["Granite 4-H", "Qwen3-Next"])
def test_k_is_measured_behind_states(name: str, tmp_path: Path) -> None:
    """The pass at start, which has no cache yet, sees the K of a prompt."""
    family = FAMILIES[name]
    model = write_random_model(tmp_path / "model", family.model_type, **family.changes)
    engine = {**ENGINE, **family.engine, "model": model, "max_num_batched_tokens": PIECE}
    calls = {
        "measured": ["tests.integration.test_state_models:measured",
                     spec_of([], {**GATE, "k_bits": 4}, **engine)],
        "seen": ["tests.integration.test_state_models:seen",
                 spec_of([], {**GATE, "k_bits": 16}, **engine)],
    }  # fmt: skip
    outcomes = in_forks(tmp_path, calls)
    for each in outcomes.values():
        assert each["code"] == 0, each["stderr"][-3000:]
    found, expected = (torch.tensor(outcomes[name]["result"]) for name in ("measured", "seen"))
    assert_close(found, expected, torch.bfloat16 if "dtype" in family.engine else torch.float32)
