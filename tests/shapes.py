# SPDX-License-Identifier: Apache-2.0
"""Random paged caches of odd shapes, with poison wherever a step must not look."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# In the columns of a block table past a row's length: no page has such an id.
STALE_PAGE_IDS = (2**30, -7)
SPARE_PAGES = 3
SPARE_COLUMNS = 2


@dataclass(frozen=True)
class Shape:
    """Sizes of one decode batch; the words are those of docs/design.md."""

    seq_lens: tuple[int, ...]
    num_kv_heads: int
    group_size: int
    head_size: int
    page_tokens: int
    v_block_tokens: int

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group_size

    @property
    def max_blocks(self) -> int:
        """P: logical V blocks of the longest request; at least 1, so that an empty row has one."""
        return max(1, -(-max(self.seq_lens, default=1) // self.v_block_tokens))

    def __str__(self) -> str:
        lens = "_".join(map(str, self.seq_lens)) or "none"
        return (
            f"len{lens}-kv{self.num_kv_heads}x{self.group_size}-D{self.head_size}"
            f"-S{self.page_tokens}-T{self.v_block_tokens}"
        )


# Partial last pages and blocks, length 1, whole pages, a padded row, an empty batch; MHA and GQA.
ODD_SHAPES = (
    Shape((1,), 1, 1, 64, 16, 4),
    Shape((17, 1, 48), 2, 1, 64, 16, 16),
    Shape((33, 0, 100), 3, 3, 64, 32, 8),
    Shape((300, 129), 3, 3, 64, 128, 16),
    Shape((65, 31, 32, 7), 2, 2, 80, 32, 1),
    Shape((130, 64), 1, 4, 96, 32, 32),
    Shape((257, 5), 2, 8, 128, 16, 8),
    Shape((128, 200, 0), 1, 16, 128, 128, 8),
    Shape((77, 16), 2, 4, 256, 16, 4),
    Shape((0, 0), 2, 2, 64, 16, 8),
    Shape((), 2, 2, 64, 16, 8),
)


@dataclass(frozen=True)
class Case:
    """One decode batch: the arguments of the steps, and the same K and V without pages.

    `keys[b]` and `values[b]` are [seq_len, Hkv, D], model dtype, host: what the pages hold.
    `v_pool` lies on the host, everything else that a step takes on `device`.
    """

    shape: Shape
    query: torch.Tensor
    k_pages: torch.Tensor
    v_pool: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    scale: float
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]


def build_case(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    sharpness: float = 2.0,
    strided: bool = False,
) -> Case:
    """A random batch in pages of random order.

    Pages that no request owns, tokens past a request's length and its stale table columns hold
    NaN or ids of pages that do not exist.

    Args:
        sharpness: factor on the query; larger makes attention sparser.
        strided: lay K pages out with a gap after each page.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    page_counts = [-(-tokens // shape.page_tokens) for tokens in shape.seq_lens]
    num_pages = sum(page_counts) + SPARE_PAGES
    page_shape = (shape.num_kv_heads, shape.page_tokens, shape.head_size)
    k_buffer = torch.full((num_pages, 2 if strided else 1, *page_shape), torch.nan, dtype=dtype)
    k_pages = k_buffer[:, 0]
    v_pool = torch.full((num_pages, *page_shape), torch.nan, dtype=dtype)
    columns = max(page_counts, default=0) + SPARE_COLUMNS
    stale = torch.tensor(STALE_PAGE_IDS, dtype=torch.int32).repeat(columns)[:columns]
    block_table = stale.repeat(len(shape.seq_lens), 1)
    free_pages = torch.randperm(num_pages, generator=generator)
    keys, values = [], []
    for request, tokens in enumerate(shape.seq_lens):
        pages = free_pages[: page_counts[request]]
        free_pages = free_pages[page_counts[request] :]
        block_table[request, : len(pages)] = pages
        keys.append(random(tokens, shape.num_kv_heads, shape.head_size))
        values.append(random(tokens, shape.num_kv_heads, shape.head_size))
        for pool, dense in ((k_pages, keys[-1]), (v_pool, values[-1])):
            for page, chunk in zip(pages, dense.split(shape.page_tokens), strict=False):
                pool[page, :, : len(chunk)] = chunk.transpose(0, 1)
    query = sharpness * random(len(shape.seq_lens), shape.num_heads, shape.head_size)
    return Case(
        shape=shape,
        query=query.to(device),
        k_pages=k_buffer.to(device)[:, 0],
        v_pool=v_pool,
        block_table=block_table.to(device),
        seq_lens=torch.tensor(shape.seq_lens, dtype=torch.int32, device=device),
        scale=shape.head_size**-0.5,
        keys=tuple(keys),
        values=tuple(values),
    )
