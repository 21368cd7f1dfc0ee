# SPDX-License-Identifier: Apache-2.0
"""Select: time, and share of score's time at that shape. `python -m benchmarks.ops.select`.

As in a step, select reads the sums of chunks that score leaves behind, and scores that were written
just before and so lie in the L2 cache: two sets of them in turn, which fit there.
"""

from __future__ import annotations

import torch

from benchmarks.ops.common import (
    PROBLEMS,
    Batch,
    Problem,
    Report,
    Timing,
    arguments,
    time_calls,
)
from benchmarks.ops.score import time_score
from vllm_kcache.kernels.score_plan import chunk_blocks
from vllm_kcache.kernels.select import select_blocks
from vllm_kcache.kernels.workspace import columns_of
from vllm_kcache.types import Selected, Selection

RULES = {
    "top 16": Selection(16, None, 1, 32, "sum"),
    "top 64": Selection(64, None, 1, 32, "sum"),
    "coverage .95": Selection(None, 0.95, 1, 32, "sum"),
    "coverage .95, cap 128": Selection(128, 0.95, 1, 32, "sum"),
    "coverage .90, max": Selection(None, 0.9, 1, 32, "max"),
    "threshold .002": Selection(None, None, 1, 32, "max", 0.002),
}
# Spread of the log-sum-exps: 0.1 is what random weights give, 3 a sparse head.
SPREADS = {"flat": 0.1, "sparse": 3.0}


def random_lse(problem: Problem, spread: float, copies: int) -> list[torch.Tensor]:
    shape = (problem.num_requests, problem.num_heads, problem.max_blocks)
    return [torch.randn(shape, device="cuda") * spread for _ in range(copies)]


def empty_selected(problem: Problem, selection: Selection) -> Selected:
    shape = (problem.num_requests, problem.num_kv_heads)
    columns = columns_of(selection, problem.max_blocks)
    return Selected(
        torch.empty((*shape, columns), dtype=torch.int32, device="cuda"),
        torch.empty(shape, dtype=torch.int32, device="cuda"),
        torch.empty(shape, device="cuda"),
        torch.empty((problem.num_requests, problem.num_heads), device="cuda"),
    )


def time_select(batch: Batch, scores: list[torch.Tensor], rule: Selection) -> tuple[Timing, float]:
    """Time of a selection, and the mean length of its lists."""
    out = empty_selected(batch.problem, rule)
    view = batch.view(rule, batch.hot_cache(0))
    blocks_each = chunk_blocks(batch.problem.shape)
    sums = [lse.unflatten(2, (-1, blocks_each)).logsumexp(-1) for lse in scores]

    def call(block_lse: torch.Tensor, chunk_lse: torch.Tensor) -> None:
        select_blocks(view.packed, batch.seq_lens, block_lse, chunk_lse, blocks_each, out)

    calls = zip(scores, sums, strict=True)
    timing = time_calls([lambda lse=lse, chunk=chunk: call(lse, chunk) for lse, chunk in calls])
    return timing, out.counts.float().mean().item()


def main() -> None:
    options = arguments(__doc__)
    report = Report("select", options.results)
    for problem in PROBLEMS:
        batch = Batch(problem)
        score = time_score(batch)
        for spread_name, spread in SPREADS.items():
            scores = random_lse(problem, spread, 2)
            for rule_name, rule in RULES.items():
                timing, mean_blocks = time_select(batch, scores, rule)
                report.add(
                    f"{problem.name}, {rule_name}, {spread_name}",
                    timing,
                    share_of_score=timing.p50 / score.p50,
                    mean_blocks=mean_blocks,
                )
        batch.close()
    report.finish()


if __name__ == "__main__":
    main()
