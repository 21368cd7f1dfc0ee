# SPDX-License-Identifier: Apache-2.0
"""Score from K codes: time and share of the HBM copy bandwidth.
`python -m benchmarks.ops.score_codes`.

Bytes counted: codes with scale and zero, read once. Also of verification steps, of TOKENS tokens
a request. With --sweep also other numbers of thread blocks a list, best first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.ops.common import (
    ANY_RULE,
    DTYPE,
    LAYERS,
    PAGE_TOKENS,
    SPLIT_LAYERS,
    Problem,
    Report,
    Timing,
    arguments,
    hbm_copy_bandwidth,
    time_calls,
)
from vllm_kcache.cache.formats import SCALE_BYTES, CacheShape
from vllm_kcache.cache.hot_cache import HotCache
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels import score_codes, score_plan
from vllm_kcache.kernels.select import Lists, packed_view
from vllm_kcache.kernels.workspace import DecodeBatch
from vllm_kcache.types import KStats, Selected

PROBLEMS = (
    Problem("llama-3-8b 95x32K", 95, 32768, 8, 4),
    Problem("llama-3-8b 26x32K", 26, 32768, 8, 4),
    Problem("llama-3-8b 1x128K", 1, 131072, 8, 4),
    Problem("llama-3-8b 26x4K", 26, 4096, 8, 4),
    Problem("llama-2-7b 14x16K", 14, 16384, 32, 1),
    Problem("qwen-3-32b 26x32K", 26, 32768, 8, 8),
    *SPLIT_LAYERS,
)
SPECULATED = PROBLEMS[1:3]
# Queries of the tokens of a request are one and some noise, so that their lists are much alike.
TOKENS, NOISE = 4, 0.3


def coded_shape(problem: Problem) -> CacheShape:
    """The problem with codes and int8 rows."""
    return replace(problem.shape, k_bits=4, host_dtype="int8")


def code_bytes(problem: Problem) -> int:
    return problem.num_lists * problem.context * coded_shape(problem).k_token_bytes


@dataclass
class CodedBatch:
    """Random codes, queries and statistics of a problem; several sets of pages in turn keep small
    ones out of the L2 cache."""

    problem: Problem
    views: list[LayerView]
    batch: DecodeBatch
    lists: Lists
    transformed: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def make(
        cls, problem: Problem, max_blocks: int = 0, host_rows: torch.Tensor | None = None,
        num_slots: int = 0, tokens: int = 1,
    ) -> CodedBatch:  # fmt: skip
        """Args:
        max_blocks: where a graph is for longer requests.
        tokens: of each request, a row each.
        host_rows: of the problem; without, nothing may read or write rows.
        """
        p, shape = problem, coded_shape(problem)
        num_rows = p.num_pages * shape.rows_per_page
        if host_rows is None:
            host_rows = torch.empty((num_rows, shape.row.bytes), dtype=torch.uint8)
        stats = KStats(
            torch.randn((p.num_kv_heads, p.head_size), device="cuda"),
            torch.rand((p.num_kv_heads, p.head_size), device="cuda") + 0.5,
        )
        cache = HotCache.make(num_slots, LAYERS, num_rows, shape.row.bytes, "cuda")
        views = []
        for layer in range(max(1, min(LAYERS, (1 << 30) // code_bytes(p)))):
            size = (p.num_pages, p.num_kv_heads, PAGE_TOKENS * shape.k_token_bytes)
            pages = torch.randint(0, 256, size, dtype=torch.uint8, device="cuda")
            scales = pages[..., -PAGE_TOKENS * SCALE_BYTES :].view(torch.float16)
            scales[..., ::2] = 0.1
            scales[..., 1::2] = -0.7
            k_pages = pages.unflatten(2, (PAGE_TOKENS, -1)).view(DTYPE)
            view = LayerView(
                layer, shape, ANY_RULE, "renormalize", k_pages, host_rows, k_stats=stats,
                hot_cache=cache,
            )  # fmt: skip
            views.append(replace(view, packed=packed_view(view)))
        rows = p.num_requests * tokens
        heads, lists = (rows, p.num_heads), (rows, p.num_kv_heads)
        columns = max_blocks or p.max_blocks
        chunks = score_plan.num_chunks(shape, columns)
        batch = DecodeBatch(
            torch.randn((p.num_requests, p.num_heads, p.head_size), dtype=DTYPE, device="cuda"),
            torch.randperm(p.num_pages, device="cuda").int().view(p.num_requests, -1),
            torch.full((p.num_requests,), p.context, dtype=torch.int32, device="cuda"),
            p.head_size**-0.5,
            columns,
        )
        if tokens > 1:
            batch = _verified(batch, tokens)
        empty = torch.empty((*lists, 0), dtype=torch.int32, device="cuda")
        nothing = Selected(empty, empty, torch.empty(0, device="cuda"))
        return cls(
            p,
            views,
            batch,
            Lists(
                batch.seq_lens, batch.block_table,
                torch.empty((*heads, columns), device="cuda"),
                torch.empty((*heads, chunks), device="cuda"), score_plan.chunk_blocks(shape),
                nothing, empty, torch.zeros(lists, dtype=torch.int32, device="cuda").flatten(),
            ),
            torch.empty((*heads, p.head_size), device="cuda"),
            torch.empty(heads, device="cuda"),
        )  # fmt: skip

    def time_score(self, splits: int | None = None) -> Timing:
        def call(view: LayerView) -> None:
            score_codes.score_codes(
                view, self.batch, self.lists, self.transformed, self.bias, splits=splits
            )

        return time_calls([lambda view=view: call(view) for view in self.views])


def _verified(batch: DecodeBatch, tokens: int) -> DecodeBatch:
    """The last tokens of each request of a batch, a row each."""
    query = batch.query.repeat_interleave(tokens, 0)
    at = torch.arange(tokens, dtype=torch.int32, device=query.device).repeat(batch.num_requests)
    return replace(
        batch,
        query=query + NOISE * query.std() * torch.randn_like(query),
        block_table=batch.block_table.repeat_interleave(tokens, 0),
        seq_lens=batch.seq_lens.repeat_interleave(tokens) - (tokens - 1 - at),
        spans=torch.stack([at, tokens - 1 - at], 1),
        most_tokens=tokens,
    )


def sweep(batch: CodedBatch, name: str, peak: float) -> None:
    p, shape = batch.problem, coded_shape(batch.problem)
    usual = score_codes.splits_of(shape, p.num_requests, p.max_blocks)
    each = -(-score_plan.num_chunks(shape, p.max_blocks) // score_codes.WARPS)
    tried = {-(-each // chunks) for chunks in (1, 2, 3, 4, 6, 8, 12, 16)} | {usual}
    found = [(batch.time_score(splits).p50, splits) for splits in tried]
    print(f"\nscore codes sweep, {name} (default {usual} thread blocks a list)")
    for ms, splits in sorted(found):
        print(
            f"  {ms * 1e3:8.1f} us  {code_bytes(p) / ms * 1e3 / peak:.3f}  {splits}, "
            f"of {each / splits:.2f} chunks a warp"
        )


def main() -> None:
    options = arguments(__doc__, sweep=True)
    peak = hbm_copy_bandwidth()
    report = Report("score_codes", options.results)
    print(f"HBM copy {peak / 1e12:.3f} TB/s")
    for problem in PROBLEMS:
        cases = {"": (0, 1), ", graph for 8x the length": (problem.max_blocks * 8, 1)}
        if problem in SPECULATED:
            cases[f", {TOKENS} tokens a request"] = 0, TOKENS
        for words, (max_blocks, tokens) in cases.items():
            batch, name = CodedBatch.make(problem, max_blocks, tokens=tokens), problem.name + words
            timing = batch.time_score()
            rate = code_bytes(problem) / timing.p50 * 1e3
            report.add(
                name, timing, rate / 1e9, share_of_hbm_copy=rate / peak,
                hbm_copy_gb_per_s=peak / 1e9,
            )  # fmt: skip
            if options.sweep and not max_blocks:
                sweep(batch, name, peak)
            del batch
    report.finish()


if __name__ == "__main__":
    main()
