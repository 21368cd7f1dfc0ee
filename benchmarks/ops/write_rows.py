# SPDX-License-Identifier: Apache-2.0
"""Write codes and int8 rows of a decode step and of a prompt chunk, and gather rows as K and V.
`python -m benchmarks.ops.write_rows`.

Bytes counted of a chunk and of a context: rows over the link. With --sweep also other numbers of
thread blocks for what goes over it.
"""

from __future__ import annotations

import torch

from benchmarks.ops.common import (
    DTYPE,
    Problem,
    Report,
    arguments,
    link_bandwidths,
    time_calls,
)
from benchmarks.ops.score_codes import CodedBatch, coded_shape
from benchmarks.ops.write import CHUNK_TOKENS, random_slots
from vllm_kcache.cache import HostPool
from vllm_kcache.kernels.rows import LINK_BLOCKS, gather_rows, write_rows
from vllm_kcache.kernels.write import WriteParts

PROBLEMS = (
    Problem("llama-3-8b 26x32K", 26, 32768, 8, 4),
    Problem("llama-2-7b 14x16K", 14, 16384, 32, 1),
)
# Thread blocks of a launch that fills the link, with --sweep.
SWEPT = (16, 24, 48, 64, 96)


def measure_writes(
    report: Report, batch: CodedBatch, outward: float, sweep: tuple[int, ...]
) -> None:
    p, view = batch.problem, batch.views[0]
    key = torch.randn((CHUNK_TOKENS, p.num_kv_heads, p.head_size), dtype=DTYPE, device="cuda")

    def call(slots: torch.Tensor, parts: WriteParts, blocks: int, allocate_tokens: int) -> None:
        tokens = key[: len(slots)]
        write_rows(
            view, tokens, tokens, slots, parts=parts, most_thread_blocks=blocks,
            allocate_tokens=allocate_tokens,
        )  # fmt: skip

    some = [random_slots(p, p.num_requests, False) for _ in range(4)]
    timing = time_calls(
        [lambda slots=slots: call(slots, WriteParts.ALL, 0, p.num_requests) for slots in some]
    )
    report.add(f"{p.name}, decode step", timing)
    chunk = random_slots(p, CHUNK_TOKENS, True)
    resident = WriteParts.K | WriteParts.ROW_SLOT
    name = f"{p.name}, chunk of {CHUNK_TOKENS}"
    report.add(f"{name}, codes and slots", time_calls([lambda: call(chunk, resident, 0, 0)]))
    few = [(f"rows, {blocks} thread blocks", blocks) for blocks in sweep]
    for words, blocks in (("rows", 0), ("rows, few thread blocks", LINK_BLOCKS), *few):
        timing = time_calls([lambda blocks=blocks: call(chunk, WriteParts.ROW_HOST, blocks, 0)])
        rate = row_bytes(p, CHUNK_TOKENS) / timing.p50 * 1e3
        report.add(f"{name}, {words}", timing, rate / 1e9, share_of_link_copy=rate / outward)


def measure_gather(
    report: Report, batch: CodedBatch, inward: float, sweep: tuple[int, ...]
) -> None:
    p, view = batch.problem, batch.views[0]
    zero = torch.zeros(1, dtype=torch.int32, device="cuda")
    length, table = torch.full_like(zero, p.context), batch.batch.block_table[:1]
    size = (p.context, p.num_kv_heads, p.head_size)
    keys, values = (torch.empty(size, dtype=DTYPE, device="cuda") for _ in range(2))

    def call(blocks: int) -> None:
        gather_rows(view, table, zero, length, zero, p.context, keys, values, blocks)

    more = [(f", {blocks} thread blocks", blocks) for blocks in sweep]
    for words, blocks in (("", LINK_BLOCKS), *more):
        timing = time_calls([lambda blocks=blocks: call(blocks)])
        rate = row_bytes(p, p.context) / timing.p50 * 1e3
        report.add(
            f"{p.name}, context of {p.context}{words}", timing, rate / 1e9,
            share_of_link_copy=rate / inward,
        )  # fmt: skip


def row_bytes(problem: Problem, tokens: int) -> float:
    """Of so many tokens of a layer."""
    row = coded_shape(problem).row
    return tokens * problem.num_kv_heads * row.bytes / row.block_tokens


def main() -> None:
    options = arguments(__doc__, sweep=True)
    sweep = SWEPT if options.sweep else ()
    inward, outward = link_bandwidths()
    report = Report("write_rows", options.results)
    for problem in PROBLEMS:
        shape = coded_shape(problem)
        rows = problem.num_pages * shape.rows_per_page
        pool = HostPool(1, rows, shape.row.bytes, pinned=True)
        batch = CodedBatch.make(problem, host_rows=pool.layer(0), num_slots=1 << 16)
        measure_writes(report, batch, outward, sweep)
        measure_gather(report, batch, inward, sweep)
        torch.cuda.synchronize()
        pool.close()
    report.finish()


if __name__ == "__main__":
    main()
