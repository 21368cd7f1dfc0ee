# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.shapes import ODD_SHAPES, build_case
from vllm_kcache.reference.fetch import fetch_blocks
from vllm_kcache.types import Selected


def some_blocks(shape, seed=0) -> Selected:
    """Random ascending lists of different lengths; a padded row's is empty."""
    generator = torch.Generator().manual_seed(seed)
    lists = []
    for tokens in shape.seq_lens:
        num_blocks = -(-tokens // shape.v_block_tokens)
        for _ in range(shape.num_kv_heads):
            count = int(torch.randint(1, num_blocks + 1, (), generator=generator)) if tokens else 0
            lists.append(sorted(torch.randperm(num_blocks, generator=generator)[:count].tolist()))
    width = max(map(len, lists), default=0) + 1
    rows = (len(shape.seq_lens), shape.num_kv_heads)
    padded = [blocks + [-1] * (width - len(blocks)) for blocks in lists]
    return Selected(
        torch.tensor(padded, dtype=torch.int32).view(*rows, width),
        torch.tensor([len(blocks) for blocks in lists], dtype=torch.int32).view(rows),
        torch.ones(rows),
    )


def assert_fetched(case, selected, fetched):
    """Every list entry leads to the V of its block; tokens past the length may hold anything."""
    shape = case.shape
    assert fetched.rows.dtype == torch.int32
    assert bool(((selected.blocks >= 0) == (fetched.rows >= 0)).all())
    assert bool((fetched.rows[selected.blocks < 0] == -1).all())
    for request, head, column in (selected.blocks >= 0).nonzero().tolist():
        first = int(selected.blocks[request, head, column]) * shape.v_block_tokens
        expected = case.values[request][first : first + shape.v_block_tokens, head]
        row = fetched.v_rows[int(fetched.rows[request, head, column])]
        assert torch.equal(row[: len(expected)], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_odd_shapes(shape, dtype):
    case, selected = build_case(shape, dtype), some_blocks(shape)
    fetched = fetch_blocks(selected, case.block_table, case.v_pool, shape.v_block_tokens)
    assert fetched.v_rows.dtype == dtype
    assert fetched.v_rows.shape[0] == int(selected.counts.sum())
    assert_fetched(case, selected, fetched)
