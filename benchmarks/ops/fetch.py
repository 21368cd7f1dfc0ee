# SPDX-License-Identifier: Apache-2.0
"""Fetch: share of the host-to-device copy bandwidth, everything missing; and a step of hits only.

`python -m benchmarks.ops.fetch`. Bytes counted: the rows copied over the link.
"""

from __future__ import annotations

import torch

from benchmarks.ops.common import (
    ANY_RULE,
    LAYERS,
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
from vllm_kcache.kernels.fetch import fetch_blocks
from vllm_kcache.types import Selected

BLOCKS = (16, 32, 64)


def lists_of(problem: Problem, blocks: int, copies: int) -> list[Selected]:
    counts = torch.full((problem.num_requests, problem.num_kv_heads), blocks, device="cuda")
    mass = torch.ones(counts.shape, device="cuda")
    return [Selected(*random_selection(problem, counts, blocks), mass) for _ in range(copies)]


def fetch_lists(batch: Batch, blocks: int, report: Report, peak: float) -> None:
    """The whole operation: everything missing (another layer each call), then everything hit."""
    p = batch.problem
    lists = lists_of(p, blocks, 4)
    rows = torch.empty_like(lists[0].blocks)
    for words, layers, num_slots in (("all missing", LAYERS, 1.5), ("all hit", 1, 8.0)):
        cache = batch.hot_cache(int(p.num_lists * blocks * num_slots))
        views = [batch.view(ANY_RULE, cache, layer).packed for layer in range(layers)]

        def call(index: int, cache=cache, views=views) -> None:
            fetch_blocks(views[index % len(views)], lists[index % 4], batch.block_table, rows)
            if len(views) > 1:
                cache.advance_epoch()  # else no slot may be taken from the call before

        timing = time_calls([lambda i=i: call(i) for i in range(LAYERS)])
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
    for problem in PROBLEMS:
        batch = Batch(problem)
        for blocks in BLOCKS:
            fetch_lists(batch, blocks, report, inward)
        batch.close()
    report.finish()


if __name__ == "__main__":
    main()
