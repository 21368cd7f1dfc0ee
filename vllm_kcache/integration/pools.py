# SPDX-License-Identifier: Apache-2.0
"""KV cache groups of a model with window layers: its full layers get a pool of their own.

Window layers are those with a sliding window, and those that attend within chunks (Llama 4). Layers
that keep a state (linear attention, Mamba) are beside the full ones as window layers are: a block
holds a state. With prefix caching a block of states covers as many tokens as a page, so that hits
end where pages do and vLLM copies no part of one: its V would stay behind.

vLLM gives all groups of layers one pool of blocks and one allocation, which each group reads in its
own way. Pages of K or codes are smaller than the window layers' blocks and would be padded to them;
bytes of codes would be read as K and V; and most ids would name no row of the host pool. So the
full layers, split and dense, form one group that draws its ids from a pool of its own: id, page and
rows of the host are one number again, as in a model of one group. The window layers keep vLLM's
pool to themselves. vLLM has all of this for a cache of its own: `host_resident` groups are counted
apart, a manager may have its own pool, and blocks go back to the pool that they came from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from vllm.platforms.interface import Platform
from vllm.utils.math_utils import round_up
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.hisparse.block_pool import SharedEventQueueBlockPool
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
    get_kv_cache_spec_kind,
    iter_layer_specs,
    replace_as,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_kcache.integration import refusals
from vllm_kcache.integration.patches import PatchRecord, wrap
from vllm_kcache.integration.settings import settings_of
from vllm_kcache.memory import StepLimits, WindowPool

try:
    from vllm.v1.core import kv_cache_planning as planning

    # Of the bytes that a worker asks for, vLLM 0.33 takes whole blocks.
    TAKES_WHOLE_BLOCKS = True
except ImportError:  # vLLM 0.32
    from vllm.v1.core import kv_cache_utils as planning

    TAKES_WHOLE_BLOCKS = False

WINDOW_SPECS = (SlidingWindowSpec, ChunkedLocalAttentionSpec, MambaSpec)
# The second pool begins at a multiple of so many bytes in the one allocation.
ALIGNMENT = 4096

_UPSTREAM = "HiSparse alone may have a second pool (0.33)."
_UNTIL = "A KV cache spec can bring a pool of its own (vLLM's RFC 42449)."
_GROUPS_RECORD = PatchRecord(
    target=f"{planning.__name__}.get_kv_cache_groups",
    why="It makes one pool for all layers, and pages of all groups equally large.",
    how="Beside sliding-window layers the full layers become one group, marked for its own pool.",
    upstream=_UPSTREAM,
    until=_UNTIL,
)
_CONFIG_RECORD = PatchRecord(
    target=f"{planning.__name__}.get_kv_cache_config_from_groups",
    why="It lays all groups over each other in one pool.",
    how="The memory is divided: the group marked for its own pool lies behind the others.",
    upstream=_UPSTREAM,
    until=_UNTIL,
)
_BLOCK_BYTES_RECORD = PatchRecord(
    target="vllm.v1.core.kv_cache_config_builder.KVCacheConfigBuilder._get_pool_bytes_per_block",
    why="vLLM 0.33 measures a block by a cache of one, in which the second pool would count.",
    how="Beside a second pool the bytes are those of the first, as in 0.32.",
    upstream=_UPSTREAM,
    until=_UNTIL,
)

_USAGE_RECORD = PatchRecord(
    target="vllm.v1.core.block_pool.BlockPool.get_usage",
    why="vLLM's figure of how full an engine is would be that of the window layers' pool alone.",
    how="It is that of the fuller of the two pools: the one that requests wait for.",
    upstream=_UPSTREAM,
    until=_UNTIL,
)

_CONCURRENCY_RECORD = PatchRecord(
    target=f"{kv_cache_utils.__name__}.get_max_concurrency_for_kv_cache_config",
    why="vLLM says at start, and in its metrics, how much fits. It gives each request the window "
    "blocks of a whole step's prompts, for which this pool has room once.",
    how="It is what fits in both pools as they are made, which our own lines of the log say, too.",
    upstream=_UPSTREAM,
    until=_UNTIL,
)

_ALIGN_RECORD = PatchRecord(
    target="vllm.platforms.interface.Platform._align_hybrid_block_size",
    why="It makes pages of K as large as the states of other layers: thousands of tokens.",
    how="Where the two have pools of their own a kept state covers as many tokens as a page.",
    upstream=_UPSTREAM,
    until=_UNTIL,
)

# Whether the worker of this process measures the memory of graphs, on a tiny cache.
_measuring = False


@dataclass(frozen=True, kw_only=True)
class OwnPoolSpec(FullAttentionSpec):
    """Cache of a full layer whose group has its own pool.

    Attributes:
        num_pages: Blocks of that pool; known when the configuration is made.
    """

    num_pages: int | None = None


class OwnPoolConfig(KVCacheConfig):
    """Layout of a cache whose full layers have their own pool."""

    @property
    def needs_kv_cache_zeroing(self) -> bool:
        """No: no block is read in another way than it was written."""
        return False


class OwnPoolManager(FullAttentionManager):
    """Gives out the pages of the full layers, from a pool of its own."""

    def __init__(self, kv_cache_spec: OwnPoolSpec, block_pool: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, block_pool, **kwargs)
        assert kv_cache_spec.num_pages is not None
        self._shared = block_pool
        self.block_pool = SharedEventQueueBlockPool(
            num_gpu_blocks=kv_cache_spec.num_pages,
            enable_caching=self.enable_caching,
            hash_block_size=block_pool.hash_block_size,
            enable_kv_cache_events=block_pool.enable_kv_cache_events,
            event_owner=block_pool,
        )
        self._null_block = self.block_pool.null_block
        block_pool.kcache_second_pool = self.block_pool

    def get_num_blocks_to_allocate(self, *args: Any, **kwargs: Any) -> int:
        """Blocks of the shared pool: none, or more than there are where this pool lacks pages.

        The scheduler compares the sum over all groups with the free blocks of the shared pool.
        """
        needed = super().get_num_blocks_to_allocate(*args, **kwargs)
        if needed > self.block_pool.get_num_free_blocks():
            return self._shared.num_gpu_blocks + 1
        return 0


def install() -> None:
    """Wrap how vLLM groups layers and lays out their memory."""
    wrap(planning, "get_kv_cache_groups", _with_own_group, _GROUPS_RECORD)
    wrap(planning, "get_kv_cache_config_from_groups", _with_own_pool, _CONFIG_RECORD)
    wrap(BlockPool, "get_usage", _of_the_fuller, _USAGE_RECORD)
    name = "get_max_concurrency_for_kv_cache_config"
    wrap(kv_cache_utils, name, _in_both_pools, _CONCURRENCY_RECORD)
    wrap(Platform, "_align_hybrid_block_size", _unless_apart, _ALIGN_RECORD)
    with contextlib.suppress(ImportError):
        from vllm.v1.core.kv_cache_config_builder import KVCacheConfigBuilder

        wrap(KVCacheConfigBuilder, "_get_pool_bytes_per_block", _of_first_pool, _BLOCK_BYTES_RECORD)


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """While this lasts vLLM may make a cache to measure graphs on: as many pages as blocks."""
    global _measuring
    _measuring = True
    try:
        yield
    finally:
        _measuring = False


@contextlib.contextmanager
def ids_of_both(kv_cache_config: Any) -> Iterator[None]:
    """While this lasts the configuration has no more blocks than pages.

    To warm up, vLLM's second runner makes steps of its own: of one count of ids, up to the number
    of blocks, each group gets some. Where pages are fewer, K would be written behind the last one.
    """
    blocks, pages = kv_cache_config.num_blocks, own_pool_pages(kv_cache_config)
    kv_cache_config.num_blocks = blocks if pages is None else min(blocks, pages)
    try:
        yield
    finally:
        kv_cache_config.num_blocks = blocks


def own_pool_pages(kv_cache_config: Any) -> int | None:
    """Pages of the full layers' own pool; None where all layers share one."""
    own = _own_group(kv_cache_config.kv_cache_groups)
    return None if own is None else kv_cache_config.hisparse_host_num_blocks


def window_pool(vllm_config: Any, specs: dict[str, KVCacheSpec]) -> WindowPool | None:
    """What the window layers of a rank take beside pages of its full layers.

    Args:
        vllm_config: vLLM's configuration, its layout of the cache resolved.
        specs: Layer name to cache spec, all layers of the rank.
    """
    if not any(type(spec) in WINDOW_SPECS for spec in specs.values()):
        return None
    groups = planning.get_kv_cache_groups(vllm_config, dict(specs))
    return None if _own_group(groups) is None else _window_pool(vllm_config, groups)


def bytes_asked(window: WindowPool, pages: int) -> int:
    """Bytes that the worker asks for, to get so many pages and the blocks that go with them: where
    vLLM takes whole blocks, as many as make no more pages than that."""
    asked = window.bytes_for(pages)
    if TAKES_WHOLE_BLOCKS:
        asked -= asked % window.block_bytes
        while asked > 0 and window.divide(asked)[1] > pages > window.longest_pages:
            asked -= window.block_bytes
    return asked


def _window_pool(vllm_config: Any, groups: list[KVCacheGroupSpec]) -> WindowPool:
    own = _own_group(groups)
    assert own is not None
    specs = [next(iter(iter_layer_specs(g.kv_cache_spec))) for g in groups if g is not own]
    scheduler = vllm_config.scheduler_config
    return WindowPool.plan(
        [each for spec in specs for each in _windows_and_blocks(vllm_config, spec)],
        block_bytes=planning._pool_bytes_per_block(vllm_config, groups),
        page_bytes=planning._get_kv_cache_bytes_per_block(
            [own], vllm_config.cache_config.get_resolved_kv_cache_layout()
        ),
        page_tokens=own.kv_cache_spec.block_size,
        limits=StepLimits(
            scheduler.max_num_seqs,
            scheduler.max_num_batched_tokens,
            vllm_config.model_config.max_model_len,
        ),
        steps_at_once=vllm_config.max_concurrent_batches,
    )


def _windows_and_blocks(vllm_config: Any, spec: Any) -> list[tuple[int, int]]:
    """Tokens that a request holds at most in a window layer, beside those of a step, and tokens of
    a block. Of states, each of which is a block, one entry for each that it holds at most: with
    prefix caching the last one beside the present one, and one within a prompt where the model can
    keep it. Those of earlier prompts are kept in blocks that are not held."""
    if isinstance(spec, MambaSpec):
        states = spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes
        return [(1, vllm_config.model_config.max_model_len)] * states
    # While drafts are verified a request holds them beside its window.
    window = getattr(spec, "sliding_window", None) or spec.attention_chunk_size
    return [(window + vllm_config.num_speculative_tokens, spec.block_size)]


def _own_group(groups: list[KVCacheGroupSpec]) -> KVCacheGroupSpec | None:
    """The group of the full layers, if it has its own pool."""
    for group in groups:
        if isinstance(next(iter(iter_layer_specs(group.kv_cache_spec)), None), OwnPoolSpec):
            return group
    return None


def _with_own_group(original: Callable) -> Callable:
    def get_kv_cache_groups(vllm_config: Any, kv_cache_spec: dict[str, Any]) -> list[Any]:
        windows = {name: spec for name, spec in kv_cache_spec.items() if type(spec) in WINDOW_SPECS}
        if settings_of(vllm_config) is None or not windows:
            return original(vllm_config, kv_cache_spec)
        full = {name: spec for name, spec in kv_cache_spec.items() if name not in windows}
        others = [spec for spec in full.values() if type(spec) is not FullAttentionSpec]
        if others:
            kinds = sorted({get_kv_cache_spec_kind(spec).value for spec in others})
            refusals.refuse("kv_cache_groups", f"sliding_window, {', '.join(kinds)}")
        refusals.check_beside_windows(vllm_config)
        if vllm_config.device_config.device_type == "cpu":
            windows = {name: _without_checkpoints(spec) for name, spec in windows.items()}
        KVCacheSpecRegistry._ensure_registered(vllm_config)
        KVCacheSpecRegistry.register(OwnPoolSpec, OwnPoolManager, FullAttentionSpec)
        own = {name: replace_as(spec, OwnPoolSpec) for name, spec in full.items()}
        (group,) = original(vllm_config, own)
        group.host_resident = True
        groups = [group, *original(vllm_config, windows)]
        # Of a head's layers the last block of a prefix is not to be reused; they are full ones, and
        # vLLM, which takes the last layer it is given for one of theirs, is not given them last.
        drafts = vllm_config.speculative_config
        for each in groups:
            each.is_eagle_group = (
                each is group and drafts is not None and drafts.use_eagle_block_drop()
            )
        return groups

    return get_kv_cache_groups


def _without_checkpoints(spec: Any) -> Any:
    """The spec of a layer whose kernel keeps no state within a prompt's chunk: chunks end there.

    vLLM's kernels of Mamba layers on a CPU return the last states only, and it fails at the first
    prompt that it asks for another.
    """
    if not isinstance(spec, MambaSpec):
        return spec
    return replace(spec, num_prefill_checkpoint_blocks=0, prefill_checkpoint_alignment=None)


def _with_own_pool(original: Callable) -> Callable:
    def get_kv_cache_config_from_groups(
        vllm_config: Any, kv_cache_groups: list[Any], available_memory: int
    ) -> KVCacheConfig:
        own = _own_group(kv_cache_groups)
        if own is None:
            return original(vllm_config, kv_cache_groups, available_memory)
        others = [group for group in kv_cache_groups if group is not own]
        window, cache_config = _window_pool(vllm_config, kv_cache_groups), vllm_config.cache_config
        blocks, pages = window.divide(available_memory)
        block_bytes = available_memory if _measuring else blocks * window.block_bytes
        config = original(vllm_config, others, block_bytes)
        if _measuring:
            pages = config.num_blocks
        elif cache_config.num_gpu_blocks_override is not None:
            pages = window.pages_for(config.num_blocks)
        own = replace(own, kv_cache_spec=_with_pages(own.kv_cache_spec, pages))
        override, cache_config.num_gpu_blocks_override = cache_config.num_gpu_blocks_override, None
        try:
            second = original(vllm_config, [own], pages * window.page_bytes)
        finally:
            cache_config.num_gpu_blocks_override = override
        begin = round_up(config.kv_cache_tensors[0].size, ALIGNMENT)
        size = begin + second.kv_cache_tensors[0].size
        changed = replace(
            config,
            kv_cache_groups=[own, *others],
            kv_cache_tensors=[
                *(replace(tensor, size=size) for tensor in config.kv_cache_tensors),
                *(
                    replace(tensor, size=size, offset=begin + tensor.offset, host_resident=True)
                    for tensor in second.kv_cache_tensors
                ),
            ],
            # vLLM's name for the blocks of the pool that is not its own.
            hisparse_host_num_blocks=pages,
        )
        return OwnPoolConfig(**{each.name: getattr(changed, each.name) for each in fields(changed)})

    return get_kv_cache_config_from_groups


def _unless_apart(original: Callable) -> Callable:
    def _align_hybrid_block_size(cls: Any, vllm_config: Any, backend_cls: Any) -> None:
        cache_config = vllm_config.cache_config
        if settings_of(vllm_config) is None:
            original(cls, vllm_config, backend_cls)
        elif cache_config.mamba_cache_mode == "align":
            cache_config.mamba_block_size = cache_config.block_size

    return _align_hybrid_block_size


def _of_first_pool(original: Callable) -> Callable:
    def _get_pool_bytes_per_block(self: Any, vllm_config: Any, kv_cache_groups: list[Any]) -> Any:
        if _own_group(kv_cache_groups) is None:
            return original(self, vllm_config, kv_cache_groups)
        return planning._pool_bytes_per_block(vllm_config, kv_cache_groups)

    return _get_pool_bytes_per_block


def _of_the_fuller(original: Callable) -> Callable:
    def get_usage(self: Any) -> float:
        second = getattr(self, "kcache_second_pool", None)
        return original(self) if second is None else max(original(self), original(second))

    return get_usage


def _in_both_pools(original: Callable) -> Callable:
    def get_max_concurrency_for_kv_cache_config(vllm_config: Any, kv_cache_config: Any) -> float:
        pages = own_pool_pages(kv_cache_config)
        if pages is None:
            return original(vllm_config, kv_cache_config)
        window = _window_pool(vllm_config, kv_cache_config.kv_cache_groups)
        return window.requests(pages, window.longest_pages, kv_cache_config.num_blocks)

    return get_max_concurrency_for_kv_cache_config


def _with_pages(spec: Any, pages: int) -> Any:
    """The spec of the group, with the size of its pool."""
    if not isinstance(spec, UniformTypeKVCacheSpecs):
        return replace(spec, num_pages=pages)
    specs = {name: replace(each, num_pages=pages) for name, each in spec.kv_cache_specs.items()}
    return replace(spec, kv_cache_specs=specs)
