# SPDX-License-Identifier: Apache-2.0
"""How long a decode step takes, from the bytes it moves. Every constant says where it is from.

The model and how well it fits: docs/plan.md. Times are seconds, of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_kcache.plan_memory import Engine, kv_heads_of_rank
from vllm_kcache.plan_selection import interpolate
from vllm_kcache.plan_shape import ModelShape, PlanError


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
# One more kernel in the captured step: 4 waves against 2 of 7 kernels, 32 layers, one request, took
# 2.7 ms more for 448 kernels (6.0 us), and with 27 requests 0.9 ms more while 1.1 ms of fetch were
# hidden (4.5 us).
KERNEL_SECONDS = 5.5e-6
# Two all-reduces a layer on NVLink. Not measured here.
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
# Selected K and V lie in rows of 2 KiB all over the memory. Not measured alone.
ATTEND_SHARE = 0.6
# Select may take this share of the time of score: what its benchmark is held to. But one list takes
# as long as its scores need: 9.6 us for 2,048 blocks of one query head, 22.8 us for 4,096 of four
# (benchmarks/bench_select, a mass threshold).
SELECT_SHARE = 0.05
SELECT_SECONDS, SELECT_SECONDS_PER_SCORE = 7.7e-6, 0.92e-9
# Layout of a step (kernels/decode_plan.py); tests/test_plan.py compares the two.
WAVE_BYTES = 192 << 20
WAVE_LISTS = 48
MOST_WAVES = 4
OUTER_WAVE = 1 / 3
FOLLOWED_BLOCKS = 8192
# A kernel that selects and fetches behind the scoring: what it leaves exposed at the end (its last
# lists take longer beside scoring than alone), what it takes from scoring, and what each second of
# fetching costs. Fitted to benchmarks/bench_overlap (48 followers, 128 to 512 tokens a head, two
# shapes) and to the steps of benchmarks/results/decode.jsonl.
FOLLOW_SECONDS, FOLLOW_LISTS = 8e-6, 2
FOLLOW_SHARE_OF_SCORE = 0.03
FOLLOW_SHARE_OF_FETCH = 0.1


@dataclass(frozen=True)
class Kernels:
    """How an implementation launches a layer's decode.

    Attributes:
        per_wave: Kernels of each wave.
        per_layer: Kernels beside the waves; one more where attention is cut in two.
        follows: A large batch is selected and fetched behind its scoring, list by list.
        waves: Waves where it is not, or None for `plan_waves`.
        select_share: Time of select as a share of that of score.
        select_hidden: Select runs beside the score of the next wave.
    """

    per_wave: int = 2
    per_layer: int = 2
    follows: bool = True
    waves: int | None = None
    select_share: float = SELECT_SHARE
    select_hidden: bool = True


# Kernels of a stock layer's decode that ours replace: write of K and V, attention.
STOCK_KERNELS = 2


@dataclass(frozen=True)
class Batch:
    """The requests of a step: how many, and tokens of each."""

    requests: float
    context: float


@dataclass(frozen=True)
class SplitWork:
    """What the selection makes of a batch.

    Attributes:
        selected_tokens: Tokens a head that are attended, mean.
        hit_rate: Share of them that the hot V cache holds.
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
        select: Select where it is not hidden.
        fetch: Part of the fetch that nothing hides.
        attend: Attention over the selected tokens.
        launches: Kernels beyond those of a stock layer.
        fixed: What a stock step spends beside reading.
        fetch_hidden: Part of the fetch beside scoring; not in the sum.
        hbm_bytes: Read from GPU memory.
        pcie_bytes: Read from host memory.
    """

    weights: float
    cache: float
    fixed: float
    select: float = 0.0
    fetch: float = 0.0
    attend: float = 0.0
    launches: float = 0.0
    fetch_hidden: float = 0.0
    hbm_bytes: float = 0.0
    pcie_bytes: float = 0.0

    @property
    def seconds(self) -> float:
        """The step."""
        parts = (self.weights, self.cache, self.fixed, self.select, self.fetch, self.attend)
        return sum(parts) + self.launches


def _weights(shape: ModelShape, hardware: Hardware, engine: Engine, requests: float) -> float:
    ranks = engine.tensor_parallel_size
    read = shape.weight_bytes_of_step(requests) / hardware.hbm_bytes_per_s
    computed = requests * shape.flops_of_token() / hardware.flops
    return max(read, computed) / ranks


def _fixed(shape: ModelShape, engine: Engine) -> float:
    reduces = 2 * ALL_REDUCE_SECONDS if engine.tensor_parallel_size > 1 else 0.0
    return shape.num_layers * (LAYER_SECONDS + reduces)


def stock_step(
    shape: ModelShape,
    hardware: Hardware,
    engine: Engine,
    batch: Batch,
    kv_itemsize: int | None = None,
) -> StepCost:
    """A decode step of stock vLLM with FlashAttention.

    Args:
        kv_itemsize: Bytes of a cached value; None takes the model's, 1 is fp8.
    """
    itemsize = kv_itemsize or shape.itemsize
    row = 2 * kv_heads_of_rank(shape, engine) * shape.head_size * itemsize
    cache_bytes = batch.requests * batch.context * shape.num_layers * row
    speed = hardware.hbm_bytes_per_s * (FP8_SHARE if itemsize == 1 else 1.0)
    weights = shape.weight_bytes_of_step(batch.requests) / engine.tensor_parallel_size
    return StepCost(
        weights=_weights(shape, hardware, engine, batch.requests),
        cache=cache_bytes / speed,
        fixed=_fixed(shape, engine),
        hbm_bytes=weights + cache_bytes,
    )


def plan_waves(
    requests: float, num_kv_heads: int, max_tokens: int, head_size: int, itemsize: int
) -> int:
    """Waves of a step whose longest request may have `max_tokens` tokens."""
    k_bytes = int(requests) * num_kv_heads * max_tokens * head_size * itemsize
    by_lists = int(requests) * num_kv_heads // WAVE_LISTS
    return max(1, min(k_bytes // WAVE_BYTES, by_lists, num_kv_heads, MOST_WAVES))


def split_step(
    shape: ModelShape,
    hardware: Hardware,
    engine: Engine,
    batch: Batch,
    work: SplitWork,
    kernels: Kernels | None = None,
) -> StepCost:
    """A decode step of the split cache.

    Raises:
        PlanError: A share or count that cannot be.
    """
    if not 0 <= work.hit_rate <= 1:
        raise PlanError(f"hit_rate={work.hit_rate}: must be 0 to 1")
    kernels = kernels or Kernels()
    heads = kv_heads_of_rank(shape, engine)
    row = heads * shape.head_size * shape.itemsize
    layers = shape.num_layers - work.dense_layers
    selected = min(work.selected_tokens, batch.context)
    # Of one layer.
    k_bytes = batch.requests * batch.context * row
    selected_bytes = batch.requests * selected * row
    fetched_bytes = selected_bytes * (1 - work.hit_rate)
    row_bytes = work.v_block_tokens * shape.head_size * shape.itemsize
    link = hardware.pcie_bytes_per_s * interpolate(LINK_SHARE, row_bytes)
    score = k_bytes / hardware.hbm_bytes_per_s
    attend = 2 * selected_bytes / (hardware.hbm_bytes_per_s * ATTEND_SHARE)
    scores = batch.context / work.v_block_tokens * shape.num_query_heads / shape.num_kv_heads
    one_list = SELECT_SECONDS + SELECT_SECONDS_PER_SCORE * scores
    select, fetch = max(kernels.select_share * score, one_list), fetched_bytes / link
    waves = kernels.waves or plan_waves(
        batch.requests, heads, engine.max_model_len, shape.head_size, shape.itemsize
    )
    behind = fetch + (select if kernels.select_hidden else 0.0)
    max_blocks = engine.max_model_len / work.v_block_tokens
    if kernels.follows and waves > 1 and max_blocks <= FOLLOWED_BLOCKS:
        waves, exposed = 1, followed_seconds(score, fetch, one_list)
    else:
        exposed = exposed_seconds(score, behind, attend, waves)
    extra = waves * kernels.per_wave + kernels.per_layer + (waves > 1) - STOCK_KERNELS
    dense = stock_step(shape, hardware, engine, batch)
    dense_share = work.dense_layers / shape.num_layers
    return StepCost(
        weights=dense.weights,
        cache=layers * score + dense.cache * dense_share,
        fixed=dense.fixed,
        select=0.0 if kernels.select_hidden else layers * select,
        fetch=layers * exposed,
        attend=layers * attend,
        launches=layers * extra * KERNEL_SECONDS,
        fetch_hidden=layers * max(0.0, behind - exposed),
        hbm_bytes=dense.hbm_bytes * dense_share
        + (1 - dense_share)
        * shape.weight_bytes_of_step(batch.requests)
        / engine.tensor_parallel_size
        + layers * (k_bytes + 2 * selected_bytes),
        pcie_bytes=layers * fetched_bytes,
    )


def wave_shares(waves: int) -> list[float]:
    """Share of the KV heads in each wave; between whole heads the step rounds."""
    sizes = [1.0] * waves
    if waves > 2:
        sizes[0] = OUTER_WAVE
    if waves > 1:
        sizes[-1] = OUTER_WAVE
    return [size / sum(sizes) for size in sizes]


def exposed_seconds(score: float, behind: float, attend: float, waves: int) -> float:
    """What a layer waits for select and fetch.

    Wave i selects and fetches while wave i + 1 is scored; attention over all waves but the last
    runs beside the last one's fetch.

    Args:
        score, behind, attend: Seconds of a layer's scoring, of its select and fetch, of attention.
        waves: Waves; one hides nothing.
    """
    shares = wave_shares(waves)
    scored = fetched = before_last = 0.0
    for share in shares:
        before_last = fetched
        scored += score * share
        fetched = max(scored, fetched) + behind * share
    ended = max(scored, before_last) + attend * (1 - shares[-1])
    return max(ended, fetched) + attend * shares[-1] - score - attend


def followed_seconds(score: float, fetch: float, one_list: float) -> float:
    """What a layer waits for select and fetch where they follow the scoring list by list.

    Args:
        score, fetch: Seconds of a layer's scoring, and of its fetch alone.
        one_list: Seconds to select one list alone.
    """
    last = FOLLOW_SECONDS + FOLLOW_LISTS * one_list
    beside = last + FOLLOW_SHARE_OF_SCORE * score + FOLLOW_SHARE_OF_FETCH * fetch
    return max(beside, fetch - score)
