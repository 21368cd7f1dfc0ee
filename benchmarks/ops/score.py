# SPDX-License-Identifier: Apache-2.0
"""Score: time and share of the HBM copy bandwidth. `python -m benchmarks.ops.score`.

Bytes counted: K, read once. With --sweep also other launch shapes, best first.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from benchmarks.ops.common import (
    ANY_RULE,
    PROBLEMS,
    V_BLOCK_TOKENS,
    Batch,
    Problem,
    Report,
    Timing,
    arguments,
    hbm_copy_bandwidth,
    time_calls,
)
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels.score import score_blocks
from vllm_kcache.kernels.score_plan import ScoreConfig, score_config


def time_score(batch: Batch, config: ScoreConfig | None = None, max_blocks: int = 0) -> Timing:
    p, requests = batch.problem, batch.decode(max_blocks)
    cache = batch.hot_cache(0)
    views = [batch.view(ANY_RULE, cache, layer) for layer in range(len(batch.k_layers))]
    lists = batch.workspace(ANY_RULE, max_blocks).views(views[0], requests)
    if config is not None:
        # Chunks of another size leave another number of sums.
        chunks = -(-requests.max_blocks * V_BLOCK_TOKENS // config.chunk_tokens)
        sums = torch.empty((p.num_requests, p.num_heads, chunks), device="cuda")
        lists = replace(lists, chunk_lse=sums)

    def call(view: LayerView) -> None:
        score_blocks(view, requests, lists, config=config)

    return time_calls([lambda view=view: call(view) for view in views])


def sweep(batch: Batch, peak: float) -> None:
    p = batch.problem
    usual = score_config(p.shape, p.num_requests, p.max_blocks)
    found = []
    for chunk, programs, warps, stages in itertools.product(
        (64, 128, 256), (2048, 4096, 8192, 16384), (4, 8), (2, 3, 4)
    ):
        if (chunk, warps) in ((64, 8), (256, 4)) or (programs == 2048 and stages == 2):
            continue
        splits = max(1, min(p.context // chunk, -(-programs // p.num_lists)))
        config = ScoreConfig(chunk, splits, warps, stages, usual.max_registers)
        if any(config == tried for _, tried in found):
            continue
        found.append((time_score(batch, config).p50, config))
    print(f"\nscore sweep, {p.name} (default {usual})")
    for ms, config in sorted(found, key=lambda pair: pair[0])[:8]:
        print(f"  {ms * 1e3:8.1f} us  {p.k_bytes / ms * 1e3 / peak:.3f}  {config}")


def main() -> None:
    options = arguments(__doc__, sweep=True)
    peak = hbm_copy_bandwidth()
    report = Report("score", options.results)
    print(f"HBM copy {peak / 1e12:.3f} TB/s")
    shorter = Problem("llama-3-8b 26x4K", 26, 4096, 8, 4)
    for problem in (*PROBLEMS, shorter):
        batch = Batch(problem)
        cases = {"": 0, ", graph for 8x the length": problem.max_blocks * 8}
        for words, max_blocks in cases.items():
            timing = time_score(batch, max_blocks=max_blocks)
            rate = problem.k_bytes / timing.p50 * 1e3
            report.add(
                problem.name + words, timing, rate / 1e9, share_of_hbm_copy=rate / peak,
                hbm_copy_gb_per_s=peak / 1e9,
            )  # fmt: skip
        if options.sweep and problem is not shorter:
            sweep(batch, peak)
        batch.close()
    report.finish()


if __name__ == "__main__":
    main()
