# SPDX-License-Identifier: Apache-2.0
"""What fits: blocks of stock vLLM and of the split cache, by GPU and host memory.

The first functions say what the GPU runtime allocates; tests/integration/test_plan_sizes.py
compares them to the byte. Bytes are of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_kcache.config import KCacheConfig
from vllm_kcache.kernels.score_plan import chunk_blocks, num_chunks, padded
from vllm_kcache.planner.shape import ModelShape, PlanError

GIB = 2**30

# CUDA context, libraries and graphs: memory of two stock engines that was neither weights nor
# activations nor cache (docs/plan.md, "Memory").
OTHER_GPU_BYTES = 450_000_000
# Shares and sizes of integration/gpu_runtime.py.
HOT_CACHE_SHARE = 0.07
GROUP_REQUESTS = 64
WORKSPACE_BYTES = 256 << 20
PIECE_BYTES = 64 << 20
# Launch shape of kernels/attend.py, which sizes its partial results.
ATTEND_PROGRAMS, ATTEND_SPLITS = 1056, 6


@dataclass(frozen=True)
class Engine:
    """Engine arguments that decide what fits; names are vLLM's.

    Attributes:
        max_model_len: Longest request, tokens.
        max_num_seqs: Most requests of a step.
        max_num_batched_tokens: Most tokens of a step.
        block_size: S, tokens of a page.
        gpu_memory_utilization: Share of the GPU's memory that vLLM may use.
        tensor_parallel_size: Ranks that share the model.
    """

    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1


@dataclass(frozen=True)
class Fit:
    """What one engine can hold, per rank.

    Attributes:
        num_blocks: Pages.
        limited_by: "GPU memory" or "host memory".
        cache_bytes: GPU memory for pages.
        host_bytes: Host memory for V.
        hot_cache_bytes: GPU memory of the hot V cache.
        buffer_bytes: GPU memory of the split cache's other buffers.
    """

    num_blocks: int
    limited_by: str
    cache_bytes: int
    host_bytes: int = 0
    hot_cache_bytes: int = 0
    buffer_bytes: int = 0

    def requests(self, context: int, block_size: int) -> float:
        """Requests of `context` tokens that fit at once. vLLM keeps one block to itself."""
        return max(0, self.num_blocks - 1) / -(-context // block_size)


def kv_heads_of_rank(shape: ModelShape, engine: Engine) -> int:
    """KV heads of a rank: shared out, and repeated where there are fewer than ranks."""
    return max(1, shape.num_kv_heads // engine.tensor_parallel_size)


# What the runtime allocates.


def host_bytes_per_page(shape: ModelShape, engine: Engine, config: KCacheConfig) -> int:
    """Host memory of V of one page."""
    split = shape.num_layers - len(config.resolved_dense_layers(shape.num_layers))
    return split * _layer_page_bytes(shape, engine)


def gpu_bytes_per_page(shape: ModelShape, engine: Engine, config: KCacheConfig) -> tuple[int, int]:
    """GPU memory of one page: K (and V of dense layers); the residency table and the slots."""
    dense = len(config.resolved_dense_layers(shape.num_layers))
    split = shape.num_layers - dense
    tokens = v_block_tokens_of(shape, engine, config)
    rows = kv_heads_of_rank(shape, engine) * engine.block_size // tokens
    tables = 4 * (split * rows + engine.block_size)
    return (split + 2 * dense) * _layer_page_bytes(shape, engine), tables


def gpu_fixed_bytes(shape: ModelShape, engine: Engine, config: KCacheConfig) -> int:
    """GPU memory of the buffers of a decode step, and of staging and scratch of prefills."""
    return _decode_bytes(shape, engine, config) + _prefill_bytes(shape, engine)


def hot_cache_bytes(
    available_bytes: int, shape: ModelShape, engine: Engine, config: KCacheConfig
) -> int:
    """GPU memory of the hot V cache where K pages, tables and it share `available_bytes`."""
    tokens = v_block_tokens_of(shape, engine, config)
    slot = tokens * shape.head_size * shape.itemsize + 8
    asked = config.hot_cache_gib
    wanted = available_bytes * HOT_CACHE_SHARE if asked == "auto" else float(asked) * GIB
    return max(1, int(min(wanted, available_bytes)) // slot) * slot


def v_block_tokens_of(shape: ModelShape, engine: Engine, config: KCacheConfig) -> int:
    """T."""
    return config.resolved_v_block_tokens(shape.head_size, shape.itemsize, engine.block_size)


def _layer_page_bytes(shape: ModelShape, engine: Engine) -> int:
    heads = kv_heads_of_rank(shape, engine)
    return heads * shape.head_size * engine.block_size * shape.itemsize


def _decode_bytes(shape: ModelShape, engine: Engine, config: KCacheConfig) -> int:
    v_block_tokens = v_block_tokens_of(shape, engine, config)
    selection = config.selection(v_block_tokens)
    query_heads = shape.num_query_heads // engine.tensor_parallel_size
    kv_heads = kv_heads_of_rank(shape, engine)
    max_blocks = -(-engine.max_model_len // v_block_tokens)
    group = query_heads // kv_heads
    in_chunk = chunk_blocks(shape.head_size, shape.itemsize, v_block_tokens)
    scores = max_blocks + num_chunks(max_blocks, in_chunk)
    columns = max_blocks if selection.top_n is None else min(selection.top_n, max_blocks)
    padded_head = padded(shape.head_size)
    rows_of_head = 1 if selection.clip is None else 2

    def of_requests(count: int) -> int:
        lists = count * kv_heads
        words = count * query_heads * (scores + 1) + 4 * lists * columns + 3 * lists
        parts = (ATTEND_PROGRAMS + ATTEND_SPLITS * lists) * group * rows_of_head
        return 4 * (words + parts * (padded_head + 2) + lists)

    one, two = of_requests(1), of_requests(2)
    room = 1 + max(0, WORKSPACE_BYTES - one) // (two - one)
    return of_requests(min(GROUP_REQUESTS, engine.max_num_seqs, room))


def _prefill_bytes(shape: ModelShape, engine: Engine) -> int:
    row = kv_heads_of_rank(shape, engine) * shape.head_size * shape.itemsize
    pages = max(1, PIECE_BYTES // row // engine.block_size, engine.max_num_seqs)
    return (engine.max_num_batched_tokens + 3 * pages * engine.block_size) * row


# What fits.


def activation_bytes(shape: ModelShape, engine: Engine) -> int:
    """Peak of one layer on the largest step: gate and up, their product, and four vectors."""
    inner = 3 * shape.intermediate_size / engine.tensor_parallel_size
    width = inner + 4 * shape.hidden_size
    return int(engine.max_num_batched_tokens * width * shape.itemsize)


def cache_bytes_gpu(shape: ModelShape, engine: Engine, gpu_memory_bytes: float) -> int:
    """GPU memory that vLLM leaves for the cache.

    Raises:
        PlanError: Nothing is left.
    """
    weights = shape.weight_bytes // engine.tensor_parallel_size
    used = weights + activation_bytes(shape, engine) + OTHER_GPU_BYTES
    left = int(gpu_memory_bytes * engine.gpu_memory_utilization) - used
    if left <= 0:
        raise PlanError(
            f"{shape.name}: weights of {weights / GIB:.1f} GiB and "
            f"{(used - weights) / GIB:.1f} GiB beside them do not fit in "
            f"{engine.gpu_memory_utilization:.2f} x {gpu_memory_bytes / GIB:.1f} GiB. Use a larger "
            "GPU, --tensor-parallel-size, or --weight-bits for quantised weights."
        )
    return left


def fit_stock(
    shape: ModelShape, engine: Engine, gpu_memory_bytes: float, kv_itemsize: int | None = None
) -> Fit:
    """Blocks of stock vLLM.

    Args:
        kv_itemsize: Bytes of a cached value; None takes the model's, 1 is fp8.
    """
    available = cache_bytes_gpu(shape, engine, gpu_memory_bytes)
    values = _layer_page_bytes(shape, engine) // shape.itemsize
    page = 2 * shape.num_layers * values * (kv_itemsize or shape.itemsize)
    return Fit(available // page, "GPU memory", available)


def fit_split(
    shape: ModelShape,
    engine: Engine,
    gpu_memory_bytes: float,
    host_budget_bytes: float,
    config: KCacheConfig,
) -> Fit:
    """Blocks of the split cache: the least of what K needs on the GPU and V on the host.

    Args:
        host_budget_bytes: Host memory for V of all ranks together.
    """
    buffers = gpu_fixed_bytes(shape, engine, config)
    left = max(0, cache_bytes_gpu(shape, engine, gpu_memory_bytes) - buffers)
    hot = hot_cache_bytes(left, shape, engine, config)
    page, tables = gpu_bytes_per_page(shape, engine, config)
    v_page = host_bytes_per_page(shape, engine, config)
    on_gpu = max(0, left - hot) // (page + tables)
    on_host = int(host_budget_bytes / engine.tensor_parallel_size) // v_page
    blocks = min(on_gpu, on_host)
    return Fit(
        num_blocks=blocks,
        limited_by="host memory" if on_host < on_gpu else "GPU memory",
        cache_bytes=blocks * page,
        host_bytes=blocks * v_page,
        hot_cache_bytes=hot,
        buffer_bytes=buffers + blocks * tables,
    )
