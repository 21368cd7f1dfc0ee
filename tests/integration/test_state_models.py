# SPDX-License-Identifier: Apache-2.0
"""The gate for models of which some layers keep a state and no K and V: the others are split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.engines import GATE, run_engines, spec_of, tokens_of
from tests.integration.families import FAMILIES
from tests.integration.test_window_models import ENGINE, work
from tests.integration.tiny_models import write_random_model

pytestmark = [pytest.mark.full, pytest.mark.slow, pytest.mark.timeout(900)]

FAMILY, FULL_LAYERS = FAMILIES["Granite 4-H"], 2
# Few blocks of states, and so few pages go with them that some of a crowd must wait.
STATES, PAGE_TOKENS = 5, 32


def test_text_equals_stock(tmp_path: Path) -> None:
    """Through chunked prefill, n > 1 and preemption."""
    model = write_random_model(tmp_path / "model", FAMILY.model_type, **FAMILY.changes)
    engine: dict[str, Any] = {**ENGINE, **FAMILY.engine, "model": model}
    runs = run_engines(
        tmp_path,
        {
            "stock": spec_of(work(), **engine),
            "split": spec_of(
                work(), {**GATE, "k_bits": 16}, **engine, num_gpu_blocks_override=STATES
            ),
        },
    )
    stock, split = runs["stock"], runs["split"]
    assert tokens_of(split) == tokens_of(stock)
    texts = [tokens for batch in tokens_of(stock) for row in batch for tokens in row]
    assert len(set(map(tuple, texts))) == len(texts)
    assert split["vllm_metrics"]["vllm:num_preemptions"] > 0
    assert split["num_blocks"] == STATES
    figures = split["kcache_metrics"]
    assert figures["decode_layer_steps"] % FULL_LAYERS == 0
    assert figures["dropped_mass"][0] == [1e-4, figures["selected_lists"]]
    # Pages are as small as the model's, whatever the size of a state.
    row_bytes = PAGE_TOKENS * 64 * 4
    assert figures["host_pool_bytes"] == figures["host_pool_blocks"] * FULL_LAYERS * 2 * row_bytes
