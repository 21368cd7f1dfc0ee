# SPDX-License-Identifier: Apache-2.0
"""The kernel that plays recorded masses (benchmarks/replay/replay.py) against a plain definition.

`python -m tests.csrc.interpreted LIBRARY tests.kernels.test_replay` runs the cases under
TRITON_INTERPRET=1 (tests/csrc/test_decode.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from benchmarks.replay.record import Recording, decode_mass, selected_blocks
from tests.conftest import assert_close
from tests.kernels.checks import sums_of_chunks
from tests.kernels.layers import cache_shape, host_rows
from tests.shapes import Shape, build_case
from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.cache.hot_cache import HotCache
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.reference.select import select_blocks
from vllm_kcache.types import Selection

NUM_LAYERS, NUM_KV_HEADS, GROUP, TOKENS = 4, 2, 3, 8
NOTHING, RECENT = -80.0, 5


def a_recording(seed: int = 0, steps: int = 9, first_tokens: int = 97, group: int = 1) -> Recording:
    """Two texts, three layers of two KV heads: masses that sum to 1, few of them large."""
    torch.manual_seed(seed)
    lengths = torch.arange(first_tokens, first_tokens + steps, dtype=torch.int32)
    blocks = -(-int(lengths[-1]) // TOKENS)
    scores = 3 * torch.randn(2, 3, 2 * group, 1, blocks)
    scores = scores + 0.3 * torch.randn(2, 3, 2 * group, steps, blocks)
    exists = torch.arange(blocks) < -(-lengths // TOKENS)[:, None]
    masses = scores.masked_fill(~exists, -torch.inf).softmax(-1)
    codes = (255 + 12 * masses.clamp_min(1e-30).log2()).round().clamp(0, 255).to(torch.uint8)
    return Recording(codes, lengths, ("one", "two"), "nobody", TOKENS, group)


def hashed(number: int) -> int:
    number &= 0x7FFFFFFF
    for _ in range(2):
        number = (((number >> 16) ^ number) * 0x45D9F3B) & 0x7FFFFFFF
    return (number >> 16) ^ number


def played(
    recording: Recording, page: int, tokens: int, list_number: int, num_lists: int
) -> tuple[int, int, int, dict[int, int]]:
    """What one list of a request plays: text, trace and step, and recorded block -> place."""
    num_texts, layers, heads, num_steps, trace_blocks = recording.codes.shape
    key = hashed(page)
    # Forth and back: 0 1 2 3 2 1 0 1 ...
    around = [*range(num_steps), *range(num_steps - 2, 0, -1)]
    step = around[(tokens + key // num_texts) % len(around)]
    trace = list_number * (layers * heads // recording.group) // num_lists
    recorded, blocks = int(recording.num_blocks[step]), -(-tokens // TOKENS)
    stride = max(1, (blocks - RECENT) // (trace_blocks - RECENT))
    places = {}
    for block in range(recorded):
        if block >= recorded - RECENT:
            place = blocks - (recorded - block)
        else:
            random = hashed(key + list_number * 65536 + block) * stride >> 31
            place = block * stride + (random if block else 0)
            if place >= blocks - RECENT:
                continue
        if place >= 0:
            places[block] = place
    return key % num_texts, trace, step, places


def expected_lse(
    recording: Recording, page: int, tokens: int, list_number: int, num_lists: int,
    in_group: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Log-masses [P] of a query head of one list, up to the length of the request."""
    text, trace, step, places = played(recording, page, tokens, list_number, num_lists)
    by_head = recording.codes.flatten(1, 2).unflatten(1, (-1, recording.group))
    codes = by_head[text, trace, (in_group + list_number) % recording.group, step]
    lse = torch.full((-(-tokens // TOKENS),), NOTHING)
    for block, place in places.items():
        code = int(codes[block])
        if code:
            lse[place] = (code - 255) / 12 * math.log(2)
    return lse


# Cases that need the interpreter -------------------------------------------------------------


def check_kernel(device: str = "cpu", recorded_group: int = 1) -> int:
    """Odd lengths, one of them over several programs, and rows of scores that vectors fit and that
    they do not; nothing else is written."""
    from benchmarks.replay.replay import Replay

    recording = a_recording(group=recorded_group)
    replay = Replay(recording, device)
    lengths = torch.tensor([112, 0, 1, 40, 113, 2081, 8999], dtype=torch.int32)
    table = torch.tensor([[7, 9], [0, 0], [3, 9], [4, 9], [1000, 9], [12, 9], [54321, 9]]).int()
    num_heads = NUM_KV_HEADS * GROUP
    # Chunks of 16 V blocks.
    shape = CacheShape(NUM_LAYERS, num_heads, NUM_KV_HEADS, 128, 16, TOKENS, torch.bfloat16)
    cases = 0
    for layer, max_blocks in ((0, 1130), (3, 1132)):
        wide = 4 if max_blocks % 4 == 0 else 1
        lse = torch.full((len(lengths), num_heads, max_blocks), torch.nan, device=device)
        sums = torch.full((*lse.shape[:2], 71), torch.nan, device=device)
        most = torch.full_like(sums, torch.nan)
        replay.launch(shape, layer, lengths.to(device), table.to(device), lse, sums, most)
        expected_sums = sums_of_chunks(lse.cpu(), (-(-lengths // TOKENS)).tolist(), 16)
        for row, count in enumerate((-(-lengths // (16 * TOKENS))).tolist()):
            assert_close(sums[row, :, :count].cpu(), expected_sums[row, :, :count])
            above = most[row, :, :count].repeat_interleave(16, -1)[..., :max_blocks]
            there = -(-int(lengths[row]) // TOKENS)
            assert bool((lse[row, :, :there] <= above[..., :there]).all())
        by_head = lse.cpu().unflatten(1, (NUM_KV_HEADS, GROUP))
        for row, head in itertools.product(range(len(lengths)), range(NUM_KV_HEADS)):
            tokens = int(lengths[row])
            blocks = -(-tokens // TOKENS)
            assert by_head[row, head, :, -(-blocks // wide) * wide :].isnan().all()
            for in_group in range(GROUP if blocks else 0):
                expected = expected_lse(
                    recording, int(table[row, 0]), tokens, layer * NUM_KV_HEADS + head,
                    NUM_LAYERS * NUM_KV_HEADS, in_group,
                )  # fmt: skip
                ours = by_head[row, head, in_group, :blocks]
                assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5), (layer, row, head)
            cases += blocks > 0
    return cases


def check_step(followed: bool, ahead: bool = False) -> None:
    """A decode step that is played selects what the recorded masses say, and counts it.

    Args:
        ahead: each layer writes what the next one selects by, as in an engine.
    """
    from benchmarks.replay.replay import Replay
    from vllm_kcache.kernels.decode import decode_step
    from vllm_kcache.kernels.select import packed_view
    from vllm_kcache.kernels.workspace import DecodeBatch, Followers
    from vllm_kcache.reference.score import score_blocks

    recording = a_recording()
    case = build_case(
        Shape(
            seq_lens=(150, 0, 113), num_kv_heads=NUM_KV_HEADS, group_size=GROUP, head_size=64,
            page_tokens=16, v_block_tokens=TOKENS,
        )
    )  # fmt: skip
    lengths, max_blocks = case.shape.seq_lens, case.shape.max_blocks
    selection, shape = Selection(None, 0.9, 1, 16, "sum"), cache_shape(case, NUM_LAYERS)
    rows = host_rows(case.v_pool, shape)
    cache = HotCache.make(256, NUM_LAYERS, rows.shape[0], shape.row.bytes, "cpu")
    replay = Replay(recording, "cpu")
    workspace = replay.Workspace.make(shape, selection, len(lengths), max_blocks, "cpu")
    step = replay.decode_step if ahead else decode_step
    batch = DecodeBatch(case.query, case.block_table, case.seq_lens, case.scale, max_blocks)
    scored = score_blocks(
        case.query, case.k_pages, case.block_table, case.seq_lens, case.scale, TOKENS, max_blocks
    )
    total = 0
    for layer in range(NUM_LAYERS):
        view = LayerView(layer, shape, selection, "renormalize", case.k_pages, rows, cache)
        view = dataclasses.replace(view, packed=packed_view(view))
        out = torch.full_like(case.query, torch.nan)
        step(view, workspace, batch, out, followers=Followers(2, 2) if followed else None)
        lists = workspace.views(view, batch)
        # Scoring costs what it does: it writes its own scores.
        exists = scored.isfinite()
        assert_close(lists.block_lse[exists], scored[exists])
        for row, head in itertools.product((0, 2), range(NUM_KV_HEADS)):
            lse = expected_lse(
                recording, int(case.block_table[row, 0]), lengths[row],
                layer * NUM_KV_HEADS + head, NUM_LAYERS * NUM_KV_HEADS,
            )  # fmt: skip
            chosen = select_blocks(
                lse[None, None], case.seq_lens[row : row + 1], 1, TOKENS, selection
            )
            count = int(chosen.counts)
            total += count
            assert int(lists.selected.counts[row, head]) == count
            assert torch.equal(lists.selected.blocks[row, head, :count], chosen.blocks[0, 0])
        assert out[[0, 2]].isfinite().all()
    counted = cache.read_counters()
    assert counted.selected == counted.misses == total
    assert 2 < total / counted.lists < 12, "the selection is neither nothing nor everything"


def check_install() -> None:
    """A worker's steps are played, and what it checks its kernels with beforehand is not."""
    from benchmarks.replay.replay import Replay
    from vllm_kcache import split_cache_gpu
    from vllm_kcache.kernels import decode, self_check, workspace

    replay = Replay(a_recording(), "cpu")
    replay.install()
    assert split_cache_gpu.DecodeWorkspace is replay.Workspace
    assert split_cache_gpu.decode_step == replay.decode_step
    assert self_check.DecodeWorkspace is workspace.DecodeWorkspace is not replay.Workspace
    assert self_check.decode_step is decode.decode_step
    split_cache_gpu.DecodeWorkspace = workspace.DecodeWorkspace
    split_cache_gpu.decode_step = decode.decode_step


def main() -> None:
    """Every case; any difference raises."""
    from benchmarks.replay.replay import Replay

    cases = check_kernel() + check_kernel(recorded_group=2)
    for followed in (False, True):
        check_step(followed)
        check_step(followed, ahead=True)
    check_install()
    too_short = dataclasses.replace(a_recording(), seq_lens=a_recording().seq_lens - 70)
    with pytest.raises(ValueError, match="4 V blocks were recorded; needs more than 5"):
        Replay(too_short, "cpu")
    print(f"{cases} lists and decode steps equal the definition")


@pytest.mark.gpu
def test_kernel_equals_definition_on_a_gpu() -> None:
    assert check_kernel("cuda") > 20
    assert check_kernel("cuda", recorded_group=2) > 20


# What the definition promises ----------------------------------------------------------------


# Lengths at which 40 tokens more do not change the stride.
@pytest.mark.parametrize("tokens", [113, 700, 2081, 32744])
def test_places_keep_order_and_stay(tokens: int) -> None:
    """Every block has one place, in order; from step to step it stays, and time moves by one."""
    recording = a_recording()
    last_step = None
    homes: dict[int, int] = {}
    steps = []
    for length in range(tokens, tokens + 40):
        _, _, step, places = played(recording, 17, length, 5, 8)
        steps.append(step)
        recorded, blocks = int(recording.num_blocks[step]), -(-length // TOKENS)
        assert list(places) == list(range(recorded))
        ordered = list(places.values())
        assert ordered == sorted(set(ordered))
        assert ordered[0] == 0
        assert ordered[-RECENT:] == list(range(blocks - RECENT, blocks))
        if last_step is not None:
            assert abs(step - last_step) == 1
        last_step = step
        for block in range(recorded - RECENT):
            assert homes.setdefault(block, places[block]) == places[block]
    assert set(steps) == set(range(9))
    if tokens == 32744:
        spread = [place % (4088 // 9) for block, place in homes.items() if block]
        assert len(set(spread)) > len(spread) // 2, "blocks are spread at random"


@pytest.mark.parametrize("tokens", [152, 2080, 32768])
def test_lists_are_as_long_as_recorded(tokens: int) -> None:
    """Of any request, at any length: the recorded blocks and no others."""
    recording = a_recording(first_tokens=145)
    selection = Selection(None, 0.9, 1, 16, "sum")
    masses = decode_mass(recording.codes).flatten(0, 2)
    chosen = selected_blocks(masses, recording.seq_lens, selection, TOKENS)
    chosen = chosen.unflatten(0, recording.codes.shape[:3]).flatten(1, 2)
    compared = 0
    for page, list_number in itertools.product(range(3, 12), (0, 5)):
        for length in range(tokens, tokens + 17):
            text, trace, step, places = played(recording, page, length, list_number, 8)
            if (length - int(recording.seq_lens[step])) % TOKENS:
                continue  # the recent tokens overlap other blocks
            lse = expected_lse(recording, page, length, list_number, 8)
            ours = select_blocks(lse[None, None], torch.tensor([length]), 1, TOKENS, selection)
            expected = chosen[text, trace, step].nonzero()[:, 0].tolist()
            assert ours.blocks[0, 0].tolist() == [places[block] for block in expected]
            compared += 1
    assert compared > 10


def test_requests_differ() -> None:
    """Neighbouring pages play different texts and begin at different steps."""
    recording = a_recording()
    begun = [played(recording, page, 300, 0, 8)[::2][:2] for page in range(1, 41)]
    assert {text for text, _ in begun} == {0, 1}
    assert {step for _, step in begun} == set(range(9))


if __name__ == "__main__":
    main()
