# SPDX-License-Identifier: Apache-2.0
"""What a page and a row are: the geometry of the split layers, in one place."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch

HostDtype = Literal["model", "int8"]

# Channels of a head that a product on tensor cores takes at once: codes are padded to them.
CODE_GRANULE = 32
# Scale and zero of a token and head, float16 each.
SCALE_BYTES = 4
# A row of int8 ends on this, so that the next begins where a vector load may.
ROW_ALIGNMENT = 16


def code_channels(head_size: int) -> int:
    """Dp: channels of a head, with those that pad it."""
    return -(-head_size // CODE_GRANULE) * CODE_GRANULE


def code_bytes(head_size: int) -> int:
    """Bytes of one token and head in a page of codes."""
    return code_channels(head_size) // 2 + SCALE_BYTES


@dataclass(frozen=True)
class RowFormat:
    """The bytes of one row: one V block of one KV head, V alone or K and V.

    Host pool and hot cache hold rows of opaque bytes; this says what is in them:

    | k_bits | host_dtype | a row |
    |---|---|---|
    | 16 | "model" | V [T, D] model dtype |
    | 4 | "model" | K [T, D], V [T, D] model dtype |
    | 4 | "int8" | k' [T, D] int8, V [T, D] int8, scales of k' [T] and of V [T] float16 |

    k' is K in the form that codes are made of (reference/codes.py).

    Attributes:
        block_tokens: T, tokens of a row.
        head_size: D, values of a token.
        dtype: of the model.
        k_bits: 16 where K is in the pages, 4 where the row holds it.
        host_dtype: "int8" for quantised values.
    """

    block_tokens: int
    head_size: int
    dtype: torch.dtype
    k_bits: int = 16
    host_dtype: HostDtype = "model"

    @property
    def has_keys(self) -> bool:
        """Whether a row holds K beside V."""
        return self.k_bits != 16

    @property
    def value_dtype(self) -> torch.dtype:
        """Of the elements of K and V in a row."""
        return torch.int8 if self.host_dtype == "int8" else self.dtype

    @functools.cached_property
    def bytes(self) -> int:
        """Bytes of a row; a multiple of 16 for every head size that is served."""
        scales = 2 * self.block_tokens * torch.float16.itemsize
        used = self.values_at + self._part_bytes + (scales if self.host_dtype == "int8" else 0)
        return used if self.host_dtype == "model" else -(-used // ROW_ALIGNMENT) * ROW_ALIGNMENT

    @property
    def _part_bytes(self) -> int:
        """Bytes of V, or of K, in a row, without scales."""
        return self.block_tokens * self.head_size * self.value_dtype.itemsize

    @property
    def values_at(self) -> int:
        """Byte where V begins."""
        return self._part_bytes if self.has_keys else 0

    def keys(self, rows: torch.Tensor) -> torch.Tensor:
        """K (k' with int8) of rows: [R, bytes] uint8 seen as [R, T, D]; the same memory."""
        return self._elements(rows, 0)

    def values(self, rows: torch.Tensor) -> torch.Tensor:
        """V of rows: [R, bytes] uint8 seen as [R, T, D]; the same memory."""
        return self._elements(rows, self.values_at)

    def scales(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales of k' and of V of int8 rows: [R, T] float16 each; the same memory."""
        first = 2 * self._part_bytes
        size = self.block_tokens * torch.float16.itemsize
        keys, values = rows[:, first : first + size], rows[:, first + size : first + 2 * size]
        return keys.view(torch.float16), values.view(torch.float16)

    def _elements(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        part = rows[:, first : first + self._part_bytes].view(self.value_dtype)
        return part.unflatten(1, (self.block_tokens, self.head_size))


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
        k_bits: 16, pages hold K; 4, pages hold K codes and rows K beside V.
        host_dtype: Of rows: "model", or "int8" with k_bits 4.
    """

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    page_tokens: int
    block_tokens: int
    dtype: torch.dtype
    k_bits: int = 16
    host_dtype: HostDtype = "model"

    @property
    def group(self) -> int:
        """G, query heads of a KV head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def block_score_bytes(self) -> int:
        """Bytes that scoring reads of a V block and KV head."""
        if self.k_bits == 16:
            return self.block_tokens * self.head_size * self.dtype.itemsize
        return self.block_tokens * code_bytes(self.head_size)

    @functools.cached_property
    def row(self) -> RowFormat:
        """What a row of the host pool and of the hot cache holds."""
        return RowFormat(
            self.block_tokens, self.head_size, self.dtype, self.k_bits, self.host_dtype
        )

    @property
    def k_token_bytes(self) -> int:
        """Bytes of one token and head in a page."""
        if self.k_bits == 16:
            return self.head_size * self.dtype.itemsize
        return code_bytes(self.head_size)

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

    def score_columns(self, tokens: int) -> int:
        """P of scores on a GPU: selection loads four at once where each row begins at a multiple
        of that."""
        return -(-self.max_blocks(tokens) // 4) * 4
