# SPDX-License-Identifier: Apache-2.0
"""What fits: blocks of stock vLLM and of the split cache, by GPU and host memory.

What the split cache takes is what vllm_kcache/memory.py plans for the engine. Bytes are of one
rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.config import KCacheConfig
from vllm_kcache.memory import GPUMemory, StepLimits, WindowPool, what_limits
from vllm_kcache.planner.shape import ModelShape, PlanError

GIB = 2**30

# CUDA context, libraries and graphs: unaccounted memory measured on two stock engines
# (docs/plan.md, "Memory").
OTHER_GPU_BYTES = 450_000_000
# Steps that vLLM runs at once: it schedules one while another runs.
STEPS_AT_ONCE = 2
_DTYPES = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32}


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
        num_speculative_tokens: Most drafts of a request in a step; 0 without such.
        enable_prefix_caching: Whether states are kept at the ends of pages.
    """

    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    num_speculative_tokens: int = 0
    enable_prefix_caching: bool = True

    @property
    def states_of_request(self) -> int:
        """Most states that a request holds in a layer: one after each draft, for it is not known
        yet how many are accepted; and with prefix caching that of the page before."""
        return 1 + self.num_speculative_tokens + self.enable_prefix_caching


@dataclass(frozen=True)
class Fit:
    """What one engine can hold, per rank.

    Attributes:
        num_blocks: Pages; beside window layers those of the full ones, of stock vLLM those of all.
        limited_by: "GPU memory", "host memory" or "max_num_seqs".
        remedy: What would let more requests in.
        cache_bytes: GPU memory for pages.
        gpu_bytes: GPU memory that the engine takes in all. Less than it may use where the hot cache
            holds all rows there can be.
        host_bytes: Host memory for rows.
        hot_cache_bytes: GPU memory of the hot cache.
        buffer_bytes: GPU memory of the split cache's other buffers.
        full_groups: Groups of layers that take a block for each of a request.
        window_groups: Groups that take a block for each of its window.
        window_blocks: Most blocks of a request in one of those.
        draft_blocks: Of these, blocks that a request of any length holds: states after drafts.
        window_pool_blocks: Blocks that are for those alone; 0 where they take of `num_blocks`.
        block_tokens: Tokens of a block; 0 for those of the engine.
    """

    num_blocks: int
    limited_by: str
    remedy: str
    cache_bytes: int
    gpu_bytes: int
    host_bytes: int = 0
    hot_cache_bytes: int = 0
    buffer_bytes: int = 0
    full_groups: int = 1
    window_groups: int = 0
    window_blocks: int = 0
    draft_blocks: int = 0
    window_pool_blocks: int = 0
    block_tokens: int = 0

    def requests(self, context: int, block_size: int) -> float:
        """Requests of `context` tokens that fit at once. vLLM keeps one block to itself."""
        blocks = -(-context // (self.block_tokens or block_size))
        held = self.draft_blocks + min(blocks, self.window_blocks - self.draft_blocks)
        within = self.window_groups * held
        free = max(0, self.num_blocks - 1)
        if self.window_pool_blocks:
            return min(free / blocks, self.window_pool_blocks / within)
        return free / (self.full_groups * blocks + within)


def kv_heads_of_rank(shape: ModelShape, engine: Engine) -> int:
    """KV heads of a rank: shared out, and repeated where there are fewer than ranks."""
    return max(1, shape.num_kv_heads // engine.tensor_parallel_size)


def cache_shape(shape: ModelShape, engine: Engine, config: KCacheConfig) -> CacheShape:
    """Geometry of the split layers of a rank."""
    others = {*shape.window_layers, *shape.state_layers}
    dense = config.resolved_dense_layers(shape.num_layers) - others
    return CacheShape(
        num_layers=shape.num_full_layers - len(dense),
        num_query_heads=shape.num_query_heads // engine.tensor_parallel_size,
        num_kv_heads=kv_heads_of_rank(shape, engine),
        head_size=shape.head_size,
        page_tokens=engine.block_size,
        block_tokens=config.resolved_v_block_tokens(
            shape.head_size, shape.itemsize, engine.block_size
        ),
        dtype=_DTYPES[shape.itemsize],
        k_bits=config.resolved_k_bits,
        host_dtype=config.resolved_host_dtype(_DTYPES[shape.itemsize]),
    )


def gpu_memory(shape: ModelShape, engine: Engine, config: KCacheConfig) -> GPUMemory:
    """What the engine plans its buffers by."""
    cache = cache_shape(shape, engine, config)
    return GPUMemory(cache, config.selection(cache.block_tokens), _limits(engine))


def k_page_bytes(shape: ModelShape, engine: Engine, config: KCacheConfig) -> int:
    """GPU memory of one page: K or its codes, and K and V of dense layers. Not of window layers,
    and not of states."""
    cache = cache_shape(shape, engine, config)
    split = cache.num_layers * cache.num_kv_heads * cache.page_tokens * cache.k_token_bytes
    return split + 2 * (shape.num_full_layers - cache.num_layers) * _layer_page_bytes(shape, engine)


def window_pool(shape: ModelShape, engine: Engine, config: KCacheConfig) -> WindowPool | None:
    """Blocks of window layers, or of states, beside pages, as the engine plans them; None without
    such layers."""
    if shape.state_layers:
        # A block is one state, whatever the length of a request.
        windows = [(1, engine.max_model_len)] * engine.states_of_request
        block_bytes = len(shape.state_layers) * _state_bytes(shape, engine)
    elif shape.window_layers:
        # Drafts are held beside the window.
        windows = [(shape.window + engine.num_speculative_tokens, engine.block_size)]
        block_bytes = 2 * len(shape.window_layers) * _layer_page_bytes(shape, engine)
    else:
        return None
    return WindowPool.plan(
        windows,
        block_bytes=block_bytes,
        page_bytes=k_page_bytes(shape, engine, config),
        page_tokens=engine.block_size,
        limits=_limits(engine),
        steps_at_once=STEPS_AT_ONCE,
    )


def _limits(engine: Engine) -> StepLimits:
    return StepLimits(
        engine.max_num_seqs, engine.max_num_batched_tokens, engine.max_model_len,
        1 + engine.num_speculative_tokens,
    )  # fmt: skip


def _state_bytes(shape: ModelShape, engine: Engine) -> int:
    """One state in one layer of a rank."""
    drafts = engine.num_speculative_tokens * shape.draft_state_bytes
    return (shape.state_bytes + drafts) // engine.tensor_parallel_size


def _layer_page_bytes(shape: ModelShape, engine: Engine) -> int:
    heads = kv_heads_of_rank(shape, engine)
    return heads * shape.head_size * engine.block_size * shape.itemsize


# What fits.


def activation_bytes(shape: ModelShape, engine: Engine) -> int:
    """Peak of one layer on the largest step: gate and up, their product, and four vectors."""
    inner = 3 * shape.intermediate_size / engine.tensor_parallel_size
    width = inner + 4 * shape.hidden_size
    return int(engine.max_num_batched_tokens * width * shape.itemsize)


def bytes_beside_cache(shape: ModelShape, engine: Engine) -> int:
    """GPU memory of weights, activations and all else that is no part of the cache."""
    weights = shape.weight_bytes // engine.tensor_parallel_size
    return weights + activation_bytes(shape, engine) + OTHER_GPU_BYTES


def cache_bytes_gpu(shape: ModelShape, engine: Engine, gpu_memory_bytes: float) -> int:
    """GPU memory that vLLM leaves for the cache.

    Raises:
        PlanError: Nothing is left.
    """
    weights = shape.weight_bytes // engine.tensor_parallel_size
    used = bytes_beside_cache(shape, engine)
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
    values, tokens = _layer_page_bytes(shape, engine) // shape.itemsize, engine.block_size
    full, windows = shape.num_full_layers, len(shape.window_layers) + len(shape.state_layers)
    if shape.state_layers:
        # A block holds a state, or K and V of as many tokens as need that memory.
        state = _state_bytes(shape, engine)
        times = -(-state // (2 * values * (kv_itemsize or shape.itemsize)))
        values, tokens = values * times, tokens * times
    # As vLLM groups layers: all groups are of one size, that of the smaller kind.
    size = min(full, windows) if windows else full
    if max(full, windows) < 1.5 * size:
        size = max(full, windows)
    page = 2 * size * values * (kv_itemsize or shape.itemsize)
    window = shape.window + engine.num_speculative_tokens
    return Fit(
        available // page,
        "GPU memory",
        "A larger --gpu-memory-utilization lets more requests in.",
        available,
        available + bytes_beside_cache(shape, engine),
        full_groups=-(-full // size),
        window_groups=-(-windows // size),
        window_blocks=engine.states_of_request
        if shape.state_layers
        else -(-window // engine.block_size) + 1,
        draft_blocks=engine.num_speculative_tokens if shape.state_layers else 0,
        block_tokens=tokens,
    )


def fit_split(
    shape: ModelShape,
    engine: Engine,
    gpu_memory_bytes: float,
    host_budget_bytes: float,
    config: KCacheConfig,
) -> Fit:
    """Blocks of the split cache: as many as pages on the GPU, rows on the host and requests allow.

    Args:
        host_budget_bytes: Host memory for rows of all ranks together.
    """
    memory = gpu_memory(shape, engine, config)
    buffers = memory.fixed_bytes
    left = max(0, cache_bytes_gpu(shape, engine, gpu_memory_bytes) - buffers)
    page, rows = k_page_bytes(shape, engine, config), memory.shape.host_page_bytes
    on_host = int(host_budget_bytes / engine.tensor_parallel_size) // rows
    window = window_pool(shape, engine, config)
    if window is None:
        blocks, slots = memory.plan(left, page, on_host, config.hot_cache_gib)
    else:
        beside, free = window.bytes_beside_page, left - window.fixed_bytes
        blocks, slots = memory.plan(free, page, on_host, config.hot_cache_gib, beside)
        if window.holds_most(blocks):
            free = left - window.most_bytes
            blocks, slots = memory.plan(free, page, on_host, config.hot_cache_gib)
    useful = memory.limits.useful_pages(memory.shape.page_tokens)
    limited_by, remedy = what_limits(blocks, on_host, useful, memory.shape)
    window_blocks = 0
    if window is not None:
        if blocks <= window.longest_pages:
            raise PlanError(
                f"{shape.name}: not one request of {engine.max_model_len} tokens fits, in pages "
                "of its full layers and blocks of the others. Lower --max-model-len or "
                "--max-num-batched-tokens."
            )
        window_blocks = window.blocks_for(blocks)
    cache_bytes = blocks * page + window_blocks * (window.block_bytes if window else 0)
    hot_cache_bytes, buffers = slots * memory.slot_bytes, buffers + blocks * memory.page_bytes
    return Fit(
        num_blocks=blocks,
        limited_by=limited_by,
        remedy=remedy,
        cache_bytes=cache_bytes,
        gpu_bytes=cache_bytes + hot_cache_bytes + buffers + bytes_beside_cache(shape, engine),
        host_bytes=blocks * rows,
        hot_cache_bytes=hot_cache_bytes,
        buffer_bytes=buffers,
        window_groups=1 if window else 0,
        window_blocks=window.request_blocks if window else 0,
        draft_blocks=engine.num_speculative_tokens if shape.state_layers else 0,
        window_pool_blocks=window_blocks - window.step_blocks if window else 0,
    )
