# SPDX-License-Identifier: Apache-2.0
"""A layer with K codes as the kernels of csrc/ take it, on a GPU or emulated, and what they must
leave. Outputs are poisoned until a call has written them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from tests.conftest import TOLERANCES, assert_close
from tests.csrc.batch import integers
from tests.reference.coded import Coded
from tests.shapes import Case
from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.cache.hot_cache import HotCache
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels import score_codes, score_plan
from vllm_kcache.kernels.rows import gather_rows
from vllm_kcache.kernels.select import Lists, packed_view
from vllm_kcache.kernels.workspace import DecodeBatch
from vllm_kcache.reference import codes, score
from vllm_kcache.types import KStats, Selected, Selection

RULE = Selection(None, None, 1, 9, "max", 0.03)


@dataclass(frozen=True)
class CodedLayer:
    """A coded case as layer 1 of two.

    Attributes:
        coded: on the host.
        view, batch: on the device.
    """

    coded: Coded
    view: LayerView
    batch: DecodeBatch

    @classmethod
    def of(
        cls, coded: Coded, device: str = "cpu", num_slots: int = 64, pages: bool = True
    ) -> CodedLayer:
        """Args:
        pages: with the codes and rows of the case; False: all poison.
        """
        case, row = coded.case, coded.row
        size = case.shape
        shape = CacheShape(
            2, size.num_heads, size.num_kv_heads, size.head_size, size.page_tokens,
            size.v_block_tokens, row.dtype, 4, row.host_dtype,
        )  # fmt: skip
        rows, code_pages = coded.host_rows.clone(), coded.code_pages.to(device, copy=True)
        if not pages:
            rows.fill_(0xFF)
            code_pages.fill_(0xFF)
        if device != "cpu":
            rows = rows.pin_memory()
        stats = KStats(coded.stats.mean.to(device), coded.stats.deviation.to(device))
        as_values = code_pages.unflatten(2, (size.page_tokens, -1)).view(row.dtype)
        view = LayerView(
            1, shape, RULE, "clip", as_values, rows, k_stats=stats,
            hot_cache=HotCache.make(num_slots, 2, rows.shape[0], row.bytes, device),
        )  # fmt: skip
        batch = DecodeBatch(
            case.query.to(device), case.block_table.to(device), case.seq_lens.to(device),
            case.scale, size.max_blocks,
        )  # fmt: skip
        return cls(coded, replace(view, packed=packed_view(view)), batch)

    @property
    def cache(self) -> HotCache:
        assert self.view.hot_cache is not None
        return self.view.hot_cache

    @property
    def device(self) -> torch.device:
        return self.batch.query.device

    def lists(self, spare: int = 3) -> Lists:
        """Buffers with some columns of scores to spare."""
        shape, requests = self.view.shape, self.batch.num_requests
        heads, width = (requests, shape.num_query_heads), self.batch.max_blocks + spare
        chunks = score_plan.num_chunks(shape, width)

        def floats(*size: int) -> torch.Tensor:
            return torch.full(size, torch.nan, device=self.device)

        per_list = (requests, shape.num_kv_heads)
        selected = Selected(
            integers(*per_list, width).to(self.device), integers(*per_list).to(self.device),
            floats(*per_list), floats(*heads), floats(*heads),
        )  # fmt: skip
        return Lists(
            self.batch.seq_lens, self.batch.block_table, floats(*heads, width),
            floats(*heads, chunks), score_plan.chunk_blocks(shape), selected,
            integers(*per_list, width).to(self.device),
            torch.zeros(per_list, dtype=torch.int32, device=self.device).flatten(),
            floats(*heads, chunks),
        )  # fmt: skip

    def check_scores(self, splits: int | None = None, dependent: bool = False) -> Lists:
        """Score, and compare all that is written with the definition in float64."""
        case, shape = self.coded.case, self.view.shape
        lists = self.lists()
        heads = (self.batch.num_requests, shape.num_query_heads)
        transformed = torch.full((*heads, shape.head_size), torch.nan, device=self.device)
        bias = torch.full(heads, torch.nan, device=self.device)
        score_codes.score_codes(
            self.view, self.batch, lists, transformed, bias, splits=splits, dependent=dependent
        )
        tokens = case.seq_lens.long()
        exists = tokens > 0
        queries, biases = codes.transform_query(case.query.double(), self.coded.stats)
        assert_close(transformed.cpu()[exists], queries[exists], torch.float32)
        assert_close(bias.cpu()[exists], case.scale * biases[exists], torch.float32)
        expected = score.score_transformed(
            as_rounded(transformed), biases, self.coded.code_pages, case.block_table,
            case.seq_lens, case.scale, shape.block_tokens, lists.block_lse.shape[2],
            soft_cap=self.batch.soft_cap,
        )  # fmt: skip
        found = lists.block_lse.cpu()
        is_block = torch.isfinite(expected)
        assert torch.equal(torch.isfinite(found), is_block), "a block that is none, or none of one"
        relative, absolute = TOLERANCES[torch.float32]
        slack = absolute + relative * expected.abs()
        assert bool(((found - expected).abs() <= slack)[is_block].all())
        self._check_chunks(lists, found)
        return lists

    def _check_chunks(self, lists: Lists, block_lse: torch.Tensor) -> None:
        assert lists.chunk_max is not None
        found, most = lists.chunk_lse.cpu(), lists.chunk_max.cpu()
        for request, tokens in enumerate(self.coded.case.shape.seq_lens):
            chunks = -(-tokens // score_plan.CODE_CHUNK_TOKENS)
            assert bool(found[request, :, chunks:].isnan().all())
            assert bool(most[request, :, chunks:].isnan().all())
            for chunk in range(chunks):
                first = chunk * lists.chunk_blocks
                blocks = block_lse[request, :, first : first + lists.chunk_blocks].double()
                blocks = blocks.nan_to_num(nan=-math.inf)
                assert_close(found[request, :, chunk], blocks.logsumexp(-1), torch.float32)
                # Exact where a thread has whole blocks, so that a rule's border is not missed.
                above, largest = most[request, :, chunk], blocks.amax(-1).float()
                if self.view.shape.block_tokens <= 8:
                    assert torch.equal(above, largest)
                else:
                    assert bool((above >= largest).all())

    def gathered(self, skip_pages: int = 0, blocks: int = 3) -> tuple[torch.Tensor, ...]:
        """K and V of every request from its page `skip_pages` on, with rows to spare between.

        Returns:
            keys, values [rows, Hkv, D], host, and the first row of each run, [B].
        """
        size, case = self.coded.case.shape, self.coded.case
        start = skip_pages * size.page_tokens
        lengths = [max(0, tokens - start) for tokens in size.seq_lens]
        first, rows = [], 2
        for length in lengths:
            first.append(rows)
            rows += length + 1

        def on_device(numbers: list[int]) -> torch.Tensor:
            return torch.tensor(numbers, dtype=torch.int32, device=self.device)

        shape = (rows, size.num_kv_heads, size.head_size)
        keys, values = (
            torch.full(shape, torch.nan, dtype=case.query.dtype, device=self.device)
            for _ in range(2)
        )
        gather_rows(
            self.view, self.batch.block_table, on_device([start] * len(lengths)),
            on_device(lengths), on_device(first), max(lengths, default=0), keys, values, blocks,
        )  # fmt: skip
        return keys.cpu(), values.cpu(), torch.tensor(first)


def flat_kv(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of all tokens of a case, one request after the other: [n, Hkv, D] each."""
    return torch.cat(case.keys), torch.cat(case.values)


def in_digits(queries: torch.Tensor) -> torch.Tensor:
    """q' [.., D] float64 in two int8 numbers each, as the kernels have it."""
    steps = 127 / queries.abs().amax(-1, keepdim=True).clamp_min(1e-20)
    whole = (queries * steps).round()
    return (whole + ((queries * steps - whole) * 254).round() / 254) / steps


def as_rounded(transformed: torch.Tensor) -> torch.Tensor:
    """A kernel's own q', [B, Hq, D] float32, on the CPU in whole steps, exactly; NaN is 0.

    Of q' of another precision a value near the middle of two steps may go to the other one.
    """
    whole, steps = in_steps(transformed)
    return whole.double() / steps.double()


def in_steps(transformed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in steps, [B, Hq, D], and how many of them are 1, [B, Hq, 1]."""
    ours = transformed.cpu().nan_to_num()
    steps = codes.INT8_MOST / ours.abs().amax(-1, keepdim=True).clamp_min(codes.LEAST_QUERY)
    return (ours * steps).round(), steps
