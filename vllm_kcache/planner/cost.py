# SPDX-License-Identifier: Apache-2.0
"""How long a decode step takes, from the bytes it moves: a roofline. Times are seconds, of a rank.

Every constant says where it is from; how well they fit: docs/plan.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.planner.memory import Engine, kv_heads_of_rank
from vllm_kcache.planner.selection import interpolate
from vllm_kcache.planner.shape import ModelShape


@dataclass(frozen=True)
class Hardware:
    """One GPU and its link.

    Attributes:
        name: For the report.
        gpu_memory_bytes: All memory of the GPU, as CUDA reports it.
        hbm_bytes_per_s: Reached by kernels that read.
        pcie_bytes_per_s: Reached by a copy from pinned host memory.
        flops: Reached by matrix products of two-byte values.
        source: Where the figures are from.
        layer_seconds: What a layer of a stock step takes beside reading: launches, norms, small
            kernels.
        fp8_share: Speed at which stock attention reads an fp8 cache, as a share of that of bf16.
        split_layer_seconds: What a layer of the split cache adds to that: launches, selection,
            kernels that start and end one after the other.
    """

    name: str
    gpu_memory_bytes: float
    hbm_bytes_per_s: float
    pcie_bytes_per_s: float
    flops: float
    source: str
    layer_seconds: float
    fp8_share: float
    split_layer_seconds: float


# Stock bf16 decode on an H100: 1 against 7 requests of 16K (Llama-2-7B shape) and 1 against 13 of
# 32K (Llama-3-8B shape) differ by 51.5 GB in 16.6 ms and by 51.5 GB in 16.7 ms. What remains of
# the steps is 1.88 ms for 32 layers. fp8: 14 against 1 requests of 16K took 23.4 ms for 55.8 GB
# (2.39 TB/s), 26 against 1 of 32K 23.3 ms for 53.7 GB (2.30).
H100_READ_BYTES_PER_S = 3.10e12
H100_LAYER_SECONDS = 1.88e-3 / 32
H100_FP8_SHARE = 2.35 / 3.10
# This and FETCH_NOTICED are fitted to the rows of benchmarks/results/decode.jsonl, of k_bits 16.
H100_SPLIT_LAYER_SECONDS = 30e-6
# As a share of the data sheet's 3.35 TB/s; a GPU that was not measured is taken to reach as much.
HBM_SHARE = H100_READ_BYTES_PER_S / 3.35e12
_SHEET = "data sheet; memory taken to reach the share that an H100 reaches"

HARDWARE = {
    "h100": Hardware(
        "NVIDIA H100 80GB HBM3", 79.1 * 2**30, H100_READ_BYTES_PER_S, 54.6e9, 600e12, "measured",
        H100_LAYER_SECONDS, H100_FP8_SHARE, H100_SPLIT_LAYER_SECONDS,
    ),
    # Fitted to steps of 1 to 192 requests of 4K, 32K and 120K, 8B shape (docs/plan.md).
    "h200": Hardware(
        "NVIDIA H200", 139.8 * 2**30, 3.95e12, 55.2e9, 600e12, "measured", 34e-6, 0.70, 26e-6
    ),
    "a100": Hardware(
        "NVIDIA A100 80GB", 79.1 * 2**30, 2.04e12 * HBM_SHARE, 25e9, 240e12, _SHEET,
        H100_LAYER_SECONDS, H100_FP8_SHARE, H100_SPLIT_LAYER_SECONDS,
    ),
}  # fmt: skip

# The share of the fetch that a step notices although it runs beside scoring: of exact K. Scores of
# codes are there so soon that nothing is fetched before the last.
FETCH_NOTICED = 0.2
# Scoring from codes (benchmarks/results/score_codes.jsonl): a kernel's start, which of exact K is
# in split_layer_seconds, and then the speed of other kernels that read; by the query heads of a KV
# head, less where the products count.
CODE_START_SECONDS = 8e-6
CODE_SHARE = ((4, 1.0), (8, 0.84))
# What a layer with experts takes beside another: routing, sorting tokens by expert, products in
# groups. gpt-oss-20b shape, one request of 32K and of 130K, bf16 and fp8 cache: 26 to 37 us.
EXPERTS_SECONDS = 30e-6
# Two all-reduces a layer on NVLink. Assumed.
ALL_REDUCE_SECONDS = 15e-6
# A kernel reading mapped host memory in random rows, as a share of a copy: bytes of a row, share.
# Measured on PCIe 5 x16: 6.0, 11.1, 19.9, 36.1, 49.8 and 50.3 GB/s against 54.6.
LINK_SHARE = (
    (128, 6.0 / 54.6),
    (256, 11.1 / 54.6),
    (512, 19.9 / 54.6),
    (1024, 36.1 / 54.6),
    (2048, 49.8 / 54.6),
    (4096, 50.3 / 54.6),
)
# Selected K and V lie in pieces of some 2 KiB all over the memory, and lists differ in length: on
# an H200 ragged lists were read at 28% and 30% of a copy (benchmarks/results/attend.jsonl).
ATTEND_SHARE = 0.3


@dataclass(frozen=True)
class SplitWork:
    """What the selection makes of a batch.

    Attributes:
        selected_tokens: Tokens a head that are attended, mean.
        hit_rate: Share of them that the hot cache holds, 0 to 1.
        cache: The split layers: what pages and rows hold.
        group_requests: Requests that decode together; more of them decode one group after another.
    """

    selected_tokens: float
    hit_rate: float
    cache: CacheShape
    group_requests: int


@dataclass(frozen=True)
class StepCost:
    """Where a step's time goes, seconds, and what it moves, bytes.

    Attributes:
        weights: Reading the weights, or computing with them.
        cache: Stock attention over K and V; of a split layer, scoring all K or its codes; of a
            linear layer, reading and writing its state.
        fixed: What a stock step spends beside reading.
        fetch: What the fetch of rows from the host adds to the step.
        attend: Attention over the selected tokens.
        launches: What the split adds whatever the batch: launches and selection.
        fetch_hidden: The rest of the fetch, beside scoring; not in the sum.
        hbm_bytes: Read from GPU memory.
        pcie_bytes: Read from host memory.
    """

    weights: float
    cache: float
    fixed: float
    fetch: float = 0.0
    attend: float = 0.0
    launches: float = 0.0
    fetch_hidden: float = 0.0
    hbm_bytes: float = 0.0
    pcie_bytes: float = 0.0

    @property
    def seconds(self) -> float:
        """The step."""
        return self.weights + self.cache + self.fixed + self.fetch + self.attend + self.launches


def stock_step(
    shape: ModelShape,
    hardware: Hardware,
    engine: Engine,
    requests: float,
    context: float,
    kv_itemsize: int | None = None,
) -> StepCost:
    """A decode step of stock vLLM with FlashAttention.

    Args:
        requests, context: Requests of the step, tokens of each.
        kv_itemsize: Bytes of a cached value; None takes the model's, 1 is fp8.
    """
    itemsize, ranks = kv_itemsize or shape.itemsize, engine.tensor_parallel_size
    row = 2 * kv_heads_of_rank(shape, engine) * shape.head_size * itemsize
    cache_bytes = requests * (context * shape.num_full_layers + shape.window_tokens(context)) * row
    state_bytes = _state_bytes(shape, engine, requests)
    weight_bytes = shape.weight_bytes_of_step(requests)
    computed = requests * shape.flops_of_token() / hardware.flops
    reduces = 2 * ALL_REDUCE_SECONDS if ranks > 1 else 0.0
    experts = EXPERTS_SECONDS if shape.num_experts else 0.0
    return StepCost(
        weights=max(weight_bytes / hardware.hbm_bytes_per_s, computed) / ranks,
        cache=cache_bytes
        / (hardware.hbm_bytes_per_s * (hardware.fp8_share if itemsize == 1 else 1.0))
        + state_bytes / hardware.hbm_bytes_per_s,
        fixed=shape.num_layers * (hardware.layer_seconds + experts + reduces),
        hbm_bytes=weight_bytes / ranks + cache_bytes + state_bytes,
    )


def _state_bytes(shape: ModelShape, engine: Engine, requests: float) -> float:
    """Bytes that a step reads and writes of the states of its requests."""
    return 2 * requests * shape.request_state_bytes / engine.tensor_parallel_size


def split_step(
    shape: ModelShape,
    hardware: Hardware,
    engine: Engine,
    requests: float,
    context: float,
    work: SplitWork,
) -> StepCost:
    """A decode step of the split cache; arguments as for `stock_step`.

    A layer scores all K while rows of the lists already scored are fetched, and takes the longer of
    the two, or it scores all codes and fetches then; and attends: to K in its pages and V in rows,
    or to rows alone.
    """
    stock = stock_step(shape, hardware, engine, requests, context)
    cache = work.cache
    lists = requests * cache.num_kv_heads
    score_bytes = lists * context * cache.k_token_bytes
    groups = max(1, math.ceil(requests / work.group_requests))
    launches = cache.num_layers * groups
    score = launches * score_seconds(cache, hardware, score_bytes / groups)
    rows = cache.num_layers * lists * min(work.selected_tokens, context) / cache.block_tokens
    fetched_bytes = rows * cache.row.bytes * (1 - work.hit_rate)
    fetch = fetched_bytes / (hardware.pcie_bytes_per_s * interpolate(LINK_SHARE, cache.row.bytes))
    noticed = fetch if cache.k_bits == 4 else max(FETCH_NOTICED * fetch, fetch - score)
    attended_bytes = rows * cache.row.bytes
    if not cache.row.has_keys:
        attended_bytes += rows * cache.block_score_bytes
    # Of what stock reads, the part of layers that are not split.
    attended = context * shape.num_full_layers + shape.window_tokens(context)
    dense_share = 1 - context * cache.num_layers / attended
    weight_bytes = shape.weight_bytes_of_step(requests) / engine.tensor_parallel_size
    state_bytes = _state_bytes(shape, engine, requests)
    state = state_bytes / hardware.hbm_bytes_per_s
    launch = hardware.split_layer_seconds - (CODE_START_SECONDS if cache.k_bits == 4 else 0)
    return StepCost(
        weights=stock.weights,
        cache=score + (stock.cache - state) * dense_share + state,
        fixed=stock.fixed,
        fetch=noticed,
        attend=attended_bytes / (hardware.hbm_bytes_per_s * ATTEND_SHARE),
        launches=launches * launch,
        fetch_hidden=fetch - noticed,
        hbm_bytes=weight_bytes
        + (stock.hbm_bytes - weight_bytes - state_bytes) * dense_share
        + state_bytes
        + cache.num_layers * score_bytes
        + attended_bytes,
        pcie_bytes=fetched_bytes,
    )


def score_seconds(cache: CacheShape, hardware: Hardware, score_bytes: float) -> float:
    """One launch of scoring, which reads so many bytes of K, or of its codes."""
    seconds = score_bytes / hardware.hbm_bytes_per_s
    if cache.k_bits == 16:
        return seconds
    return CODE_START_SECONDS + seconds / interpolate(CODE_SHARE, cache.group)
