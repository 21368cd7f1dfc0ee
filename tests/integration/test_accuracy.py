# SPDX-License-Identifier: Apache-2.0
"""What the default selection costs, on real text, through the decode path of the real engine.

One run of the accuracy benchmark; so this is also its test with real engines.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import __main__ as accuracy
from tests.integration.engines import MODEL

pytestmark = [pytest.mark.slow, pytest.mark.full]

CONTEXT_TOKENS = 1024
FORCED_TOKENS = 24
ITEMS = 4
DEFAULT: dict[str, Any] = {}
SETTINGS = (
    {"top_n": "all"},
    DEFAULT,
    {"top_n": 16},
    # The default in other words, to be measured again with another setting in between.
    {"mass_threshold": 0.002, "top_n": "all"},
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Stock's row, then one for each setting."""
    folder = tmp_path_factory.mktemp("accuracy")
    accuracy.main(
        [
            "sweep", MODEL, "--lengths", str(CONTEXT_TOKENS), "--items", str(ITEMS),
            "--forced", str(FORCED_TOKENS), "--settings", json.dumps(SETTINGS),
            "--cpu-cache-gib", "2", "--results", str(folder / "rows.jsonl"), "--work", str(folder),
        ]
    )  # fmt: skip
    assert [path.name for path in folder.iterdir()] == ["rows.jsonl"], "the logits are still there"
    return [json.loads(line) for line in Path(folder / "rows.jsonl").read_text().splitlines()]


def test_stock_agrees_with_what_vllm_reports(rows: list[dict[str, Any]]) -> None:
    stock = rows[0]
    assert stock["kcache"] is None
    assert stock["positions"] == ITEMS * FORCED_TOKENS
    assert stock["kl"] == 0
    # vLLM's own log-softmax is in float32.
    assert stock["logprob_difference"] < 1e-4


def test_everything_selected_is_stock(rows: list[dict[str, Any]]) -> None:
    everything = rows[1]
    assert everything["kl_max"] < 1e-8
    assert everything["top1_agreement"] == 1
    assert everything["selected_tokens"] > CONTEXT_TOKENS
    assert everything["dropped_mass"][0] == 0


def test_default_keeps_the_perplexity(rows: list[dict[str, Any]]) -> None:
    default = rows[2]
    print(
        f"perplexity {default['perplexity']:.4f} against {default['stock_perplexity']:.4f}, "
        f"KL {default['kl']:.5f}, {default['selected_tokens']:.0f} tokens a head"
    )
    # Most of V is not read, or this would show nothing.
    assert default["selected_tokens"] < 0.45 * CONTEXT_TOKENS
    assert default["perplexity"] == pytest.approx(default["stock_perplexity"], rel=0.01)
    assert 0 < default["kl"] < 0.004


def test_a_setting_gives_the_same_after_another(rows: list[dict[str, Any]]) -> None:
    _, _, default, fixed, again = rows
    assert fixed["selected_tokens"] == 16 * 8
    assert fixed["kl"] > default["kl"]
    for name in ("perplexity", "kl", "kl_max", "selected_tokens", "by_kind"):
        assert again[name] == default[name]
