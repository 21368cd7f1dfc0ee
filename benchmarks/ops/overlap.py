# SPDX-License-Identifier: Apache-2.0
"""Score and fetch in two streams, whole steps of a layer. `python -m benchmarks.ops.overlap`.

Everything is missing in the hot cache (each call is another layer), unless a row says otherwise.
First what the parts of a step take alone: score, select and fetch, attend. Then steps without
followers and with so many of them: `over_longer` is the time of score, select and fetch together
(that of the step less that of attend alone) over the longer of the two alone. Whole layers write
the newest tokens first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.ops.common import (
    DTYPE,
    LAYERS,
    PAGE_TOKENS,
    PROBLEMS,
    V_BLOCK_TOKENS,
    Batch,
    Report,
    Timing,
    arguments,
    hbm_copy_bandwidth,
    time_calls,
)
from benchmarks.ops.score import time_score
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels.attend import attend_blocks
from vllm_kcache.kernels.decode import decode_step, plan_followers
from vllm_kcache.kernels.score import score_blocks
from vllm_kcache.kernels.select import select_and_fetch
from vllm_kcache.kernels.workspace import Followers
from vllm_kcache.kernels.write import write_kv
from vllm_kcache.types import Selection

PLANS = tuple(Followers(count, count) for count in (16, 24, 32, 40, 48, 64, 96, 128))
SMALL_PLANS = (Followers(32, 32), Followers(64, 64))
BLOCKS = (16, 32, 64)


class Steps:
    """Steps of one layer after the other, over one workspace."""

    def __init__(self, batch: Batch, blocks: int, slots_of_a_step: float) -> None:
        p = batch.problem
        selection = Selection(blocks, None, 1, 32, "sum")
        self.batch = batch.decode()
        self.workspace = batch.workspace(selection)
        self.cache = batch.hot_cache(int(p.num_lists * blocks * slots_of_a_step))
        self.views = [batch.view(selection, self.cache, layer) for layer in range(LAYERS)]
        self.lists = self.workspace.views(self.views[0], self.batch)
        self.out = torch.empty_like(batch.query)
        self.token = torch.randn(
            (p.num_requests, p.num_kv_heads, p.head_size), dtype=DTYPE, device="cuda"
        )
        self.slots = batch.block_table[:, -1].long() * PAGE_TOKENS + PAGE_TOKENS - 1
        score_blocks(self.views[0], self.batch, self.lists)  # something to select from

    def time(self, run: Callable[[LayerView], None]) -> Timing:
        """Of one call."""
        return time_calls([lambda view=view: run(view) for view in self.views])

    def fetch(self, view: LayerView) -> None:
        """Select and fetch alone."""
        select_and_fetch(view.packed, self.lists)
        self.cache.advance_epoch()

    def attend(self, view: LayerView) -> None:
        """Attend alone, to what was fetched last."""
        attend_blocks(
            view, self.batch, self.lists.selected, self.lists.rows, self.workspace, self.out
        )

    def step(self, view: LayerView, followers: Followers | None) -> None:
        """What follows a write."""
        decode_step(view, self.workspace, self.batch, self.out, followers=followers)

    def layer(self, view: LayerView, followers: Followers | None) -> None:
        """Write, and what follows."""
        write_kv(
            view, self.token, self.token, self.slots, allocate_tokens=len(self.slots),
            dependent=self.workspace.dependent,
        )  # fmt: skip
        decode_step(
            view, self.workspace, self.batch, self.out, after_write=True, followers=followers
        )


def describe(followers: Followers | None) -> str:
    """Followers in words."""
    if followers is None:
        return "no followers"
    least = f"{followers.least} to " if followers.least < followers.most else ""
    return f"{least}{followers.most} followers"


def measure(batch: Batch, blocks: int, score: Timing, peak: float, report: Report) -> None:
    """All rows of one length of list."""
    problem = batch.problem
    words = f"{problem.name}, {blocks * V_BLOCK_TOKENS} tokens"
    cold = Steps(batch, blocks, 1.5)
    fetch = cold.time(cold.fetch)
    attend = cold.time(cold.attend)
    longer = max(score.p50, fetch.p50)
    report.add(
        f"{words}, score / select and fetch / attend alone", score, fetch_ms=fetch.p50,
        attend_ms=attend.p50,
    )  # fmt: skip
    default = plan_followers(
        problem.shape, problem.num_requests, problem.max_blocks, cold.workspace.multiprocessors
    )
    plans = PLANS if problem.num_requests > 1 else SMALL_PLANS
    for plan in dict.fromkeys((default, None, *plans)):
        step = cold.time(lambda view, plan=plan: cold.step(view, plan))
        name = f"{words}, step, {describe(plan)}" + (", default" if plan == default else "")
        report.add(name, step, over_longer=(step.p50 - attend.p50) / longer)
    warm = Steps(batch, blocks, 2.0 * LAYERS)
    floor_ms = problem.k_bytes / peak * 1e3
    for state, steps in (("missing", cold), ("hit", warm)):
        for plan in dict.fromkeys((default, Followers(48, 48), None)):
            whole = steps.time(lambda view, plan=plan, steps=steps: steps.layer(view, plan))
            name = f"{words}, whole layer, all {state}, {describe(plan)}"
            report.add(name, whole, over_k_floor=whole.p50 / floor_ms)


def main() -> None:
    options = arguments(__doc__)
    peak = hbm_copy_bandwidth()
    report = Report("overlap", options.results)
    for problem in PROBLEMS:
        batch = Batch(problem)
        score = time_score(batch)
        for blocks in BLOCKS:
            measure(batch, blocks, score, peak, report)
        batch.close()
    report.finish()


if __name__ == "__main__":
    main()
