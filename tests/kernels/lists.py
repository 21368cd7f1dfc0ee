# SPDX-License-Identifier: Apache-2.0
"""Lists of V blocks, selected and fetched, against their definition: on a GPU or emulated."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.checks import on
from tests.reference import brute_force
from tests.shapes import ODD_SHAPES, Case, build_case
from vllm_kcache.cache.hot_cache import HotCache
from vllm_kcache.kernels.fetch import fetch_blocks
from vllm_kcache.kernels.select import launch_select, select_blocks, selection_arguments
from vllm_kcache.reference import fetch, score, select
from vllm_kcache.types import Selected, Selection

RULES = (
    Selection(6, None, 1, 3, "sum"),
    Selection(None, 0.9, 1, 3, "sum"),
    Selection(None, 0.8, 0, 9, "max"),
    Selection(12, 0.95, 2, 3, "max"),
    Selection(None, None, 1, 3, "sum"),
    # What is forced covers more than is asked for.
    Selection(None, 0.05, 2, 40, "sum"),
)
# For long requests: a fixed number, a coverage, both.
LONG_RULES = (
    Selection(500, None, 1, 32, "sum"),
    Selection(300, None, 1, 32, "max"),
    Selection(None, 0.9, 1, 32, "max"),
    Selection(None, 0.9, 0, 32, "sum"),
    Selection(600, 0.95, 1, 32, "max"),
)
# Of scores in long requests.
KINDS = ("random", "all equal", "ties", "one block has all", "tiny")


def scored(case: Case) -> torch.Tensor:
    """block_lse of the definition, on the host."""
    return score.score_blocks(
        case.query, case.k_pages, case.block_table, case.seq_lens, case.scale,
        case.shape.v_block_tokens, case.shape.max_blocks,
    )  # fmt: skip


def chosen(case: Case, rule: Selection = RULES[1]) -> Selected:
    """Lists of the definition, on the host."""
    shape = case.shape
    return select.select_blocks(
        scored(case), case.seq_lens, shape.num_kv_heads, shape.v_block_tokens, rule
    )


def assert_selects(
    selected: Selected, block_lse: torch.Tensor, case_lens: list[int], tokens: int, rule: Selection
) -> None:
    """The lists keep the rule, whichever of two blocks of (nearly) equal mass is in them.

    Nearly: masses are summed in units of 2^-30 and computed in float32.
    """
    near = 2e-6
    blocks, counts, mass = selected.blocks.cpu(), selected.counts.cpu(), selected.mass.cpu()
    num_kv_heads = counts.shape[1]
    for row, seq_len in enumerate(case_lens):
        num_blocks = -(-seq_len // tokens)
        lse = block_lse[row, :, :num_blocks].double().cpu().unflatten(0, (num_kv_heads, -1))
        for head in range(num_kv_heads):
            listed = blocks[row, head].tolist()
            count = int(counts[row, head])
            kept = listed[:count]
            assert listed[count:] == [-1] * (len(listed) - count)
            assert kept == sorted(set(kept))
            if not seq_len:
                assert (count, float(mass[row, head])) == (0, 1.0)
                continue
            assert kept[0] >= 0
            assert kept[-1] < num_blocks
            masses = lse[head].softmax(-1)
            forced = brute_force.forced(seq_len, tokens, rule)
            assert forced <= set(kept)
            most = num_blocks if rule.top_n is None else min(rule.top_n, num_blocks)
            assert count <= most
            combined = masses.mean(0) if rule.combine == "sum" else masses.amax(0)
            others = torch.ones(num_blocks, dtype=torch.bool)
            others[kept] = False
            # Of equal masses the higher block is the last.
            ranked = sorted(set(kept) - forced, key=lambda block: (float(combined[block]), -block))
            if ranked and others.any():
                assert combined[ranked[0]] >= combined[others].max() - near
            covered = brute_force.covered_mass(masses, kept, rule.combine)
            assert abs(float(mass[row, head]) - covered) < 1e-5
            if rule.coverage is None:
                assert count == most
                continue
            assert covered >= rule.coverage - near or count == most
            if ranked:
                fewer = [block for block in kept if block != ranked[0]]
                less = brute_force.covered_mass(masses, fewer, rule.combine)
                assert less < rule.coverage + near


def check_select_shapes(rule: Selection, device: str) -> None:
    """Every odd shape that has room for what the rule forces in; outputs are poisoned."""
    for shape in ODD_SHAPES:
        if rule.top_n is not None and rule.top_n < rule.most_forced_blocks(shape.v_block_tokens):
            continue
        block_lse = scored(build_case(shape, sharpness=4.0))
        columns = shape.max_blocks if rule.top_n is None else min(rule.top_n, shape.max_blocks)
        lists = (len(shape.seq_lens), shape.num_kv_heads)
        out = Selected(
            torch.full((*lists, columns), -99, dtype=torch.int32, device=device),
            torch.full(lists, -99, dtype=torch.int32, device=device),
            torch.full(lists, torch.nan, device=device),
        )
        lengths = torch.tensor(shape.seq_lens, dtype=torch.int32, device=device)
        launch_select(block_lse.to(device), lengths, shape.v_block_tokens, rule, out)
        assert_selects(out, block_lse, list(shape.seq_lens), shape.v_block_tokens, rule)


def check_select_long(kind: str, num_tokens: int, device: str) -> None:
    """Two long requests in V blocks of 8, with many equal masses: the lower block wins."""
    lens = [num_tokens, num_tokens - 73]
    num_blocks = num_tokens // 8
    block_lse = torch.randn(2, 4, num_blocks)
    if kind == "all equal":
        block_lse.zero_()
    elif kind == "ties":
        block_lse = (2 * block_lse).round()
    elif kind == "one block has all":
        block_lse[..., 777] = 1e4
    elif kind == "tiny":
        block_lse *= 20
    lengths = torch.tensor(lens, dtype=torch.int32, device=device)
    for rule in LONG_RULES:
        selected = select_blocks(block_lse.to(device), lengths, 2, 8, rule)
        assert_selects(selected, block_lse, lens, 8, rule)
        if kind == "all equal":
            count = int(selected.counts[0, 0])
            recent = set(range(num_blocks - 4, num_blocks))
            expected = sorted(recent | set(range(count - len(recent))))
            assert selected.blocks[0, 0, :count].tolist() == expected


def check_select_equal(num_equal: int, group: int, device: str) -> None:
    """As many equal masses, more than are kept, and one forced block: the lower blocks win."""
    num_blocks = num_equal + 1
    lengths = torch.tensor([num_blocks * 8], dtype=torch.int32, device=device)
    block_lse = torch.zeros((1, group, num_blocks), device=device)
    for rule in (
        Selection(300, None, 0, 1, "sum"),
        Selection(300, None, 0, 1, "max"),
        Selection(None, 0.5, 0, 1, "max"),
        Selection(400, 0.95, 0, 1, "sum"),
    ):
        selected = select_blocks(block_lse, lengths, 1, 8, rule)
        count = int(selected.counts)
        half = -(-num_blocks // 2)
        assert count == (rule.top_n or pytest.approx(half, abs=1))
        expected = [*range(count - 1), num_equal]
        assert selected.blocks[0, 0, :count].tolist() == expected


def check_errors(device: str) -> None:
    """The extension names the tensor that does not fit."""
    lengths = torch.ones(2, dtype=torch.int32, device=device)
    out = Selected(
        torch.empty((2, 2, 8), dtype=torch.int32, device=device),
        torch.empty((2, 2), dtype=torch.int32, device=device),
        torch.empty((2, 2), device=device),
    )
    for width, its_lengths, text in (
        (8, lengths.long(), "seq_lens: has the wrong dtype"),
        (9, lengths, "blocks: has N=8 columns; must have at least 9"),
    ):
        with pytest.raises(RuntimeError, match=text):
            launch_select(torch.zeros((2, 4, width), device=device), its_lengths, 8, RULES[1], out)
    scores = torch.zeros((2, 4, 8), device=device)
    with pytest.raises(RuntimeError, match="top_n=0: must be at least 1, or -1 for no cap"):
        torch.ops.kcache.select_blocks(
            scores, lengths, 8, 0, *selection_arguments(RULES[0])[1:], 0, 2, out.blocks, out.counts,
            out.mass, None, None, None, 0,
        )  # fmt: skip


def make_hot_cache(case: Case, num_slots: int, device: str) -> HotCache:
    """An empty cache of two layers over the case's pool."""
    shape = case.shape
    rows = case.v_pool[..., 0].numel() // shape.v_block_tokens
    return HotCache.make(
        num_slots, 2, rows, shape.v_block_tokens, shape.head_size, case.query.dtype, device
    )


def check_fetch(case: Case, num_slots: int | None, device: str) -> None:
    """Twice over one hot cache, or without: every listed block is found, with its bytes."""
    shape, there = case.shape, on(case, device)
    tokens = shape.v_block_tokens
    listed = chosen(case)
    selected = Selected(listed.blocks.to(device), listed.counts.to(device), listed.mass.to(device))
    cache = None if num_slots is None else make_hot_cache(case, num_slots, device)
    for _ in range(2):
        fetched = fetch_blocks(selected, there.block_table, there.v_pool, tokens, cache, 1)
        assert_fetched(fetched.rows.cpu(), fetched.v_rows.cpu(), listed, case)
    if cache is None:
        assert (fetched.rows.cpu()[listed.blocks >= 0] >= 0).all()
    elif num_slots == 4096:
        counted = cache.read_counters()
        assert counted.hits == counted.misses == int(listed.counts.sum())


def assert_fetched(rows: torch.Tensor, v_rows: torch.Tensor, listed: Selected, case: Case) -> None:
    """Rows on the host, wherever they point, hold what the definition fetches."""
    tokens = case.shape.v_block_tokens
    expected = fetch.fetch_blocks(listed, case.block_table, case.v_pool, tokens)
    host_rows = case.v_pool.view(-1, tokens, case.shape.head_size)
    wanted = listed.blocks >= 0
    assert ((rows == -1) == ~wanted).all()
    for row, reference_row in zip(rows[wanted], expected.rows[wanted], strict=True):
        got = v_rows[row] if row >= 0 else host_rows[-2 - row]
        assert torch.equal(got.view(torch.uint8), expected.v_rows[reference_row].view(torch.uint8))
