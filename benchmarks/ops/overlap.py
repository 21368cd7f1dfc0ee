# SPDX-License-Identifier: Apache-2.0
"""Score and fetch in two streams, whole steps of a layer. `python -m benchmarks.ops.overlap`.

Everything is missing in the hot cache (each call is another layer), unless a row says otherwise.
`over_longer` is the time of both over the longer of the two alone. The fetch alone includes select.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from benchmarks.ops.common import (
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
from vllm_kcache.cache.hot_cache import HotCache
from vllm_kcache.kernels import extension
from vllm_kcache.kernels.decode import DecodeStep, DecodeWorkspace
from vllm_kcache.kernels.decode_plan import DecodePlan, plan_decode
from vllm_kcache.kernels.score_plan import chunk_blocks
from vllm_kcache.kernels.write import write_kv
from vllm_kcache.types import Fetched, Selection

PLANS = (
    DecodePlan(followers=16),
    DecodePlan(followers=24),
    DecodePlan(followers=32),
    DecodePlan(followers=40),
    DecodePlan(followers=48),
    DecodePlan(followers=64),
    DecodePlan(followers=96),
    DecodePlan(followers=128),
    DecodePlan(4, 48, copy_stream=True),
)
SMALL_PLANS = (DecodePlan(), DecodePlan(followers=32), DecodePlan(followers=64))
LAYERS = 8


class Steps:
    """Steps of one layer after the other, over one workspace."""

    def __init__(self, batch: Batch, blocks: int, slots_of_a_step: float) -> None:
        p = batch.problem
        self.batch = batch
        self.selection = Selection(blocks, None, 1, 32, "sum")
        self.workspace = DecodeWorkspace.make(
            p.num_requests, p.num_heads, p.num_kv_heads, p.head_size, p.max_blocks,
            self.selection, "cuda", with_miss_list=True,
            chunk_blocks=chunk_blocks(p.head_size, 2, V_BLOCK_TOKENS),
        )  # fmt: skip
        self.cache: HotCache = batch.hot_cache(
            int(p.num_lists * blocks * slots_of_a_step), num_layers=LAYERS
        )
        self.out = torch.empty_like(batch.query)
        self.token = torch.randn(
            (p.num_requests, p.num_kv_heads, p.head_size), dtype=batch.dtype, device="cuda"
        )
        self.slots = batch.block_table[:, -1].long() * 16 + 15

    def step(self, layer: int, plan: DecodePlan) -> DecodeStep:
        batch, workspace = self.batch, self.workspace
        lse, selected, rows = workspace.views(
            batch.problem.num_requests, batch.problem.max_blocks, self.selection
        )
        return DecodeStep(
            workspace, batch.query, batch.k_layers[layer % len(batch.k_layers)], batch.v_pool,
            batch.block_table, batch.seq_lens, batch.scale, V_BLOCK_TOKENS, self.selection,
            "renormalize", self.cache, layer, self.out, lse, selected,
            Fetched(rows, self.cache.slots), plan,
            workspace.chunk_view(batch.problem.num_requests, batch.problem.max_blocks),
        )  # fmt: skip

    def time(self, run: Callable[[DecodeStep], None], plan: DecodePlan, layers: int) -> Timing:
        steps = [self.step(index % layers, plan) for index in range(LAYERS)]
        steps[0].score_and_fetch()  # something to select from
        return time_calls([lambda step=step: run(step) for step in steps])

    def write_and_run(self, step: DecodeStep) -> None:
        write_kv(
            self.token, self.token, self.slots, step.k_pages, step.v_pool, self.cache, step.layer,
            allocate_tokens=len(self.slots), dependent=self.workspace.dependent,
        )  # fmt: skip
        dataclasses.replace(step, after_write=True).run()


def describe(plan: DecodePlan) -> str:
    """A plan in words."""
    if plan.followers:
        least = f"{plan.least_followers} to " if plan.least_followers else ""
        return f"{least}{plan.followers} followers"
    copied_by = plan.copy_thread_blocks or "lists"
    third = ", third stream" if plan.copy_stream else ""
    return f"{plan.waves} waves, copy by {copied_by}{third}"


def fetch_alone(step: DecodeStep) -> None:
    step.hot_cache.begin_epoch()
    step.select_fetch(0, 0, step.k_pages.shape[1])


def main() -> None:
    options = arguments(__doc__)
    peak = hbm_copy_bandwidth()
    report = Report("overlap", options.results)
    for problem in PROBLEMS:
        batch = Batch(problem, with_v=True)
        score = time_score(batch)
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        default = plan_decode(
            problem.num_requests, problem.num_kv_heads, problem.max_blocks, problem.row_bytes,
            multiprocessors if extension.available() else 0,
        )  # fmt: skip
        for blocks in (16, 32, 64):
            words = f"{problem.name}, {blocks * V_BLOCK_TOKENS} tokens"
            cold = Steps(batch, blocks, 1.5)
            fetch = cold.time(fetch_alone, DecodePlan(1, 48), LAYERS)
            longer = max(score.p50, fetch.p50)
            report.add(f"{words}, score / select and fetch alone", score, fetch_ms=fetch.p50)
            plans = dict.fromkeys((default, *(PLANS if problem.num_requests > 1 else SMALL_PLANS)))
            for plan in plans:
                both = cold.time(DecodeStep.score_and_fetch, plan, LAYERS)
                name = describe(plan) + (", default" if plan == default else "")
                report.add(f"{words}, {name}", both, over_longer=both.p50 / longer)
            warm = Steps(batch, blocks, 2.0 * LAYERS)
            floor_ms = problem.k_bytes / peak * 1e3
            whole_plans = dict.fromkeys((default, DecodePlan(followers=48), DecodePlan()))
            for state, steps in (("missing", cold), ("hit", warm)):
                for plan in whole_plans:
                    whole = steps.time(steps.write_and_run, plan, LAYERS)
                    name = f"{words}, whole layer, all {state}, {describe(plan)}"
                    report.add(name, whole, over_k_floor=whole.p50 / floor_ms)
        batch.close()
    report.finish()


if __name__ == "__main__":
    main()
