# SPDX-License-Identifier: Apache-2.0
"""What a page and a row are: the geometry of the split layers, in one place."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RowFormat:
    """The bytes of one row: V of one V block of one KV head.

    Host pool and hot cache hold rows of opaque bytes; this says what is in them.

    Attributes:
        block_tokens: T, tokens of a row.
        head_size: D, values of a token.
        dtype: of V.
    """

    block_tokens: int
    head_size: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes of a row; a multiple of 16 for every head size that is served."""
        return self.block_tokens * self.head_size * self.dtype.itemsize

    def values(self, rows: torch.Tensor) -> torch.Tensor:
        """V of rows: [R, bytes] uint8 seen as [R, T, D] in the dtype of V; the same memory."""
        return rows.view(self.dtype).view(-1, self.block_tokens, self.head_size)


@dataclass(frozen=True)
class CacheShape:
    """Geometry of the split layers of one worker, the same in all of them.

    Attributes:
        num_layers: Layers whose V is in the host pool.
        num_query_heads, num_kv_heads: Hq and Hkv of this rank.
        head_size: D.
        page_tokens: S, tokens of a K page.
        block_tokens: T, tokens of a V block; divides S.
        dtype: of K and V.
    """

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    page_tokens: int
    block_tokens: int
    dtype: torch.dtype

    @property
    def group(self) -> int:
        """G, query heads of a KV head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def row(self) -> RowFormat:
        """What a row of the host pool and of the hot cache holds."""
        return RowFormat(self.block_tokens, self.head_size, self.dtype)

    @property
    def rows_per_page(self) -> int:
        """Rows of one page of one layer."""
        return self.num_kv_heads * self.page_tokens // self.block_tokens

    @property
    def host_page_bytes(self) -> int:
        """Host bytes that one page needs, over all layers."""
        return self.num_layers * self.rows_per_page * self.row.bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of V (or of K) of one token in one layer."""
        return self.num_kv_heads * self.head_size * self.dtype.itemsize

    def max_blocks(self, tokens: int) -> int:
        """P: V blocks of a request of so many tokens."""
        return -(-tokens // self.block_tokens)
