# SPDX-License-Identifier: Apache-2.0
"""The gate on a GPU: with everything selected, the text is that of stock vLLM."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.comparing import (
    GRAPHS,
    assert_same_text_or_tie,
    batches,
    distance,
    run_both,
    run_triton,
)
from tests.integration.engines import GATE, run_engine, tokens_of

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

HALF = {**GRAPHS, "dtype": "bfloat16", "max_num_batched_tokens": 1024}
WORK = batches(64, 64)


@pytest.fixture(scope="module")
def all_in_bfloat16(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Stock vLLM, the split cache with room for everything, and stock with another attention."""
    folder = tmp_path_factory.mktemp("bfloat16")
    with ThreadPoolExecutor(1) as pool:
        triton = pool.submit(run_triton, folder, WORK, **HALF)
        return (*run_both(folder, WORK, GATE, **HALF), triton.result())


def test_text_equals_stock_in_float32(tmp_path: Path) -> None:
    engine = {**GRAPHS, "dtype": "float32", "max_num_batched_tokens": 1024}
    stock, split = run_both(tmp_path, batches(48, 16), GATE, **engine)
    assert tokens_of(split) == tokens_of(stock)


def test_text_equals_stock_in_bfloat16(all_in_bfloat16: tuple[dict[str, Any], ...]) -> None:
    """Up to ties, and no farther from stock than stock's own other attention."""
    stock, split, triton = all_in_bfloat16
    found, other = assert_same_text_or_tie(split, stock), distance(triton, stock)
    print("Triton attention:", other)
    assert found.rms <= 1.1 * other.rms, (found, other)
    assert found.equal >= other.equal, (found, other)
    assert split["batches"][1][0]["cached_tokens"] > 2000
    lists = split["kcache_metrics"]["selected_lists"]
    assert lists > 0
    assert split["kcache_metrics"]["dropped_mass"][0] == [1e-4, lists]


def test_few_blocks_and_a_small_hot_cache(
    tmp_path: Path, all_in_bfloat16: tuple[dict[str, Any], ...]
) -> None:
    """Requests that do not fit are preempted and recomputed; slots change owners all the time."""
    settings = {**GATE, "hot_cache_gib": 0.0005}
    split = run_engine(tmp_path, WORK, kcache=settings, num_gpu_blocks_override=300, **HALF)
    assert_same_text_or_tie(split, all_in_bfloat16[0])
    assert split["vllm_metrics"]["vllm:num_preemptions"] > 0
    assert split["kcache_metrics"]["direct_host_reads"] > 0


CODES = {"k_bits": 4, "hot_cache_gib": 0.25}


@pytest.mark.parametrize("host_dtype", ["model", "int8"])
def test_text_equals_stock_with_codes(
    host_dtype: str, tmp_path: Path, all_in_bfloat16: tuple[dict[str, Any], ...]
) -> None:
    """True K and V answer: with everything selected codes decide nothing."""
    settings = {**GATE, **CODES, "host_dtype": host_dtype}
    split = run_engine(tmp_path, WORK, kcache=settings, **HALF)
    stock, _, triton = all_in_bfloat16
    other = distance(triton, stock)
    found = distance(split, stock)
    print(host_dtype, found, "Triton attention:", other)
    if host_dtype == "model":
        assert_same_text_or_tie(split, stock)
        assert found.rms <= 1.1 * other.rms, (found, other)


def test_codes_in_float32(tmp_path: Path) -> None:
    engine = {**GRAPHS, "dtype": "float32", "max_num_batched_tokens": 1024}
    stock, split = run_both(tmp_path, batches(48, 16), {**GATE, **CODES}, **engine)
    assert tokens_of(split) == tokens_of(stock)
