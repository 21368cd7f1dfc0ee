# SPDX-License-Identifier: Apache-2.0
"""csrc/follow.cu against its definition, without a GPU: lists, rows, and the state it leaves."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import pytest
import torch

from tests.conftest import assert_close
from tests.kernels.checks import THRESHOLDS, sums_of_chunks
from tests.kernels.lists import assert_fetched, chosen, make_hot_cache, scored
from tests.shapes import ODD_SHAPES, Case, Shape, build_case
from vllm_kcache.cache.hot_cache import ENDED, EPOCH, STATE_WORDS, WANTED, HotCache
from vllm_kcache.kernels.select import selection_arguments
from vllm_kcache.types import Selected, Selection

pytestmark = pytest.mark.usefixtures("emulated")

PARTS = 3
CHUNK = 16
LONG = Shape((700, 5000, 0, 37, 900), 2, 4, 64, 16, 8)
COVERAGE = Selection(None, 0.9, 1, 8, "sum")
EVERYTHING = Selection(None, None, 1, 8, "sum")


@dataclass
class Followed:
    """A step's lists and rows, poisoned until `run` has been called."""

    case: Case
    rule: Selection
    cache: HotCache
    block_lse: torch.Tensor
    chunk: int
    chunk_lse: torch.Tensor | None
    parts_scored: torch.Tensor
    blocks: torch.Tensor
    counts: torch.Tensor
    mass: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def make(
        cls, case: Case, rule: Selection, cache: HotCache, chunk: int | None = CHUNK
    ) -> Followed:
        shape, block_lse = case.shape, scored(case)
        blocks = [-(-tokens // shape.v_block_tokens) for tokens in shape.seq_lens]
        lists = (len(shape.seq_lens), shape.num_kv_heads)
        places = (*lists, shape.max_blocks)
        return cls(
            case, rule, cache, block_lse,
            chunk or 0, sums_of_chunks(block_lse, blocks, chunk) if chunk else None,
            torch.full(lists, PARTS, dtype=torch.int32).flatten(),
            torch.full(places, -99, dtype=torch.int32), torch.full(lists, -99, dtype=torch.int32),
            torch.full(lists, torch.nan), torch.full(places, -99, dtype=torch.int32),
        )  # fmt: skip

    def run(self, most: int, least: int) -> None:
        case, cache = self.case, self.cache
        torch.ops.kcache.follow_scores(
            self.block_lse, case.seq_lens, case.shape.v_block_tokens,
            *selection_arguments(self.rule), self.blocks, self.counts, self.mass, None,
            self.chunk_lse, self.chunk, case.block_table, case.v_pool, 1, self.rows, cache.slots,
            cache.table, cache.slot_word, cache.state, cache.counters, self.parts_scored, PARTS,
            most, least,
        )  # fmt: skip

    def check(self) -> None:
        """Lists and rows are those of the definition, and every count is ready to be used again."""
        listed = chosen(self.case, self.rule)
        assert torch.equal(self.counts, listed.counts)
        listing = torch.arange(self.blocks.shape[2]) < self.counts[..., None]
        wide = Selected(self.blocks.masked_fill(~listing, -1), self.counts, self.mass)
        assert torch.equal(wide.blocks[..., : listed.blocks.shape[2]], listed.blocks)
        assert_close(self.mass, listed.mass)
        assert_fetched(self.rows.masked_fill(~listing, -1), self.cache.slots, wide, self.case)
        assert (self.parts_scored == 0).all()
        assert (self.cache.state[ENDED : ENDED + 1] == 0).all()
        assert (self.cache.state[WANTED + 1 : STATE_WORDS] == 0).all()


@pytest.mark.parametrize("followers", [1, 4, 100], ids=lambda count: f"{count} followers")
@pytest.mark.parametrize(
    "rule",
    [COVERAGE, Selection(6, None, 1, 8, "sum"), EVERYTHING, *THRESHOLDS[:1], *THRESHOLDS[2:]],
    ids=str,
)
@pytest.mark.parametrize("chunk", [CHUNK, None], ids=["sums of chunks", "all scores"])
def test_lists_of_a_step(rule: Selection, followers: int, chunk: int | None) -> None:
    """Twice over one hot cache: all is missing first, and found after."""
    case = build_case(LONG, sharpness=2.0)
    cache = make_hot_cache(case, 4096, "cpu")
    for epoch in (1, 2):
        step = Followed.make(case, rule, cache, chunk)
        step.run(followers, followers)
        step.check()
        assert int(cache.state[EPOCH]) == epoch
    counted = cache.read_counters()
    assert counted.hits == counted.misses == int(step.counts.sum())


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 9, 16])
@pytest.mark.parametrize(
    ("lengths", "tokens", "chunk"),
    [((8191, 0, 300), 8, 1), ((33000, 77), 8, 32), ((4097, 4096), 4, 7), ((16 * 1024,), 32, 16)],
    ids=str,
)
def test_mass_thresholds(group: int, lengths: tuple[int, ...], tokens: int, chunk: int) -> None:
    """Each kernel of the rule, and the one for more query heads; one chunk, and over 128."""
    case = build_case(Shape(lengths, 2, group, 16, 32, tokens), sharpness=3.0)
    cache = make_hot_cache(case, 1 << 14, "cpu")
    step = Followed.make(case, Selection(None, None, 1, 9, "max", 0.004), cache, chunk)
    step.run(3, 3)
    step.check()
    assert int(step.counts.max()) > 4


@pytest.mark.parametrize("shape", [shape for shape in ODD_SHAPES if shape.seq_lens], ids=str)
def test_odd_shapes_in_a_small_cache(shape: Shape) -> None:
    """Some rows are read straight from the host, since all slots are in use."""
    case = build_case(shape)
    cache = make_hot_cache(case, 3, "cpu")
    for _ in range(2):
        step = Followed.make(case, COVERAGE, cache)
        step.run(3, 1)
        step.check()


def test_fewer_work_where_less_is_missing() -> None:
    """The last one out sets how many work in the next step, and those alone take lists."""
    case = build_case(LONG)
    cache = make_hot_cache(case, 4096, "cpu")
    wanted = []
    for _ in range(3):
        step = Followed.make(case, COVERAGE, cache)
        step.run(8, 2)
        step.check()
        wanted.append(int(cache.state[WANTED]))
    assert wanted == [8, 2, 2]


def test_a_list_waits_for_its_scores() -> None:
    """Scores come list by list while the kernel runs, the last list first."""
    case = build_case(LONG)
    step = Followed.make(case, COVERAGE, make_hot_cache(case, 4096, "cpu"))
    assert step.chunk_lse is not None
    scores, sums = step.block_lse.clone(), step.chunk_lse.clone()
    step.block_lse.fill_(torch.nan)
    step.chunk_lse.fill_(torch.nan)
    step.parts_scored.zero_()
    kernel = threading.Thread(target=step.run, args=(4, 4))
    kernel.start()
    group = case.shape.group_size
    for request in reversed(range(scores.shape[0])):
        for head in reversed(range(case.shape.num_kv_heads)):
            time.sleep(0.005)
            assert kernel.is_alive(), "the kernel did not wait"
            heads = slice(head * group, (head + 1) * group)
            step.block_lse[request, heads] = scores[request, heads]
            step.chunk_lse[request, heads] = sums[request, heads]
            for _ in range(PARTS):
                step.parts_scored[request * case.shape.num_kv_heads + head] += 1
    kernel.join(timeout=60)
    assert not kernel.is_alive()
    step.check()


@pytest.mark.parametrize(
    ("most", "least", "text"),
    [(0, 0, "most_thread_blocks=0"), (129, 1, "most_thread_blocks=129"), (4, 5, "must be 1 to 4")],
)
def test_numbers_of_followers_are_checked(most: int, least: int, text: str) -> None:
    case = build_case(ODD_SHAPES[6])
    step = Followed.make(case, COVERAGE, make_hot_cache(case, 64, "cpu"))
    with pytest.raises(RuntimeError, match=text):
        step.run(most, least)
