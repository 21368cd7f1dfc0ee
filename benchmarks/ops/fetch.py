# SPDX-License-Identifier: Apache-2.0
"""Fetch: share of the host-to-device copy bandwidth, everything missing; and a step of hits only.

`python -m benchmarks.ops.fetch`. Bytes counted: the rows copied over the link.
"""

from __future__ import annotations

import torch

from benchmarks.ops.common import (
    PROBLEMS,
    V_BLOCK_TOKENS,
    Batch,
    Problem,
    Report,
    arguments,
    link_bandwidths,
    random_selection,
    time_calls,
)
from vllm_kcache.cache.hot_cache import FIRST_MISS_COUNT
from vllm_kcache.kernels import extension
from vllm_kcache.kernels.fetch import fetch_blocks
from vllm_kcache.types import Fetched, Selected

BLOCKS = (16, 32, 64)
THREAD_BLOCKS = (16, 32, 48, 64, 128)


def copy_listed(
    batch: Batch, num_rows: int, thread_blocks: int, report: Report, peak: float
) -> None:
    """The copy kernel by itself, on a list of random rows."""
    cache = batch.hot_cache(num_rows, num_layers=1)
    lists = [
        torch.stack(
            [
                torch.randperm(cache.rows_per_layer, device="cuda")[:num_rows].int(),
                torch.randperm(num_rows, device="cuda").int(),
            ],
            -1,
        ).contiguous()
        for _ in range(4)
    ]
    cache.state[FIRST_MISS_COUNT] = num_rows

    def call(misses: torch.Tensor) -> None:
        torch.ops.kcache.copy_misses(
            misses, cache.state, 0, batch.v_pool, V_BLOCK_TOKENS, cache.slots, thread_blocks
        )

    timing = time_calls([lambda m=m: call(m) for m in lists])
    rate = num_rows * batch.problem.row_bytes / timing.p50 * 1e3
    report.add(
        f"copy {num_rows} rows, {thread_blocks} thread blocks", timing, rate / 1e9,
        share_of_link_copy=rate / peak,
    )  # fmt: skip


def lists_of(problem: Problem, blocks: int, copies: int) -> list[Selected]:
    counts = torch.full((problem.num_requests, problem.num_kv_heads), blocks, device="cuda")
    mass = torch.ones(counts.shape, device="cuda")
    return [Selected(*random_selection(problem, counts, blocks), mass) for _ in range(copies)]


def fetch_lists(batch: Batch, blocks: int, report: Report, peak: float) -> None:
    """The whole operation: everything missing (another layer each call), then everything hit."""
    p = batch.problem
    lists = lists_of(p, blocks, 4)
    rows = torch.empty_like(lists[0].blocks)
    for words, layers, num_slots in (("all missing", 8, 1.5), ("all hit", 1, 8.0)):
        cache = batch.hot_cache(int(p.num_lists * blocks * num_slots), num_layers=8)
        out = Fetched(rows, cache.slots)

        def call(index: int, cache=cache, out=out, layers=layers) -> None:
            selected = lists[index % 4]
            fetch_blocks(
                selected, batch.block_table, batch.v_pool, V_BLOCK_TOKENS, cache, index % layers,
                out,
            )  # fmt: skip

        timing = time_calls([lambda i=i: call(i) for i in range(8)])
        counted = cache.read_counters()
        moved = p.num_lists * blocks * p.row_bytes if layers > 1 else None
        rate = moved / timing.p50 * 1e3 if moved else None
        report.add(
            f"{p.name}, {blocks * V_BLOCK_TOKENS} tokens a head, {words}", timing,
            rate and rate / 1e9, **({"share_of_link_copy": rate / peak} if rate else {}),
            hit_rate=counted.hits / max(1, counted.hits + counted.misses + counted.direct),
        )  # fmt: skip


def main() -> None:
    options = arguments(__doc__)
    inward, outward = link_bandwidths()
    print(f"link copy: {inward / 1e9:.1f} GB/s in, {outward / 1e9:.1f} GB/s out")
    report = Report("fetch", options.results)
    with_extension = extension.available()
    for problem in PROBLEMS:
        batch = Batch(problem, with_v=True)
        if problem is PROBLEMS[0] and with_extension:
            for thread_blocks in THREAD_BLOCKS:
                copy_listed(batch, 8192, thread_blocks, report, inward)
            copy_listed(batch, 512, 48, report, inward)
        for blocks in BLOCKS:
            fetch_lists(batch, blocks, report, inward)
        batch.close()
    report.finish()


if __name__ == "__main__":
    main()
