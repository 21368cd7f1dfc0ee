# SPDX-License-Identifier: Apache-2.0
"""What must hold of every selection, whatever the scores are."""

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reference import brute_force
from vllm_kcache.reference.select import block_masses, select_blocks
from vllm_kcache.types import Selected, Selection

# The covered mass is summed in float64 from float32 masses; the checks sum in another order.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Drawn:
    seq_lens: list[int]
    group_size: int
    num_kv_heads: int
    v_block_tokens: int
    block_lse: torch.Tensor
    selection: Selection

    def select(self) -> Selected:
        return select_blocks(
            self.block_lse,
            torch.tensor(self.seq_lens, dtype=torch.int32),
            self.num_kv_heads,
            self.v_block_tokens,
            self.selection,
        )

    def lists(self):
        """(length, masses [G, blocks] float64, selected blocks, count, mass) of each list."""
        selected = self.select()
        for request, tokens in enumerate(self.seq_lens):
            num_blocks = -(-tokens // self.v_block_tokens)
            exists = torch.arange(self.block_lse.shape[-1])[None] < num_blocks
            masses = block_masses(self.block_lse[request : request + 1], exists)[0].double()
            for head in range(self.num_kv_heads):
                group = masses[head * self.group_size : (head + 1) * self.group_size, :num_blocks]
                row = selected.blocks[request, head]
                count = int(selected.counts[request, head])
                yield tokens, group, row, count, float(selected.mass[request, head])


COVERAGE = st.floats(0.01, 1.0)
ANY_COVERAGE = st.none() | COVERAGE
EITHER = st.booleans()
NO_THRESHOLD = st.none()
THRESHOLD = st.floats(1e-4, 1.0)


@st.composite
def drawn(draw, coverage=ANY_COVERAGE, capped=EITHER, threshold=NO_THRESHOLD) -> Drawn:
    v_block_tokens = draw(st.sampled_from([1, 4, 8, 16, 32]))
    group_size = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    num_kv_heads = draw(st.integers(1, 3))
    seq_lens = draw(st.lists(st.integers(0, 40 * v_block_tokens), min_size=1, max_size=3))
    rule = Selection(
        None,
        draw(coverage),
        draw(st.integers(0, 3)),
        draw(st.integers(1, 3 * v_block_tokens)),
        draw(st.sampled_from(["sum", "max"])),
        draw(threshold),
        draw(st.one_of(st.none(), st.integers(1, 40 * v_block_tokens))),
    )
    if draw(capped):
        top_n = rule.most_forced_blocks(v_block_tokens) + draw(st.integers(0, 20))
        rule = Selection(top_n, *list(vars(rule).values())[1:])
    num_blocks = max(1, -(-max(seq_lens) // v_block_tokens))
    # Few distinct values make ties; a wide spread makes blocks whose mass is 0 in float32.
    steps, spread = draw(st.sampled_from([2, 5, 1000])), draw(st.sampled_from([1.0, 8.0, 200.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = (len(seq_lens), num_kv_heads * group_size, num_blocks)
    levels = torch.randint(steps, size, generator=generator)
    block_lse = spread * (levels / steps - 0.5)
    for request, tokens in enumerate(seq_lens):
        block_lse[request, :, -(-tokens // v_block_tokens) :] = -torch.inf
    return Drawn(seq_lens, group_size, num_kv_heads, v_block_tokens, block_lse, rule)


@given(drawn())
def test_lists_are_ascending_without_repeats_and_padded(case):
    for tokens, _, row, count, _ in case.lists():
        kept, padding = row[:count], row[count:]
        assert bool((kept[1:] > kept[:-1]).all())
        assert bool((padding == -1).all())
        assert not count or 0 <= int(kept[0]) <= int(kept[-1]) < -(-tokens // case.v_block_tokens)


@given(drawn())
def test_sink_and_recent_are_always_in(case):
    for tokens, _, row, _, _ in case.lists():
        forced = brute_force.forced(tokens, case.v_block_tokens, case.selection)
        assert forced <= set(row.tolist())


@given(drawn(capped=st.just(True)))
def test_top_n_is_never_passed(case):
    for _, _, _, count, _ in case.lists():
        assert count <= case.selection.top_n


@given(drawn(coverage=st.none(), capped=st.just(True)))
def test_fixed_mode_fills_its_n(case):
    for tokens, _, _, count, _ in case.lists():
        assert count == min(case.selection.top_n, -(-tokens // case.v_block_tokens))


@given(drawn(coverage=st.none(), capped=st.just(False)))
def test_without_cap_and_coverage_everything_is_selected(case):
    for tokens, _, row, count, mass in case.lists():
        assert row[:count].tolist() == list(range(-(-tokens // case.v_block_tokens)))
        assert mass == 1.0


@given(drawn(coverage=COVERAGE))
def test_coverage_is_met_unless_capped_and_the_mass_is_true(case):
    rule = case.selection
    for tokens, masses, row, count, mass in case.lists():
        if not tokens:
            assert (count, mass) == (0, 1.0)
            continue
        covered = brute_force.covered_mass(masses, row[:count].tolist(), rule.combine)
        assert abs(min(covered, 1.0) - mass) <= ROUNDING
        everything = count == -(-tokens // case.v_block_tokens)
        assert everything or count == rule.top_n or covered >= rule.coverage - ROUNDING


@given(drawn(coverage=COVERAGE))
def test_no_block_more_than_coverage_needs(case):
    rule = case.selection
    for tokens, masses, row, count, _ in case.lists():
        kept = row[:count].tolist()
        free = set(kept) - brute_force.forced(tokens, case.v_block_tokens, rule)
        if not free:
            continue
        # The last in rank: of least mass, and the higher block in a tie.
        combined = masses.mean(0) if rule.combine == "sum" else masses.amax(0)
        last = max(free, key=lambda block: (-combined[block], block))
        kept.remove(last)
        assert brute_force.covered_mass(masses, kept, rule.combine) < rule.coverage + ROUNDING


@given(drawn())
def test_no_block_left_out_ranks_before_one_kept(case):
    rule = case.selection
    for tokens, masses, row, count, _ in case.lists():
        kept = set(row[:count].tolist())
        free = kept - brute_force.forced(tokens, case.v_block_tokens, rule)
        left_out = set(range(masses.shape[1])) - kept
        if not free or not left_out:
            continue
        # In the float32 of the implementation, so that ties are ties.
        combined = masses.float().mean(0) if rule.combine == "sum" else masses.amax(0)
        worst_kept = max((-float(combined[block]), block) for block in free)
        best_left_out = min((-float(combined[block]), block) for block in left_out)
        assert worst_kept < best_left_out


@given(drawn(coverage=st.none(), threshold=THRESHOLD))
def test_threshold_keeps_what_is_heavy_and_nothing_else_but_what_is_forced(case):
    rule = case.selection
    for tokens, masses, row, count, _ in case.lists():
        kept = set(row[:count].tolist())
        combined = masses.float().mean(0) if rule.combine == "sum" else masses.float().amax(0)
        (least,) = rule.mass_threshold * rule.threshold_share(torch.tensor([tokens]))
        heavy = {block for block, mass in enumerate(combined) if mass >= least}
        wanted = heavy | brute_force.forced(tokens, case.v_block_tokens, rule)
        if rule.top_n is None or len(wanted) <= rule.top_n:
            assert kept == wanted
        else:
            assert count == rule.top_n
            assert kept < wanted
