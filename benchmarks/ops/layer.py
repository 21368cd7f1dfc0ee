# SPDX-License-Identifier: Apache-2.0
"""A layer of a decode step over K codes: when each kernel ends. `python -m benchmarks.ops.layer`.

Write, score, select and fetch, attend, as an engine launches them, of one layer after the other in
a graph: `write_us` from begin to end, each other kernel from the end of the one before, medians
over layers and replays. The rule is the default's, with a threshold that the mean list passes with
LIST_BLOCKS V blocks; everything selected is in the hot cache. What small batches cost is here,
without an engine.

Also of verification steps, of TOKENS tokens a request: of each the query is the request's and some
noise, so that their lists are much alike. `mean_blocks` is of the list of each token, and
`mean_shared_blocks` of the one that tokens have together.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.ops.common import (
    DTYPE,
    PAGE_TOKENS,
    SPLIT_LAYERS,
    Problem,
    Report,
    arguments,
    time_calls,
)
from benchmarks.ops.score_codes import TOKENS, CodedBatch, coded_shape
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels.decode import decode_step
from vllm_kcache.kernels.rows import write_rows
from vllm_kcache.kernels.select import own_lists, packed_view
from vllm_kcache.kernels.workspace import DecodeWorkspace
from vllm_kcache.reference.select import block_masses
from vllm_kcache.types import Selection

PROBLEMS = (
    Problem("llama-3-8b 1x4K", 1, 4096, 8, 4),
    Problem("llama-3-8b 4x4K", 4, 4096, 8, 4),
    Problem("llama-3-8b 1x32K", 1, 32768, 8, 4),
    Problem("llama-3-8b 26x32K", 26, 32768, 8, 4),
    Problem("llama-3-8b 53x32K", 53, 32768, 8, 4),
    Problem("llama-2-7b 1x16K", 1, 16384, 32, 1),
    *SPLIT_LAYERS,
)
SPECULATED = PROBLEMS[2:4]
LIST_BLOCKS = 49  # of a list: what the default selects in the replay
REPLAYS = 10
KERNELS = ("write", "score", "select", "attend")


class Layers:
    """The layers of a problem, of so many tokens of each request, over one workspace."""

    def __init__(self, problem: Problem, device: str = "cuda", tokens: int = 1) -> None:
        p, shape = problem, coded_shape(problem)
        rows = torch.zeros((p.num_pages * shape.rows_per_page, shape.row.bytes), dtype=torch.uint8)
        if device == "cuda":
            rows = rows.pin_memory()
        rows.random_(0, 60)  # no scale is infinite or NaN
        slots = 2 * p.num_lists * p.max_blocks
        coded = CodedBatch.make(p, host_rows=rows, num_slots=slots, tokens=tokens)
        self.batch = coded.batch
        rows_of_batch = self.batch.num_requests
        self.out = torch.empty_like(self.batch.query)
        size = (rows_of_batch, p.num_kv_heads, p.head_size)
        self.token = torch.randn(size, dtype=DTYPE, device=device)
        newest = self.batch.seq_lens.long() - 1
        pages = self.batch.block_table.gather(1, newest[:, None] // PAGE_TOKENS)[:, 0].long()
        self.slots = pages * PAGE_TOKENS + newest % PAGE_TOKENS
        probe = Selection(None, None, 1, 32, "max", 0.5)
        self.workspace = DecodeWorkspace.make(
            shape, probe, rows_of_batch, p.max_blocks, device, decode_tokens=tokens
        )
        self.views = [self._with(view, probe) for view in coded.views]
        self.run(self.views[0])
        lists = self.workspace.views(self.views[0], self.batch)
        exists = torch.ones((rows_of_batch, p.max_blocks), dtype=torch.bool, device=device)
        masses = block_masses(lists.block_lse, exists).unflatten(1, (p.num_kv_heads, -1)).amax(2)
        share = min(1.0, LIST_BLOCKS / p.max_blocks)
        threshold = float(masses.flatten().sort().values[int(masses.numel() * (1 - share))])
        rule = Selection(None, None, 1, 32, "max", threshold)
        self.views = [self._with(view, rule) for view in coded.views]

    @staticmethod
    def _with(view: LayerView, rule: Selection) -> LayerView:
        view = replace(view, selection=rule, tail="clip")
        return replace(view, packed=packed_view(view))

    def run(self, view: LayerView) -> None:
        """One layer."""
        dependent = self.workspace.dependent
        write_rows(
            view, self.token, self.token, self.slots, allocate_tokens=len(self.slots), fills=True,
            dependent=dependent,
        )  # fmt: skip
        decode_step(view, self.workspace, self.batch, self.out, after_write=True)

    def kernel_us(self) -> dict[str, float]:
        """Of each kernel, and of all together."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for view in self.views:
                self.run(view)
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(REPLAYS):
                graph.replay()
            torch.cuda.synchronize()
        found: dict[str, list[float]] = {name: [] for name in (*KERNELS, "layer")}
        begin = end = 0.0
        for event in sorted(profiled.events(), key=lambda event: event.time_range.start):
            name = next((name for name in KERNELS if f"{name}_kernel" in event.name), None)
            if name is None:
                continue
            if name == "write":
                begin = end = event.time_range.start
            found[name].append(event.time_range.end - end)
            end = event.time_range.end
            if name == "attend":
                found["layer"].append(end - begin)
        return {f"{name}_us": statistics.median(times) for name, times in found.items()}


def measure(problem: Problem, report: Report, tokens: int = 1) -> None:
    """The row of a problem, of so many tokens of each request."""
    layers = Layers(problem, tokens=tokens)
    timing = time_calls([lambda view=view: layers.run(view) for view in layers.views])
    view, batch = layers.views[0], layers.batch
    selected = layers.workspace.views(view, batch).selected
    own = own_lists(selected, batch.spans, batch.listed_together(view.shape))
    name, figures = problem.name, {"mean_blocks": float(own.counts.float().mean())}
    if tokens > 1:
        name += f", {tokens} tokens a request"
        figures["mean_shared_blocks"] = float(selected.counts[selected.counts > 0].float().mean())
    report.add(name, timing, **figures, **layers.kernel_us())


def main() -> None:
    options = arguments(__doc__)
    report = Report("layer", options.results)
    for problem in PROBLEMS:
        measure(problem, report)
    for problem in SPECULATED:
        measure(problem, report, TOKENS)
    report.finish()


if __name__ == "__main__":
    main()
