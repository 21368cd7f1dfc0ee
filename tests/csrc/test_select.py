# SPDX-License-Identifier: Apache-2.0
"""csrc/select.cu against its definition, without a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.checks import THRESHOLDS, check_select
from tests.kernels.lists import KINDS, RULES, check_select_long, check_select_shapes
from vllm_kcache.kernels.select import launch_select
from vllm_kcache.types import Selected, Selection

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_odd_shapes(rule: Selection) -> None:
    check_select_shapes(rule, "cpu")


@pytest.mark.parametrize("rule", THRESHOLDS, ids=str)
def test_thresholds(rule: Selection) -> None:
    check_select(rule)


@pytest.mark.parametrize("kind", KINDS)
def test_long_requests(kind: str) -> None:
    """More V blocks than threads, and than shared memory holds without leave."""
    check_select_long(kind, 131072, "cpu")


@pytest.mark.parametrize("group", [1, 2, 4, 5, 16])
@pytest.mark.parametrize("num_blocks", [1, 511, 513, 4099])
def test_lists_longer_than_the_threads(num_blocks: int, group: int) -> None:
    """The default's rule with every number of query heads that a thread takes at once, and not."""
    torch.manual_seed(num_blocks + group)
    block_lse = 3 * torch.randn(1, group, num_blocks)
    lengths = torch.tensor([8 * num_blocks - 3], dtype=torch.int32)
    rule = Selection(None, None, 1, 8, "max", 0.002)
    out = Selected(
        torch.full((1, 1, num_blocks), -99, dtype=torch.int32),
        torch.full((1, 1), -99, dtype=torch.int32),
        torch.full((1, 1), torch.nan),
        torch.full((1, group), torch.nan),
    )
    launch_select(block_lse, lengths, 8, rule, out)
    masses = block_lse[0].double().softmax(-1)
    count = int(out.counts)
    kept = out.blocks[0, 0, :count].tolist()
    forced = {0, num_blocks - 1, max(0, num_blocks - 2)} if num_blocks > 1 else {0}
    near = masses.amax(0).sub(0.002).abs() < 1e-7
    expected = forced | set((masses.amax(0) >= 0.002).nonzero().flatten().tolist())
    assert set(kept) ^ expected <= set(near.nonzero().flatten().tolist())
    assert kept == sorted(kept)
    assert abs(float(out.mass) - float(masses[:, kept].sum(-1).min())) < 1e-5
    assert out.lse is not None
    torch.testing.assert_close(out.lse[0], block_lse[0].logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_errors_name_what_is_wrong() -> None:
    block_lse = torch.zeros((2, 4, 8))
    lengths = torch.ones(2, dtype=torch.int64)
    out = Selected(
        torch.empty((2, 2, 8), dtype=torch.int32),
        torch.empty((2, 2), dtype=torch.int32),
        torch.empty((2, 2)),
    )
    with pytest.raises(RuntimeError, match="seq_lens: has the wrong dtype"):
        launch_select(block_lse, lengths, 8, RULES[1], out)
    with pytest.raises(RuntimeError, match=r"blocks: has N=8 columns; must have at least 9"):
        launch_select(torch.zeros((2, 4, 9)), lengths.int(), 8, RULES[1], out)
