# SPDX-License-Identifier: Apache-2.0
"""What was recorded of a real model, and the form it is stored in (replay/record.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.replay.record import (
    RECORDINGS,
    Recording,
    ScoreRecorder,
    Statistics,
    decode_mass,
    encode_mass,
    selected_blocks,
    statistics,
    without_small,
)
from vllm_kcache.types import Selection


@pytest.fixture(scope="module")
def recording() -> Recording:
    """The one that is played by the benchmarks."""
    return Recording.load()


def test_shape(recording: Recording) -> None:
    """SmolLM2-135M: 30 layers of 3 KV heads; 64 steps from 4096 tokens of context on."""
    assert recording.model == "SmolLM2-135M-Instruct"
    assert recording.v_block_tokens == 8
    assert recording.codes.shape == (2, 30, 3, 64, 520)
    assert recording.codes.dtype == torch.uint8
    assert recording.seq_lens.tolist() == list(range(4097, 4161))
    assert len(set(recording.texts)) == 2


def test_masses_are_a_softmax(recording: Recording) -> None:
    """They sum to 1, nothing lies past the length, and no two lists or steps are the same."""
    masses = decode_mass(recording.codes)
    total = masses.sum(-1)
    # A list of one large block is off by that block's rounding.
    assert float((total - 1).abs().max()) < 2 ** (1 / 24) - 1 + 1e-3
    assert float((total - 1).mean()) == pytest.approx(0, abs=1e-3)
    beyond = torch.arange(520) >= recording.num_blocks[:, None]
    assert int(recording.codes.masked_select(beyond).sum()) == 0
    assert beyond.any()
    rows = recording.codes.flatten(0, 3)
    assert len(torch.unique(rows, dim=0)) == len(rows)


def lists_of(recording: Recording, selection: Selection) -> Statistics:
    """What a rule selects in the first 16 steps: all 64 take minutes."""
    masses = decode_mass(recording.codes[:, :, :, :16]).flatten(0, 2)
    chosen = selected_blocks(masses, recording.seq_lens[:16], selection, 8, recording.group)
    return statistics(chosen, 8)


def test_lists_are_like_a_real_models(recording: Recording) -> None:
    """Within what was measured apart from this: 577 tokens at coverage .95 over three texts."""
    found = [lists_of(recording, Selection(None, c, 1, 32, "sum")) for c in (0.95, 0.97)]
    assert 450 < found[0].tokens < 650
    assert 1.2 < found[1].tokens / found[0].tokens < 1.5
    assert 0.70 < found[0].in_previous < 0.85
    assert 0.87 < found[0].in_last_8 < 0.96


def test_lists_of_a_threshold_are_like_a_real_models() -> None:
    """The other recording: 446 tokens at .002 and 345 at .003 over eight other texts of 2K."""
    recording = Recording.load(RECORDINGS["max"])
    assert recording.group == 3
    assert recording.codes.shape == (2, 30, 9, 64, 520)
    sums = decode_mass(recording.codes).sum(-1)
    assert float((sums - 1).abs().max()) < 2 ** (1 / 24) - 1 + 1e-3
    found = [lists_of(recording, Selection(None, None, 1, 32, "max", t)) for t in (0.002, 0.003)]
    assert 350 < found[0].tokens < 500
    assert 0.70 < found[1].tokens / found[0].tokens < 0.85
    assert 0.70 < found[0].in_previous < 0.85


def test_small_masses_go_to_the_first_block() -> None:
    masses = torch.tensor([[0.5, 2.0**-11, 0.4995, 1e-4, 0.0], [1e-5, 0.99999, 0, 0, 0]])
    kept = without_small(masses)
    assert kept[:, 1:].tolist() == [
        pytest.approx([2.0**-11, 0.4995, 0, 0]), pytest.approx([0.99999, 0, 0, 0])
    ]  # fmt: skip
    assert kept.sum(-1).tolist() == pytest.approx([1, 1])


def test_a_group_selects_together() -> None:
    """Two query heads of a KV head: each block that is heavy for one of them."""
    masses = torch.tensor([[[0.5, 0.4, 0.05, 0.05]], [[0.5, 0.05, 0.05, 0.4]]])
    rule = Selection(None, None, 1, 1, "max", 0.3)
    lengths = torch.tensor([32]).int()
    together = selected_blocks(masses, lengths, rule, 8, 2)
    assert together.tolist() == [[[True, True, False, True]]]
    alone = selected_blocks(masses, lengths, rule, 8)
    assert alone.tolist() == [[[True, True, False, True]], [[True, False, False, True]]]


def test_codes() -> None:
    masses = torch.tensor([1.0, 0.5, 0.3, 1e-3, 1e-6, 1e-9, 0.0])
    back = decode_mass(encode_mass(masses))
    assert back[:5].tolist() == pytest.approx(masses[:5].tolist(), rel=0.03)
    assert back[5:].tolist() == [0.0, 0.0]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(encode_mass(decode_mass(every)), every)
    assert bool((decode_mass(every).diff() > 0).all())


def small() -> Recording:
    codes = torch.randint(0, 256, (2, 3, 2, 4, 6), dtype=torch.uint8)
    return Recording(codes, torch.tensor([41, 42, 43, 44]).int(), ("a", "b"), "m", 8)


def test_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    path, saved = tmp_path / "folder" / "one.npz", small()
    saved.save(path)
    loaded = Recording.load(path)
    assert torch.equal(loaded.codes, saved.codes)
    assert torch.equal(loaded.seq_lens, saved.seq_lens)
    assert (loaded.texts, loaded.model, loaded.v_block_tokens) == (("a", "b"), "m", 8)
    assert loaded.group == 1
    replace(saved, group=2).save(path)
    assert Recording.load(path).group == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": ("a",)}, "beside 1 texts and 4 steps"),
        ({"seq_lens": torch.tensor([41, 42, 43]).int()}, "beside 2 texts and 3 steps"),
        ({"seq_lens": torch.tensor([41, 43, 44, 45]).int()}, "lengths must grow by 1"),
        ({"v_block_tokens": 16}, "the last needs 3 blocks"),
        ({"group": 3}, "2 heads are not groups of 3"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, changes: dict, message: str) -> None:
    path = tmp_path / "wrong.npz"
    replace(small(), **changes).save(path)
    with pytest.raises(ValueError, match=message):
        Recording.load(path)


def test_repeats_by_hand() -> None:
    """One list of ten steps: {0, 1} in the first, {0} up to the eighth, {1}, then {1, 2, 3, 0}."""
    chosen = torch.zeros((1, 10, 5), dtype=torch.bool)
    chosen[0, :8, 0] = True
    chosen[0, 0, 1] = chosen[0, 8, 1] = True
    chosen[0, 9, :4] = True
    found = statistics(chosen, 8)
    assert found.tokens == pytest.approx(8 * (2 + 7 + 1 + 4) / 10)
    assert found.in_previous == pytest.approx((0 + 1 / 4) / 2)
    assert found.in_last_8 == pytest.approx((1 + 2 / 4) / 2)


def test_recorder_keeps_every_query_head() -> None:
    """Two layers, two steps, two KV heads of two query heads; the blocks grow by one."""
    scores = [torch.randn(1, 4, blocks) for blocks in (3, 3, 4, 4)]
    waiting = iter(scores)
    recorder = ScoreRecorder(lambda *arguments: next(waiting), num_kv_heads=2)
    for step in range(2):
        for expected in scores[2 * step : 2 * step + 2]:
            lengths = torch.tensor([24 + step]).int()
            got = recorder(torch.zeros(1, 4, 8), None, None, lengths, 1.0, 8, 4)
            assert got is expected
    masses, lengths = recorder.take(num_layers=2)
    assert masses.shape == (2, 2, 2, 2, 4)
    assert lengths.tolist() == [24, 25]
    last = scores[3].softmax(-1)[0]
    assert torch.equal(masses[1, 1, :, 1], last[2:])
    assert not masses[..., 0, 3].any()
    assert float(masses.sum()) == pytest.approx(16)


def test_recorder_refuses_what_it_cannot_tell_apart() -> None:
    recorder = ScoreRecorder(lambda *arguments: torch.zeros(1, 4, 3), num_kv_heads=2)
    query, lengths = torch.zeros(2, 4, 8), torch.tensor([24, 24]).int()
    with pytest.raises(RuntimeError, match="2 requests decode at once"):
        recorder(query, None, None, lengths)
    for tokens in (24, 24, 25):
        recorder(query[:1], None, None, torch.tensor([tokens]).int())
    with pytest.raises(RuntimeError, match="3 scored layers are not steps of 2"):
        recorder.take(num_layers=2)
    with pytest.raises(RuntimeError, match="3 scored layers are not steps of 3"):
        recorder.take(num_layers=3)
