# SPDX-License-Identifier: Apache-2.0
"""Decode steps on a GPU against the reference: odd shapes, followers, graphs, reuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.conftest import assert_close
from tests.kernels.checks import (
    SELECTIONS,
    SHAPES,
    THRESHOLDS,
    check_decode,
    check_failed_launch,
    check_prefill_copies,
)
from tests.kernels.layers import Layer, host_rows, layer_of
from tests.kernels.self_checking import when, with_argument
from tests.shapes import Case, Shape, build_case
from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.cache.hot_cache import EPOCH, REST_UNTIL, WANTED, HotCache
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels import decode, self_check
from vllm_kcache.kernels.decode import decode_step
from vllm_kcache.kernels.select import packed_view
from vllm_kcache.kernels.workspace import DecodeBatch, DecodeWorkspace, Followers
from vllm_kcache.kernels.write import WriteParts, write_kv
from vllm_kcache.types import Selection

pytestmark = pytest.mark.gpu
MORE_SHAPES = (
    *SHAPES,
    Shape((257, 1, 0, 1024, 31), 8, 4, 128, 16, 8),
    Shape((513, 700), 2, 16, 256, 16, 4),
    Shape((300, 299, 17), 4, 8, 128, 32, 32),
    Shape((1000,) * 5, 32, 1, 128, 16, 8),
    Shape((2049,), 3, 3, 64, 16, 16),
)


FOLLOWERS = (None, Followers(3, 3), Followers(64, 64), Followers(64, 2))


@pytest.mark.parametrize("shape", MORE_SHAPES, ids=str)
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("followers", [None, Followers(7, 3)], ids=str)
def test_step_equals_reference(
    shape: Shape, selection: Selection, followers: Followers | None
) -> None:
    check_decode(build_case(shape), selection, 1 << 14, "renormalize", "cuda", followers)


@pytest.mark.parametrize("shape", MORE_SHAPES, ids=str)
@pytest.mark.parametrize("selection", THRESHOLDS, ids=str)
def test_step_with_a_mass_threshold(shape: Shape, selection: Selection) -> None:
    check_decode(build_case(shape), selection, 1 << 14, "clip", "cuda")


@pytest.mark.parametrize("num_slots", [0, 3])
@pytest.mark.parametrize("shape", MORE_SHAPES, ids=str)
def test_step_without_room_in_the_cache(shape: Shape, num_slots: int) -> None:
    check_decode(build_case(shape), SELECTIONS[0], num_slots, "renormalize", "cuda")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_copies(shape: Shape) -> None:
    check_prefill_copies(shape, "cuda")


def test_a_launch_that_fails_leaves_nothing_behind() -> None:
    check_failed_launch("cuda")


def a_layer(case: Case, selection: Selection, num_slots: int) -> Layer:
    tail = "renormalize" if selection.clip is None else "clip"
    return layer_of(case, selection, tail, num_slots, "cuda")


def attended(layer: Layer, followers: Followers | None = None) -> torch.Tensor:
    out = torch.full_like(layer.batch.query, torch.nan)
    return decode_step(layer.view, layer.workspace, layer.batch, out, followers=followers)


def with_fresh_cache(layer: Layer, num_slots: int) -> Layer:
    """The same layer, with nothing resident and a workspace of its own."""
    view = layer.view
    rows = layer.cache.rows_per_layer
    cache = HotCache.make(num_slots, 2, rows, view.shape.row.bytes, "cuda")
    workspace = DecodeWorkspace.make(
        view.shape, view.selection, layer.workspace.max_requests, layer.workspace.max_blocks, "cuda"
    )
    return replace(layer.with_cache(cache), workspace=workspace)


@pytest.mark.parametrize("followers", FOLLOWERS, ids=str)
@pytest.mark.parametrize(
    "selection",
    [Selection(None, 0.8, 1, 8, "sum"), Selection(None, None, 1, 8, "max", 0.01)],
    ids=["coverage", "threshold"],
)
def test_followers_and_graph_replay_agree(
    followers: Followers | None, selection: Selection
) -> None:
    """A captured step, replayed on changed lengths, equals an eager one without followers."""
    layer = a_layer(build_case(MORE_SHAPES[6]), selection, 256)
    out = torch.empty_like(layer.batch.query)

    def step() -> None:
        decode_step(layer.view, layer.workspace, layer.batch, out, followers=followers)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    plain = with_fresh_cache(layer, 1 << 14)
    for shorter in (0, 1, 13, 500, 999, 1000):
        layer.batch.seq_lens[1] = 1000 - shorter
        out.fill_(float("nan"))
        graph.replay()
        assert_close(out, attended(plain))
        assert not layer.workspace.signals.any()


@pytest.mark.parametrize("followers", FOLLOWERS, ids=str)
@pytest.mark.parametrize("selection", [*SELECTIONS[:2], *THRESHOLDS[:1]], ids=str)
def test_dependent_launches_wait_for_what_they_read(
    followers: Followers | None, selection: Selection
) -> None:
    """Captured as in the engine: a step right after the write of the tokens that it needs.

    Until the write, K of these tokens is not a number.
    """
    torch.manual_seed(0)
    shape = Shape((1000, 37, 1, 513, 16), 8, 4, 128, 16, 8)
    case = build_case(shape)
    case.k_pages.nan_to_num_()
    case.v_pool.nan_to_num_()
    layer = a_layer(case, selection, 1 << 12)
    batch, pages = layer.batch, layer.view.k_pages
    last = batch.seq_lens.long() - 1
    its_page = batch.block_table.gather(1, (last // shape.page_tokens)[:, None])[:, 0].long()
    slots = its_page * shape.page_tokens + last % shape.page_tokens
    in_page = last % shape.page_tokens
    # Of the host's memory, so that the write takes its time: who does not wait comes too early.
    key = torch.randn(len(slots), shape.num_kv_heads, shape.head_size, pin_memory=True)
    value = torch.randn_like(key, device="cuda")
    unwritten = torch.full_like(value, float("nan"))
    dependent = layer.workspace.dependent
    assert dependent == (torch.cuda.get_device_capability() >= (9, 0))
    out = torch.empty((8, *batch.query.shape), device="cuda")

    def steps() -> None:
        for step in range(len(out)):
            pages[its_page, :, in_page] = unwritten
            write_kv(layer.view, key, value, slots, allocate_tokens=len(slots), dependent=dependent)
            decode_step(
                layer.view, layer.workspace, batch, out[step], after_write=True,
                followers=followers,
            )  # fmt: skip

    steps()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    for _ in range(20):
        key.normal_()
        value.normal_()
        batch.query.normal_()
        out.fill_(float("nan"))
        graph.replay()
        plain = with_fresh_cache(layer, 1 << 12)
        plain = replace(plain, workspace=replace(plain.workspace, dependent=False))
        expected = attended(plain)
        for step in out:
            assert_close(step, expected)


def test_more_follow_where_more_is_missing() -> None:
    """All of them where fetching takes as long as scoring, few where nothing is missing, and all
    again when it is: demand falls and rises."""
    selection, followers = Selection(64, None, 1, 8, "sum"), Followers(40, 4)
    layer = a_layer(build_case(MORE_SHAPES[6]), selection, 1 << 16)
    expected = attended(with_fresh_cache(layer, 1 << 16))
    wanted = []
    for flush in (False, False, True, False):
        if flush:
            layer.cache.flush()
        assert_close(attended(layer, followers), expected)
        wanted.append(int(layer.cache.state[WANTED]))
    most = min(40, layer.batch.num_requests * layer.view.shape.num_kv_heads)
    assert wanted == [most, 4, most, 4]


def test_followers_that_cannot_run_beside_scoring_give_up() -> None:
    """Scoring never comes: they end by themselves, and what follows does all the work (D5)."""
    layer = a_layer(build_case(MORE_SHAPES[6]), SELECTIONS[2], 1 << 14)
    expected = attended(with_fresh_cache(layer, 1 << 14))
    sound = decode.score_blocks

    def silent(*arguments: object, **named: object) -> int:
        """Scores, and tells nobody."""
        return sound(*arguments, **{**named, "signal": False})

    decode.score_blocks = silent  # type: ignore[assignment]
    try:
        out = attended(layer, Followers(64, 64))
        torch.cuda.synchronize()
    finally:
        decode.score_blocks = sound
    assert_close(out, expected)
    state = layer.cache.state.tolist()
    assert state[REST_UNTIL] > state[EPOCH]
    # They rest from then on; answers stay right, and lists are counted once each.
    assert_close(attended(layer, Followers(64, 64)), expected)
    lists = sum(map(bool, MORE_SHAPES[6].seq_lens)) * layer.view.shape.num_kv_heads
    assert layer.cache.read_counters().lists == 2 * lists


# Where each specialisation of a kernel that serves is broken in turn.
BROKEN = {
    "write": ("write_kv", self_check, lambda named: named.get("dependent", False), 2),
    "behind a write": ("score_blocks", decode, lambda named: named["after_write"], None),
    "behind other work": ("score_blocks", decode, lambda named: not named["after_write"], None),
    "followed": ("score_blocks", decode, lambda named: named.get("signal", False), None),
    "captured": (
        "score_blocks", decode, lambda named: torch.cuda.is_current_stream_capturing(), None
    ),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_the_check_at_start_runs_what_serves(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = CacheShape(1, 8, 2, 128, 16, 8, torch.bfloat16)
    layer = (shape, Selection(None, None, 1, 32, "max", 0.002), "clip")
    name, module, condition, place = BROKEN[broken]
    fault = (
        with_argument(place, lambda value: 2 * value)
        if place is not None
        else with_argument(1, lambda batch: replace(batch, scale=1.1 * batch.scale))
    )
    self_check.check_kernels(*layer, "cuda")
    monkeypatch.setattr(module, name, when(condition, fault)(getattr(module, name)))
    with pytest.raises(self_check.KernelError):
        self_check.check_kernels(*layer, "cuda")


@pytest.mark.parametrize("followers", [None, Followers(5, 5)], ids=str)
@pytest.mark.parametrize("update", [True, False], ids=["coherent", "update-taken-out"])
def test_reused_pages_never_serve_stale_v(update: bool, followers: Followers | None) -> None:
    """Random writes over few pages with a small cache: copies follow every write.

    With the cache's write update taken out the same rounds must go wrong, or the test is blind.
    """
    torch.manual_seed(0)
    shape = Shape((120, 64, 90, 33), 4, 2, 64, 16, 8)
    case = build_case(shape)
    num_slots = case.v_pool.shape[0] * shape.page_tokens
    case.k_pages.nan_to_num_()
    case.v_pool.nan_to_num_()
    layer = a_layer(case, Selection(6, None, 1, 8, "sum"), 48)
    parts = WriteParts.ALL if update else WriteParts.K | WriteParts.ROW_HOST
    stale = 0
    for round_number in range(60):
        slots = torch.randperm(num_slots, device="cuda")[: 1 + round_number % 23]
        key = torch.randn(len(slots), shape.num_kv_heads, shape.head_size, device="cuda")
        # No slot is allocated: these tokens lie in the midst of V blocks, they do not begin them.
        write_kv(layer.view, key, torch.randn_like(key), slots, parts=parts)
        layer.batch.query.normal_()
        got = attended(layer, followers)
        expected = attended(with_fresh_cache(layer, 1 << 12))
        stale += int(not torch.allclose(got, expected, rtol=1e-4, atol=1e-5))
    assert (stale == 0) == update, f"{stale} rounds of 60 attended to stale V"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", MORE_SHAPES[3:], ids=str)
def test_half_precision(shape: Shape, dtype: torch.dtype) -> None:
    """Everything selected: the choice cannot differ, so the output is compared."""
    check_decode(build_case(shape, dtype=dtype), SELECTIONS[0], 1 << 14, "renormalize", "cuda")


@pytest.mark.parametrize("followers", [None, Followers(48, 32)], ids=str)
def test_lists_longer_than_a_segment(followers: Followers | None) -> None:
    """70,000 tokens and a million: selected piece by piece, as short ones are."""
    shape = CacheShape(2, 4, 1, 64, 16, 8, torch.bfloat16)
    lengths = torch.tensor([70_001, 1_000_003], dtype=torch.int32, device="cuda")
    pages = [-(-int(length) // 16) for length in lengths]
    table = torch.zeros((2, max(pages)), dtype=torch.int32, device="cuda")
    order = torch.randperm(sum(pages), device="cuda").int()
    table[0, : pages[0]], table[1, : pages[1]] = order[: pages[0]], order[pages[0] :]
    k_pages = torch.randn((sum(pages), 1, 16, 64), device="cuda").bfloat16()
    v_pool = torch.randn(k_pages.shape).bfloat16().pin_memory()
    rule = Selection(None, None, 1, 32, "max", 0.0005)
    cache = HotCache.make(1 << 16, 2, sum(pages) * 2, shape.row.bytes, "cuda")
    view = LayerView(1, shape, rule, "clip", k_pages, host_rows(v_pool, shape), cache)
    view = replace(view, packed=packed_view(view))
    query = 6 * torch.randn((2, 4, 64), device="cuda").bfloat16()
    max_blocks = shape.max_blocks(1 << 20)
    batch = DecodeBatch(query, table, lengths, 64**-0.5, max_blocks)
    workspace = DecodeWorkspace.make(shape, rule, 2, max_blocks, "cuda")
    out = torch.full_like(query, torch.nan)
    decode_step(view, workspace, batch, out, followers=followers)
    selected = workspace.views(view, batch).selected
    for row in range(2):
        flat = k_pages[table[row, : pages[row]].long(), 0].flatten(0, 1)[: int(lengths[row])]
        values = v_pool.cuda()[table[row, : pages[row]].long(), 0].flatten(0, 1)
        weights = (query[row].float() @ flat.float().T * 64**-0.5).softmax(-1)
        masses = torch.nn.functional.pad(weights, (0, -weights.shape[1] % 8)).unflatten(1, (-1, 8))
        combined = masses.sum(-1).amax(0)
        kept = selected.blocks[row, 0, : int(selected.counts[row, 0])].long()
        assert kept.diff().gt(0).all()
        expected = (combined >= 0.0005).nonzero()[:, 0]
        near = (combined - 0.0005).abs() < 1e-5
        forced = {0, *range((int(lengths[row]) - 32) // 8, combined.shape[0])}
        wrong = set(kept.tolist()) ^ (set(expected.tolist()) | forced)
        assert all(near[block] for block in wrong), sorted(wrong)
        assert len(expected) > 20
        tokens = (kept[:, None] * 8 + torch.arange(8, device="cuda")).flatten()
        tokens = tokens[tokens < int(lengths[row])]
        p = weights[:, tokens]
        dropped, flat_p = 1 - p.sum(-1, keepdim=True), p.clamp_max(rule.clip)
        p = p + dropped * flat_p / flat_p.sum(-1, keepdim=True)
        assert_close(out[row], (p @ values[tokens].float()).bfloat16())


def test_pools_beyond_two_gibi_elements() -> None:
    """Offsets past 2^31 elements, in K pages and in the host pool."""
    num_pages, heads = 70_000, 16
    shape = CacheShape(1, heads, heads, 128, 16, 8, torch.bfloat16)
    k_pages = torch.zeros((num_pages, heads, 16, 128), dtype=torch.bfloat16, device="cuda")
    v_pool = torch.empty(k_pages.shape, dtype=torch.bfloat16, pin_memory=True)
    assert v_pool.numel() > 2**31
    table = torch.tensor([[num_pages - 1, 3, num_pages - 2]], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([40], dtype=torch.int32, device="cuda")
    for number, page in enumerate((num_pages - 1, 3, num_pages - 2)):
        v_pool[page] = number + 1
    query = torch.randn(1, heads, 128, dtype=torch.bfloat16, device="cuda")
    rule = Selection(None, None, 1, 8, "sum")
    cache = HotCache.make(4096, 1, num_pages * heads * 2, shape.row.bytes, "cuda")
    view = LayerView(0, shape, rule, "renormalize", k_pages, host_rows(v_pool, shape), cache)
    view = replace(view, packed=packed_view(view))
    workspace = DecodeWorkspace.make(shape, rule, 1, 5, "cuda")
    out = torch.full_like(query, float("nan"))
    decode_step(view, workspace, DecodeBatch(query, table, lengths, 1.0, 5), out)
    # All keys are zero, so every token has the same weight: 16 ones, 16 twos, 8 threes.
    expected = torch.full_like(out, (16 * 1 + 16 * 2 + 8 * 3) / 40)
    assert_close(out, expected)
