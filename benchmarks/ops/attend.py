# SPDX-License-Identifier: Apache-2.0
"""Attend: share of the HBM copy bandwidth. `python -m benchmarks.ops.attend`.

Bytes counted: K and V of the selected blocks, all of V in GPU memory. Lists are of one length, or
of lengths that differ as those of a coverage do (log-normal); those also with the clipped tail.
With K codes K and V come from rows of int8.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks.ops.common import (
    ANY_RULE,
    DTYPE,
    PROBLEMS,
    V_BLOCK_TOKENS,
    Batch,
    Problem,
    Report,
    Timing,
    arguments,
    hbm_copy_bandwidth,
    random_selection,
    time_calls,
)
from benchmarks.ops.score_codes import CodedBatch
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels.attend import attend_blocks
from vllm_kcache.kernels.attend_plan import (
    AttendConfig,
    RowsConfig,
    attend_config,
    rows_config,
)
from vllm_kcache.kernels.score_plan import padded
from vllm_kcache.kernels.workspace import DecodeWorkspace
from vllm_kcache.types import Selected, Selection, Tail

CLIPPED = Selection(None, None, 1, 32, "max", 0.002)
CODED_PROBLEMS = (
    Problem("llama-3-8b 53x32K", 53, 32768, 8, 4),
    Problem("llama-3-8b 26x32K", 26, 32768, 8, 4),
    Problem("llama-3-8b 1x32K", 1, 32768, 8, 4),
    Problem("llama-2-7b 13x16K", 13, 16384, 32, 1),
)
# Blocks of a list, mean: what the default selects in the replay.
CODED_BLOCKS = 49


def ragged_counts(p: Problem, mean: int) -> torch.Tensor:
    spread = torch.randn((p.num_requests, p.num_kv_heads), device="cuda")
    counts = (spread.exp() * mean / 1.6487).round()  # the mean of exp(N(0, 1))
    return counts.clamp(6, p.max_blocks).int()


def time_attend(
    batch: Batch,
    counts: torch.Tensor,
    columns: int,
    config: AttendConfig | None = None,
    tail: Tail = "renormalize",
) -> Timing:
    """Time over four selections whose rows lie anywhere in a slot pool larger than the L2 cache."""
    p, requests = batch.problem, batch.decode()
    selection = CLIPPED if tail == "clip" else ANY_RULE
    cache = batch.hot_cache(max(1 << 16, int(counts.sum())))
    cache.slots.view(DTYPE).normal_()
    workspace = batch.workspace(selection)
    if config is not None:
        # A launch shape that is tried may leave more parts than the usual one.
        parts = p.num_lists * config.splits * p.group
        sums = torch.empty(parts * padded(p.head_size), device="cuda")
        weights = torch.empty(parts * 2, device="cuda")
        workspace = replace(workspace, sums=sums, weights=weights)
    out = torch.empty_like(batch.query)
    mass = torch.ones(counts.shape, device="cuda")
    lse = torch.full((p.num_requests, p.num_heads), 8.0, device="cuda")

    def call(view: LayerView, selected: Selected, rows: torch.Tensor) -> None:
        attend_blocks(view, requests, selected, rows, workspace, out, config=config)

    calls = []
    for index in range(4):
        selected = Selected(*random_selection(p, counts, columns), mass, lse)
        rows = torch.randint(cache.num_slots, selected.blocks.shape, device="cuda").int()
        view = batch.view(selection, cache, index, tail)
        calls.append(functools.partial(call, view, selected, rows))
    return time_calls(calls)


def time_coded(coded: CodedBatch, counts: torch.Tensor, config: RowsConfig | None = None) -> Timing:
    """The same from rows of int8, with the clipped tail."""
    p, columns = coded.problem, coded.problem.max_blocks
    shape = coded.views[0].shape
    workspace = DecodeWorkspace.make(shape, CLIPPED, p.num_requests, columns, "cuda")
    if config is not None:
        parts = config.splits * p.num_lists * 2 * p.group
        sums = torch.empty(parts * padded(p.head_size), device="cuda")
        weights = torch.empty(parts * 2, device="cuda")
        workspace = replace(workspace, sums=sums, weights=weights)
    workspace.code_query.normal_()
    workspace.code_bias.zero_()
    out, mass = torch.empty_like(coded.batch.query), torch.ones(counts.shape, device="cuda")
    lse = torch.full((p.num_requests, p.num_heads), 8.0, device="cuda")
    view = replace(coded.views[0], selection=CLIPPED, tail="clip")
    cache = view.hot_cache
    assert cache is not None

    def call(selected: Selected, rows: torch.Tensor) -> None:
        attend_blocks(view, coded.batch, selected, rows, workspace, out, config=config)

    calls = []
    for _ in range(4):
        selected = Selected(*random_selection(p, counts, columns), mass, lse, lse * 0)
        rows = torch.randint(cache.num_slots, selected.blocks.shape, device="cuda").int()
        calls.append(functools.partial(call, selected, rows))
    return time_calls(calls)


def sweep(p: Problem, usual: object, times: Iterator[tuple[float, object]]) -> None:
    print(f"\nattend sweep, {p.name}, ragged (default {usual})")
    for ms, config in sorted(times, key=lambda pair: pair[0])[:8]:
        print(f"  {ms * 1e3:8.1f} us  {config}")


def attend_times(
    p: Problem, time: Callable[[AttendConfig], Timing]
) -> Iterator[tuple[float, AttendConfig]]:
    for tokens, programs, warps, stages in itertools.product(
        (32, 64, 128), (528, 1056, 2112, 4224), (2, 4, 8), (1, 2, 3)
    ):
        splits = max(1, min(32, -(-programs // p.num_lists)))
        config = AttendConfig(tokens // V_BLOCK_TOKENS, splits, warps, stages)
        yield time(config).p50, config


def rows_times(
    time: Callable[[RowsConfig], Timing],
) -> Iterator[tuple[float, RowsConfig]]:
    for splits, tiles in itertools.product((1, 2, 3, 4, 6, 8, 16), (8, 16, 32, 64)):
        config = RowsConfig(splits, tiles)
        yield time(config).p50, config


def main() -> None:
    options = arguments(__doc__, sweep=True)
    peak = hbm_copy_bandwidth()
    report = Report("attend", options.results)
    for problem in PROBLEMS:
        batch = Batch(problem)
        lists = (problem.num_requests, problem.num_kv_heads)
        cases: dict[str, tuple[torch.Tensor, int, Tail]] = {
            f"{blocks * V_BLOCK_TOKENS} tokens": (
                torch.full(lists, blocks, device="cuda"),
                blocks,
                "renormalize",
            )
            for blocks in (16, 64)
        }
        ragged = ragged_counts(problem, 72)
        words = "576 tokens on average, ragged"
        cases[words] = (ragged, problem.max_blocks, "renormalize")
        cases[f"{words}, clipped tail"] = (ragged, problem.max_blocks, "clip")
        for words, (counts, columns, tail) in cases.items():
            timing = time_attend(batch, counts, columns, tail=tail)
            moved = int(counts.sum()) * 2 * problem.row_bytes
            rate = moved / timing.p50 * 1e3
            report.add(
                f"{problem.name}, {words}", timing, rate / 1e9, share_of_hbm_copy=rate / peak
            )
        if options.sweep:
            columns = problem.max_blocks
            usual = attend_config(problem.shape, problem.num_lists, problem.max_blocks)
            time = functools.partial(time_attend, batch, ragged, columns)
            sweep(problem, usual, attend_times(problem, time))
        batch.close()
    for problem in CODED_PROBLEMS:
        counts = ragged_counts(problem, CODED_BLOCKS)
        coded = CodedBatch.make(problem, num_slots=max(1 << 17, 4 * int(counts.sum())))
        view = coded.views[0]
        assert view.hot_cache is not None
        view.hot_cache.slots.random_(0, 100)  # no scale is infinite or NaN
        timing = time_coded(coded, counts)
        rate = int(counts.sum()) * view.shape.row.bytes / timing.p50 * 1e3
        report.add(
            f"{problem.name}, rows of int8, {CODED_BLOCKS * V_BLOCK_TOKENS} tokens, clipped tail",
            timing, rate / 1e9, share_of_hbm_copy=rate / peak,
        )  # fmt: skip
        if options.sweep:
            usual_rows = rows_config(
                view.shape,
                problem.num_lists,
                problem.max_blocks,
                torch.cuda.get_device_properties(0).multi_processor_count,
            )
            time_rows = functools.partial(time_coded, coded, counts)
            sweep(problem, usual_rows, rows_times(time_rows))
        del coded, view
    report.finish()


if __name__ == "__main__":
    main()
