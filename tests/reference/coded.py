# SPDX-License-Identifier: Apache-2.0
"""Cases with K codes and rows, and both read back byte by byte, as the design says they lie."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import torch

from tests.shapes import Case, Shape
from vllm_kcache.cache.formats import RowFormat
from vllm_kcache.reference.codes import round_query, transform_query
from vllm_kcache.reference.write import write_codes_and_rows
from vllm_kcache.types import KStats

# As float16 it is NaN, as int8 -1, as codes 15.
POISON = 0xFF
# Partial last pages and blocks, length 1, a padded row, an empty batch; MHA and GQA; all sizes of
# a head.
SHAPES = (
    Shape((17, 1, 48), 2, 1, 64, 16, 16),
    Shape((33, 0, 20), 3, 3, 64, 32, 8),
    Shape((65, 31, 7), 2, 2, 80, 32, 1),
    Shape((50, 64), 1, 4, 96, 32, 32),
    Shape((70, 5), 2, 8, 128, 16, 8),
    Shape((21, 5), 2, 4, 256, 16, 4),
    Shape((0, 0), 2, 2, 64, 16, 8),
    Shape((), 2, 2, 64, 16, 8),
)


def hadamard(head_size: int) -> torch.Tensor:
    """The rotation of a head as a matrix, from its definition: [D, D] float64."""
    block = next(n for n in (256, 128, 64, 32, 16) if head_size % n == 0)
    one = torch.tensor(
        [[(-1.0) ** bin(i & j).count("1") for j in range(block)] for i in range(block)],
        dtype=torch.float64,
    )
    return torch.block_diag(*[one / block**0.5] * (head_size // block))


def some_stats(num_kv_heads: int, head_size: int, seed: int = 3) -> KStats:
    """Means and deviations of channels that differ, and are not those of the case."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn((num_kv_heads, head_size), generator=generator)
    deviation = (torch.randn((num_kv_heads, head_size), generator=generator) / 2).exp()
    return KStats(mean, deviation)


@dataclass(frozen=True)
class Coded:
    """A case whose K and V were written as codes and rows; poison elsewhere."""

    case: Case
    row: RowFormat
    stats: KStats
    code_pages: torch.Tensor
    host_rows: torch.Tensor
    _read: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case, host_dtype: str, strided: bool = False) -> Coded:
        shape = case.shape
        row = RowFormat(shape.v_block_tokens, shape.head_size, case.query.dtype, 4, host_dtype)
        stats = some_stats(shape.num_kv_heads, shape.head_size)
        pages, heads, tokens = case.k_pages.shape[:3]
        padded = (shape.head_size + 31) // 32 * 32
        buffer = torch.full((pages, 2, heads, tokens * (padded // 2 + 4)), POISON).to(torch.uint8)
        code_pages = buffer[:, 0] if strided else buffer[:, 0].contiguous()
        rows = pages * heads * tokens // shape.v_block_tokens
        host_rows = torch.full((rows, row.bytes), POISON, dtype=torch.uint8)
        if sum(shape.seq_lens):
            keys, values = torch.cat(case.keys), torch.cat(case.values)
            write_codes_and_rows(keys, values, slots_of(case), code_pages, host_rows, row, stats)
        return cls(case, row, stats, code_pages, host_rows)

    def place(self, request: int, token: int) -> tuple[int, int]:
        """Page and offset of a token."""
        tokens = self.case.shape.page_tokens
        return int(self.case.block_table[request, token // tokens]), token % tokens

    def code(self, request: int, token: int, head: int) -> tuple[list[int], float, float]:
        """Codes of D channels, scale and zero of one token and head, from the bytes of its page."""
        shape = self.case.shape
        page, offset = self.place(request, token)
        if (page, head) not in self._read:
            self._read[page, head] = self.code_pages[page, head].tolist()
        data = self._read[page, head]
        words = (shape.head_size + 31) // 32
        width = 16 * words
        codes = [0] * (2 * width)
        for tg in range(4):
            for w in range(words):
                for j in range(4):
                    byte = data[offset * width + tg * 4 * words + w * 4 + j]
                    codes[tg * 8 * words + w * 8 + j] = byte & 15
                    codes[tg * 8 * words + w * 8 + 4 + j] = byte >> 4
        assert not any(codes[shape.head_size :])
        past = shape.page_tokens * width + 4 * offset
        scale, zero = struct.unpack("<ee", bytes(data[past : past + 4]))
        return codes[: shape.head_size], scale, zero

    def transformed(self, x: torch.Tensor, head: int) -> torch.Tensor:
        """k' of K of one KV head, [..., D] float64."""
        mean, deviation = self.stats.mean[head].double(), self.stats.deviation[head].double()
        return (x.double() - mean) / deviation @ hadamard(x.shape[-1])

    def query(self, request: int, head: int) -> tuple[torch.Tensor, float]:
        """q', [D] float64, and q . mean of one query head."""
        shape = self.case.shape
        query = self.case.query[request, head].double()
        kv_head = head // shape.group_size
        bias = float(query @ self.stats.mean[kv_head].double())
        return query * self.stats.deviation[kv_head].double() @ hadamard(shape.head_size), bias

    def estimates(self, request: int) -> torch.Tensor:
        """Estimated scores of every token: [Hq, tokens] float64.

        Of the q' that the reference rounds, which is at most half a step off: of two that differ in
        their last bit a value may go to either of two steps.
        """
        shape = self.case.shape
        transformed, _ = transform_query(self.case.query.float(), self.stats)
        rounded = round_query(transformed)[request].double()
        scores = torch.zeros((shape.num_heads, shape.seq_lens[request]), dtype=torch.float64)
        for head in range(shape.num_heads):
            kv_head = head // shape.group_size
            exact, bias = self.query(request, head)
            query, step = rounded[head], float(exact.abs().max()) / 127
            assert float((query - exact).abs().max()) <= 0.5001 * step
            for token in range(shape.seq_lens[request]):
                codes, scale, zero = self.code(request, token, kv_head)
                product = scale * float(query @ torch.tensor(codes, dtype=torch.float64))
                score = product + zero * float(query.sum()) + bias
                scores[head, token] = self.case.scale * score
        return scores

    def row_kv(self, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K (k' of int8 rows) and V of a request, from the bytes of its rows: [tokens, Hkv, D]."""
        shape, row = self.case.shape, self.row
        size = (shape.seq_lens[request], shape.num_kv_heads, shape.head_size)
        keys, values = (torch.zeros(size, dtype=torch.float64) for _ in range(2))
        for token in range(size[0]):
            page, offset = self.place(request, token)
            for head in range(size[1]):
                block, at = divmod(offset, row.block_tokens)
                blocks = shape.page_tokens // row.block_tokens
                data = self.host_rows[(page * size[1] + head) * blocks + block]
                dtype = torch.int8 if row.host_dtype == "int8" else row.dtype
                length = size[2] * dtype.itemsize
                part = row.block_tokens * length

                def read(first: int, count: int, dtype: torch.dtype, data=data) -> torch.Tensor:
                    return data[first : first + count].clone().view(dtype).double()

                keys[token, head] = read(at * length, length, dtype)
                values[token, head] = read(part + at * length, length, dtype)
                if row.host_dtype == "int8":
                    scales = 2 * part + 2 * at
                    keys[token, head] *= float(read(scales, 2, torch.float16))
                    scales += 2 * row.block_tokens
                    values[token, head] *= float(read(scales, 2, torch.float16))
        return keys, values

    def scores(self, request: int) -> torch.Tensor:
        """Scores by the K of the rows: [Hq, tokens] float64."""
        keys, _ = self.row_kv(request)
        result = []
        for head in range(self.case.shape.num_heads):
            mine = keys[:, head // self.case.shape.group_size]
            if self.row.host_dtype == "int8":
                query, bias = self.query(request, head)
                result.append(self.case.scale * (mine @ query + bias))
            else:
                result.append(self.case.scale * mine @ self.case.query[request, head].double())
        return torch.stack(result)


def slots_of(case: Case) -> torch.Tensor:
    """Slot of each token of each request, one request after the other."""
    page_tokens = case.shape.page_tokens
    slots = [
        int(case.block_table[request, token // page_tokens]) * page_tokens + token % page_tokens
        for request, tokens in enumerate(case.shape.seq_lens)
        for token in range(tokens)
    ]
    return torch.tensor(slots)
