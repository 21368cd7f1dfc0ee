# SPDX-License-Identifier: Apache-2.0
"""The hot cache's tensors, which Python, Triton and csrc/ must see alike."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from csrc.build import SOURCE
from vllm_kcache.cache import hot_cache
from vllm_kcache.cache.hot_cache import HotCache
from vllm_kcache.kernels.select import BLOCK_BITS, MOST_BLOCKS
from vllm_kcache.types import MOST_LISTED_TOGETHER

ROOT = Path(__file__).resolve().parents[2]


def test_words_are_those_of_csrc() -> None:
    header = (SOURCE / "layer_view.h").read_text()
    constants = dict(re.findall(r"\b(k\w+) = (\d+)[,;]", header))
    state = ("HAND", "EPOCH", "SCORED", "ENDED", "WANTED", "MISSED", "EXISTING", "REST_UNTIL")
    for name in (*state, "STATE_WORDS", "FIRST_DROPPED_BUCKET", "FIRST_ESTIMATE_BUCKET"):
        ours = "k" + name.title().replace("_", "")
        assert int(constants[ours]) == getattr(hot_cache, name), ours
    for word, name in enumerate(hot_cache.COUNTER_NAMES):
        assert int(constants["k" + name.title()]) == word
    assert int(constants["kDroppedBuckets"]) == hot_cache.DROPPED_MASS_BUCKETS
    assert int(constants["kEstimateBuckets"]) == len(hot_cache.ESTIMATE_ERROR_EDGES)
    assert "kMaxBlocks = 1 << kBlockBits;" in header
    assert int(constants["kBlockBits"]) == BLOCK_BITS == MOST_BLOCKS.bit_length() - 1
    assert int(constants["kMostTogether"]) == MOST_LISTED_TOGETHER <= 31 - BLOCK_BITS


@pytest.mark.parametrize("num_slots", [0, 7])
def test_bytes_are_those_that_make_takes(num_slots: int) -> None:
    cache = HotCache.make(num_slots, 3, 40, 48, "cpu")
    tensors = (cache.slots, cache.table, cache.slot_word, cache.state, cache.counters)
    taken = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert taken == HotCache.bytes(num_slots, 3, 40, 48)
    assert (cache.num_slots, cache.rows_per_layer) == (num_slots, 40)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((-1, 1, 40, 48), "num_slots=-1: must be at least 0"),
        ((4, 0, 40, 48), "num_layers=0: must be at least 1"),
        ((4, 1, 40, 40), "row_bytes=40: must be a multiple of 16"),
        ((4, 1 << 16, 1 << 15, 48), "must be below 2\\*\\*31"),
    ],
)
def test_sizes_are_checked(arguments: tuple[int, int, int, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        HotCache.make(*arguments, "cpu")


def test_a_flushed_cache_is_empty() -> None:
    cache = HotCache.make(4, 1, 8, 16, "cpu")
    cache.table[0, 3], cache.slot_word[2] = 2, 3 << 32
    cache.flush()
    assert (cache.table == -1).all()
    assert (cache.slot_word == hot_cache.EMPTY_SLOT).all()


def test_triton_claims_nothing_where_there_are_no_slots() -> None:
    """In a process of its own: the interpreter must be on before Triton is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.csrc.claims"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["0:", "-1", "3:", "2"], done.stdout + done.stderr[-3000:]
