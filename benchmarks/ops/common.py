# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of the operations share: problems, timing by graph replay, rows.

Every benchmark measures the machine's copy bandwidths in its own run and gives its figures as
shares of them. A row is one JSON line in benchmarks/results/<operation>.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import RESULTS, append, command, origin
from vllm_kcache.cache import HostPool
from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.cache.hot_cache import HotCache
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels.select import packed_view
from vllm_kcache.kernels.workspace import DecodeBatch, DecodeWorkspace
from vllm_kcache.types import Selection, Tail

PAGE_TOKENS = 16
V_BLOCK_TOKENS = 8
# Layers of the hot cache: calls for one after the other never find what they need.
LAYERS = 8
DTYPE = torch.bfloat16
# Where a benchmark measures no selection.
ANY_RULE = Selection(16, None, 1, 32, "sum")


@dataclass(frozen=True)
class Problem:
    """One decode batch: all requests of one length."""

    name: str
    num_requests: int
    context: int
    num_kv_heads: int
    group: int
    head_size: int = 128

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def num_lists(self) -> int:
        return self.num_requests * self.num_kv_heads

    @property
    def max_blocks(self) -> int:
        return self.context // V_BLOCK_TOKENS

    @property
    def num_pages(self) -> int:
        return self.num_requests * self.context // PAGE_TOKENS

    @property
    def k_bytes(self) -> int:
        return self.num_lists * self.context * self.head_size * 2

    @property
    def shape(self) -> CacheShape:
        return CacheShape(
            LAYERS, self.num_heads, self.num_kv_heads, self.head_size, PAGE_TOKENS, V_BLOCK_TOKENS,
            DTYPE,
        )  # fmt: skip

    @property
    def row_bytes(self) -> int:
        return self.shape.row.bytes


PROBLEMS = (
    Problem("llama-2-7b 14x16K", 14, 16384, 32, 1),
    Problem("llama-3-8b 26x32K", 26, 32768, 8, 4),
    Problem("llama-2-7b 1x16K", 1, 16384, 32, 1),
)
# Those of models with other layers beside: other groups of query heads, other heads.
SPLIT_LAYERS = (
    Problem("gemma-3-27b 26x32K", 26, 32768, 16, 2),
    Problem("gpt-oss-20b 96x32K", 96, 32768, 8, 8, 64),
    Problem("qwen3.5-27b 26x32K", 26, 32768, 4, 6, 256),
)


@dataclass
class Batch:
    """Tensors of a problem, random: K pages, rows of one layer on the host, queries.

    Several sets of K pages in turn keep small ones out of the L2 cache.
    """

    problem: Problem
    query: torch.Tensor = field(init=False)
    k_layers: list[torch.Tensor] = field(init=False)
    block_table: torch.Tensor = field(init=False)
    seq_lens: torch.Tensor = field(init=False)
    pool: HostPool = field(init=False)

    def __post_init__(self) -> None:
        p = self.problem
        shape = (p.num_pages, p.num_kv_heads, PAGE_TOKENS, p.head_size)
        layers = max(1, min(LAYERS, (1 << 30) // p.k_bytes))
        self.k_layers = [torch.randn(shape, dtype=DTYPE, device="cuda") for _ in range(layers)]
        self.query = torch.randn(
            (p.num_requests, p.num_heads, p.head_size), dtype=DTYPE, device="cuda"
        )
        pages = torch.randperm(p.num_pages, device="cuda").int()
        self.block_table = pages.view(p.num_requests, -1)
        self.seq_lens = torch.full((p.num_requests,), p.context, dtype=torch.int32, device="cuda")
        self.pool = HostPool(1, p.num_pages * p.shape.rows_per_page, p.row_bytes, pinned=True)
        self.pool.layer(0).view(DTYPE).view(shape).copy_(self.k_layers[0])

    def hot_cache(self, num_slots: int) -> HotCache:
        """An empty cache of all layers."""
        return HotCache.make(num_slots, LAYERS, self.pool.num_rows, self.problem.row_bytes, "cuda")

    def view(
        self, selection: Selection, cache: HotCache, layer: int = 0, tail: Tail = "renormalize"
    ) -> LayerView:
        """A layer; all have the same rows on the host."""
        k_pages = self.k_layers[layer % len(self.k_layers)]
        rows = self.pool.layer(0)
        view = LayerView(layer, self.problem.shape, selection, tail, k_pages, rows, cache)
        return replace(view, packed=packed_view(view))

    def workspace(self, selection: Selection, max_blocks: int = 0) -> DecodeWorkspace:
        """Buffers for this batch; `max_blocks` where a graph is for longer requests."""
        p = self.problem
        return DecodeWorkspace.make(
            p.shape, selection, p.num_requests, max_blocks or p.max_blocks, "cuda"
        )

    def decode(self, max_blocks: int = 0) -> DecodeBatch:
        """The requests, as a step takes them."""
        p = self.problem
        return DecodeBatch(
            self.query, self.block_table, self.seq_lens, p.head_size**-0.5,
            max_blocks or p.max_blocks,
        )  # fmt: skip

    def close(self) -> None:
        torch.cuda.synchronize()
        self.pool.close()


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: percentiles over replays of a graph of several calls."""

    p20: float
    p50: float
    p80: float


def time_calls(calls: Sequence[Callable[[], Any]], replays: int = 15) -> Timing:
    """Time `calls`, captured one after the other in a graph; a figure is per call.

    The calls should work on different data, so that no call finds its inputs in the L2 cache.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(2):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = sorted(
        first.elapsed_time(second) / len(calls) for first, second in itertools.pairwise(events)
    )
    return Timing(*(times[int(len(times) * share)] for share in (0.2, 0.5, 0.8)))


def hbm_copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy, bytes read and bytes written together.

    The better of the driver's copy and of a kernel that copies: which one wins differs by machine.
    """
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)] * 4)
    kernel = time_calls([lambda: torch.neg(source, out=target)] * 4)
    return 2 * source.numel() * 4 / min(copy.p50, kernel.p50) * 1e3


def link_bandwidths() -> tuple[float, float]:
    """Bytes per second of copies from and to page-locked host memory."""
    host = torch.zeros(1 << 28, dtype=torch.uint8).pin_memory()
    device = torch.empty_like(host, device="cuda")
    inward = time_calls([lambda: device.copy_(host, non_blocking=True)])
    outward = time_calls([lambda: host.copy_(device, non_blocking=True)])
    return tuple(host.numel() / timing.p50 * 1e3 for timing in (inward, outward))  # type: ignore[return-value]


class Report:
    """Rows of one benchmark: a JSON line each, and a table at the end."""

    def __init__(self, operation: str, folder: Path) -> None:
        self.operation = operation
        self.rows: list[dict[str, Any]] = []
        self.path = folder / f"{operation}.jsonl"
        self.common = {**origin("torch", "triton"), "command": command()}

    def add(self, shape: str, timing: Timing, gb_per_s: float | None = None, **values: Any) -> None:
        """One row.

        Args:
            shape: what was measured, in words.
            gb_per_s: bytes that had to move over the median time, in 1e9 bytes per second.
            values: further columns; a float is kept to four digits.
        """
        row: dict[str, Any] = {"shape": shape, "ms": asdict(timing)}
        if gb_per_s is not None:
            row["gb_per_s"] = gb_per_s
        self.rows.append(row | values)

    def finish(self) -> None:
        """Write the rows and print the table."""
        for row in self.rows:
            append(self.path, {"operation": self.operation, **self.common, **row})
        print(f"\n{self.operation}: {self.common['gpu']}, commit {self.common['commit']}")
        for row in self.rows:
            rest = {k: v for k, v in row.items() if k not in ("shape", "ms")}
            text = "  ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items()
            )
            print(f"  {row['shape']:<44} {row['ms']['p50'] * 1e3:9.1f} us  {text}")


def arguments(description: str | None, sweep: bool = False) -> argparse.Namespace:
    """Command line of a benchmark; also refuses to run without a GPU and seeds the generator."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON lines")
    if sweep:
        parser.add_argument("--sweep", action="store_true", help="also try other launch shapes")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    torch.manual_seed(0)
    return options


def random_selection(
    problem: Problem, counts: torch.Tensor, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [B, Hkv, N] and counts [B, Hkv]: ascending, random, of the given list lengths."""
    order = torch.rand((*counts.shape, problem.max_blocks), device="cuda").argsort(-1).int()
    places = torch.arange(columns, device="cuda")
    blocks = order[..., :columns].clone()
    beyond = places >= counts[..., None]
    blocks = blocks.masked_fill(beyond, 2**30).sort(-1).values
    return blocks.masked_fill(blocks == 2**30, -1).contiguous(), counts.int().contiguous()
