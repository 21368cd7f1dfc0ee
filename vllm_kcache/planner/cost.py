# SPDX-License-Identifier: Apache-2.0
"""How long a decode step takes, from the bytes it moves: a roofline. Times are seconds, of a rank.

Every constant says where it is from; how well they fit: docs/plan.md.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    name: str
    gpu_memory_bytes: float
    hbm_bytes_per_s: float
    pcie_bytes_per_s: float
    flops: float
    source: str


# Stock bf16 decode on an H100: 1 against 7 requests of 16K (Llama-2-7B shape) and 1 against 13 of
# 32K (Llama-3-8B shape) differ by 51.5 GB in 16.6 ms and by 51.5 GB in 16.7 ms.
H100_READ_BYTES_PER_S = 3.10e12
# As a share of the data sheet's 3.35 TB/s; other GPUs are taken to reach as much of theirs.
HBM_SHARE = H100_READ_BYTES_PER_S / 3.35e12
_SHEET = "data sheet; memory taken to reach the share that an H100 reaches"

HARDWARE = {
    "h100": Hardware(
        "NVIDIA H100 80GB HBM3", 79.1 * 2**30, H100_READ_BYTES_PER_S, 54.6e9, 600e12, "measured"
    ),
    "h200": Hardware("NVIDIA H200", 139.8 * 2**30, 4.8e12 * HBM_SHARE, 54.6e9, 600e12, _SHEET),
    "a100": Hardware("NVIDIA A100 80GB", 79.1 * 2**30, 2.04e12 * HBM_SHARE, 25e9, 240e12, _SHEET),
}

# Stock attention over an fp8 cache reads at this share of the speed of bf16: 14 against 1 requests
# of 16K took 23.4 ms for 55.8 GB (2.39 TB/s), 26 against 1 of 32K 23.3 ms for 53.7 GB (2.30).
FP8_SHARE = 2.35 / 3.10
# What remains of the measured stock steps: 1.88 ms for 32 layers. Launches, norms, small kernels.
LAYER_SECONDS = 1.88e-3 / 32
# What a layer of the split cache adds to that: launches, selection, kernels that start and end one
# after the other. And the share of the fetch that a step notices although it runs beside scoring.
# Both fitted to the rows of benchmarks/results/decode.jsonl.
SPLIT_LAYER_SECONDS = 34e-6
FETCH_NOTICED = 0.3
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
# Selected K and V lie in rows of 2 KiB all over the memory. Assumed; the term is small.
ATTEND_SHARE = 0.6


@dataclass(frozen=True)
class SplitWork:
    """What the selection makes of a batch.

    Attributes:
        selected_tokens: Tokens a head that are attended, mean.
        hit_rate: Share of them that the hot V cache holds, 0 to 1.
        v_block_tokens: T.
        dense_layers: Layers that keep K and V on the GPU.
    """

    selected_tokens: float
    hit_rate: float
    v_block_tokens: int
    dense_layers: int = 0


@dataclass(frozen=True)
class StepCost:
    """Where a step's time goes, seconds, and what it moves, bytes.

    Attributes:
        weights: Reading the weights, or computing with them.
        cache: Stock attention over K and V; of a split layer, scoring all K.
        fixed: What a stock step spends beside reading.
        fetch: What the fetch of V from the host adds to the step.
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
    cache_bytes = requests * context * shape.num_layers * row
    weight_bytes = shape.weight_bytes_of_step(requests)
    computed = requests * shape.flops_of_token() / hardware.flops
    reduces = 2 * ALL_REDUCE_SECONDS if ranks > 1 else 0.0
    return StepCost(
        weights=max(weight_bytes / hardware.hbm_bytes_per_s, computed) / ranks,
        cache=cache_bytes / (hardware.hbm_bytes_per_s * (FP8_SHARE if itemsize == 1 else 1.0)),
        fixed=shape.num_layers * (LAYER_SECONDS + reduces),
        hbm_bytes=weight_bytes / ranks + cache_bytes,
    )


def split_step(
    shape: ModelShape,
    hardware: Hardware,
    engine: Engine,
    requests: float,
    context: float,
    work: SplitWork,
) -> StepCost:
    """A decode step of the split cache; arguments as for `stock_step`.

    A layer scores all K while V of the lists already scored is fetched; it takes the longer of the
    two, then attends.
    """
    stock = stock_step(shape, hardware, engine, requests, context)
    row = kv_heads_of_rank(shape, engine) * shape.head_size * shape.itemsize
    layers = shape.num_layers - work.dense_layers
    dense_share = work.dense_layers / shape.num_layers
    k_bytes = layers * requests * context * row
    selected_bytes = layers * requests * min(work.selected_tokens, context) * row
    fetched_bytes = selected_bytes * (1 - work.hit_rate)
    row_bytes = work.v_block_tokens * shape.head_size * shape.itemsize
    link = hardware.pcie_bytes_per_s * interpolate(LINK_SHARE, row_bytes)
    score, fetch = k_bytes / hardware.hbm_bytes_per_s, fetched_bytes / link
    noticed = max(FETCH_NOTICED * fetch, fetch - score)
    stock_cache_bytes = 2 * requests * context * row * work.dense_layers
    return StepCost(
        weights=stock.weights,
        cache=score + stock.cache * dense_share,
        fixed=stock.fixed,
        fetch=noticed,
        attend=2 * selected_bytes / (hardware.hbm_bytes_per_s * ATTEND_SHARE),
        launches=layers * SPLIT_LAYER_SECONDS,
        fetch_hidden=fetch - noticed,
        hbm_bytes=shape.weight_bytes_of_step(requests) / engine.tensor_parallel_size
        + stock_cache_bytes
        + k_bytes
        + 2 * selected_bytes,
        pcie_bytes=fetched_bytes,
    )
