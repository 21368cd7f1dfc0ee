# SPDX-License-Identifier: Apache-2.0
"""Both logits processors, fed as vLLM's two model runners feed them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from benchmarks.accuracy.record import RecordV1, RecordV2
from benchmarks.accuracy.score import FIELDS, compare_logits

VOCABULARY = 11
PROMPT_TOKENS = 5
TOKENS = ([3, 1, 4], [1, 5, 9])


def parameters(folder: Path, item: int, save: bool) -> SamplingParams:
    positions = folder / f"positions-{save}.f64"
    if not positions.exists():
        np.full((3, 2, len(FIELDS)), np.nan).tofile(positions)
    forced = {
        "first_row": item,
        "row_stride": 2,
        "num_rows": 6,
        "prompt_tokens": PROMPT_TOKENS,
        "tokens": TOKENS[item],
        "stock_logits": str(folder / "stock.f32"),
        "positions": str(positions),
        "save": save,
    }
    return SamplingParams(extra_args={"accuracy": forced})


def all_logits(seed: int) -> torch.Tensor:
    """[steps, items, vocabulary]"""
    return torch.randn((3, 2, VOCABULARY), generator=torch.Generator().manual_seed(seed))


def check(folder: Path, save: bool, logits: torch.Tensor) -> None:
    """The files hold what `compare_logits` says of every position."""
    positions = np.fromfile(folder / f"positions-{save}.f64").reshape(3, 2, len(FIELDS))
    stock = all_logits(0)
    for step in range(3):
        expected = compare_logits(
            logits[step], stock[step], torch.tensor([tokens[step] for tokens in TOKENS])
        )
        assert np.array_equal(positions[step], expected.numpy())
    saved = np.fromfile(folder / "stock.f32", dtype=np.float32).reshape(3, 2, VOCABULARY)
    assert np.array_equal(saved, stock.numpy())


def assert_forced(row: torch.Tensor, token: int) -> None:
    assert row.argmax() == token
    assert torch.isneginf(row).sum() == VOCABULARY - 1


def run_v1(folder: Path, save: bool, logits: torch.Tensor) -> None:
    """Item 1 enters first, before item 0; a request that is left alone sits between; rows move."""
    processor = RecordV1(None, torch.device("cpu"), False)
    said: list[list[int]] = [[], []]
    added: list[Any] = [
        (0, parameters(folder, 1, save), None, said[1]),
        (1, SamplingParams(), None, []),
    ]
    processor.update_state(BatchUpdate(2, removed=[], added=added, moved=[]))
    # An unfinished prompt: sampled, and dropped by vLLM.
    processor.apply(torch.ones((2, VOCABULARY)))
    rows = {1: 0}
    for step in range(3):
        if step == 0:
            update = [(2, parameters(folder, 0, save), None, said[0])]
            processor.update_state(BatchUpdate(3, removed=[], added=update, moved=[]))
            rows[0] = 2
        if step == 1:
            swap = [(0, 1, MoveDirectionality.SWAP)]
            processor.update_state(BatchUpdate(3, removed=[], added=[], moved=swap))
            rows[1] = 1
        batch = torch.zeros((3, VOCABULARY))
        for item, row in rows.items():
            batch[row] = logits[step, item]
        result = processor.apply(batch)
        for item, row in rows.items():
            assert_forced(result[row], TOKENS[item][step])
            said[item].append(TOKENS[item][step])
        (other,) = {0, 1, 2} - set(rows.values())
        assert (result[other] == 0).all()
    assert not processor.is_argmax_invariant()


def run_v2(folder: Path, save: bool, logits: torch.Tensor) -> None:
    """The same by slots, with the batch in another order at every step."""
    processor = RecordV2(None, None)
    assert processor.add_request(5, parameters(folder, 0, save))
    assert processor.add_request(2, parameters(folder, 1, save))
    assert not processor.add_request(7, SamplingParams())

    def context(slots: list[int], lengths: list[int]) -> SimpleNamespace:
        return SimpleNamespace(idx_mapping_np=np.array(slots), pos=torch.tensor(lengths) - 1)

    # Chunks of prompts: what is sampled is dropped by vLLM.
    processor.apply(torch.ones((2, VOCABULARY)), context([2, 5], [3, 4]))
    orders = [[5, 2, 7], [7, 5, 2], [2, 7, 5]]
    for step, slots in enumerate(orders):
        batch = torch.zeros((3, VOCABULARY))
        batch[slots.index(5)], batch[slots.index(2)] = logits[step]
        result = processor.apply(batch, context(slots, [PROMPT_TOKENS + step] * 3))
        assert_forced(result[slots.index(5)], TOKENS[0][step])
        assert_forced(result[slots.index(2)], TOKENS[1][step])
        assert (result[slots.index(7)] == 0).all()
    # A slot that another request takes over is left alone.
    assert not processor.add_request(5, SamplingParams())
    result = processor.apply(torch.zeros((1, VOCABULARY)), context([5], [9]))
    assert (result == 0).all()


@pytest.mark.parametrize("run", [run_v1, run_v2])
def test_saves_and_compares(tmp_path: Path, run: Any) -> None:
    run(tmp_path, True, all_logits(0))
    check(tmp_path, True, all_logits(0))
    run(tmp_path, False, all_logits(1))
    check(tmp_path, False, all_logits(1))


def test_v2_refuses_rows_of_speculation(tmp_path: Path) -> None:
    processor = RecordV2(None, None)
    processor.add_request(0, parameters(tmp_path, 0, True))
    context = SimpleNamespace(idx_mapping_np=np.array([0]), pos=torch.tensor([4, 5]))
    with pytest.raises(RuntimeError, match="speculative"):
        processor.apply(torch.zeros((2, VOCABULARY)), context)


def test_comparing_needs_the_file_of_stock(tmp_path: Path) -> None:
    processor = RecordV2(None, None)
    processor.add_request(0, parameters(tmp_path, 0, False))
    context = SimpleNamespace(idx_mapping_np=np.array([0]), pos=torch.tensor([4]))
    with pytest.raises(FileNotFoundError):
        processor.apply(torch.zeros((1, VOCABULARY)), context)
