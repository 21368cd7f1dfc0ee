# SPDX-License-Identifier: Apache-2.0
"""What a step of the reference costs, counted in elements and calls of torch, not in time."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.shapes import Case, Shape, build_case
from vllm_kcache.reference.attend import attend_blocks
from vllm_kcache.reference.fetch import fetch_blocks
from vllm_kcache.reference.full import attend_full
from vllm_kcache.reference.score import score_blocks
from vllm_kcache.reference.select import select_blocks
from vllm_kcache.reference.write import write_kv
from vllm_kcache.types import Selection


class Cost(TorchDispatchMode):
    """Counts the calls that reach torch's kernels, and the elements that they produce.

    A gather reads as many elements as it produces, and whatever a product reads was produced
    before, so elements produced stand for elements moved. Views produce nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.elements += sum(tensor.numel() for tensor in tensors)
        return result


def long_case(tokens: int) -> Case:
    return build_case(Shape((tokens,), 3, 3, 64, 128, 16))


def fixed(top_n: int | None) -> Selection:
    return Selection(top_n, None, 1, 32, "sum")


def scored(case: Case) -> torch.Tensor:
    shape = case.shape
    return score_blocks(
        case.query, case.k_pages, case.block_table, case.seq_lens, case.scale,
        shape.v_block_tokens, shape.max_blocks,
    )  # fmt: skip


def cost_of_fetch_and_attend(case: Case, top_n: int | None) -> Cost:
    lse = scored(case)
    selected = select_blocks(lse, case.seq_lens, 3, 16, fixed(top_n))
    with Cost() as cost:
        fetched = fetch_blocks(selected, case.block_table, case.v_pool, 16)
        attend_blocks(
            case.query, case.k_pages, case.v_pool, fetched, selected, case.block_table,
            case.seq_lens, case.scale, 16, "renormalize", lse,
        )  # fmt: skip
    return cost


def test_fetch_and_attend_grow_with_the_selected_blocks_not_with_the_context():
    short, long = long_case(1100), long_case(8 * 1100)
    assert (
        cost_of_fetch_and_attend(short, 32).elements == cost_of_fetch_and_attend(long, 32).elements
    )
    elements = [cost_of_fetch_and_attend(long, top_n).elements for top_n in (32, 64, 128, 256)]
    for fewer, more in itertools.pairwise(elements):
        assert 1.95 < more / fewer < 2.01
    # Four copies and the scores of each: K and V gathered, V staged, V masked in place.
    assert elements[0] < 8 * 3 * 32 * 16 * 64


def test_score_copies_each_k_once():
    case = long_case(4000)
    with Cost() as cost:
        scored(case)
    keys = 32 * case.k_pages[0].numel()
    scores = 9 * 32 * 128
    assert keys < cost.elements < keys + 8 * scores


def written(case: Case) -> None:
    key = torch.cat(case.keys)
    write_kv(key, key, torch.arange(len(key)), case.k_pages, case.v_pool)


def prefilled(case: Case) -> None:
    (tokens,) = case.shape.seq_lens
    chunk = tokens - 50
    attend_full(
        torch.randn(chunk, 9, 64), case.k_pages, case.v_pool, case.block_table,
        torch.tensor([0, chunk]), case.seq_lens, case.scale,
    )  # fmt: skip


def decoded(case: Case, selection: Selection, tail: str) -> None:
    lse = scored(case)
    selected = select_blocks(lse, case.seq_lens, 3, 16, selection)
    fetched = fetch_blocks(selected, case.block_table, case.v_pool, 16)
    attend_blocks(
        case.query, case.k_pages, case.v_pool, fetched, selected, case.block_table,
        case.seq_lens, case.scale, 16, tail, lse, case_means(case) if tail == "mean" else None,
    )  # fmt: skip


def case_means(case: Case) -> torch.Tensor:
    return torch.zeros(case.v_pool.shape[0], 3, 64)


STEPS = {
    "write": written,
    "prefill": prefilled,
    "decode-everything": lambda case: decoded(case, fixed(None), "renormalize"),
    "decode-fixed": lambda case: decoded(case, fixed(32), "drop"),
    "decode-coverage": lambda case: decoded(case, Selection(None, 0.9, 1, 32, "max"), "mean"),
}


@pytest.mark.parametrize("step", STEPS)
def test_calls_do_not_depend_on_the_number_of_tokens(step):
    calls = []
    for tokens in (1000, 4000):
        case = long_case(tokens)
        with Cost() as cost:
            STEPS[step](case)
        calls.append(cost.calls)
        assert cost.elements > tokens
    assert calls[0] == calls[1]


def test_short_requests_are_worked_on_together():
    calls = []
    for num_requests in (2, 40):
        case = build_case(Shape((100,) * num_requests, 3, 3, 64, 128, 16))
        with Cost() as cost:
            decoded(case, fixed(32), "renormalize")
        calls.append(cost.calls)
    assert calls[1] < 2 * calls[0]
