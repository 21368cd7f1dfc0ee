# SPDX-License-Identifier: Apache-2.0
"""The pool of the full layers beside that of the window layers: layout, sizes, who waits for whom.

With vLLM's own planning and its own manager of blocks, on specs made by hand; without an engine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tests.integration.builders import configs_of
from vllm_kcache.config import KCacheConfig, KCacheConfigError
from vllm_kcache.planner.memory import Engine
from vllm_kcache.planner.memory import window_pool as planned_window_pool
from vllm_kcache.planner.shape import read_shape

pytestmark = pytest.mark.usefixtures("quick_vllm")

SHAPES = Path(__file__).resolve().parents[2] / "benchmarks/shapes"
BLOCK, WINDOW, LENGTH, CHUNK = 16, 256, 512, 64
FULL_NAMES = ["model.layers.1.self_attn.attn", "model.layers.3.self_attn.attn"]
WINDOW_NAMES = [f"model.layers.{index}.self_attn.attn" for index in (0, 2, 4)]
# 2 KV heads of 64 channels: codes and their constants; K and V in bfloat16.
PAGE_BYTES = 2 * BLOCK * 2 * 36
BLOCK_BYTES = 3 * BLOCK * 2 * 2 * 64 * 2
# Of a request: the window's blocks and one that it has begun; a chunk's of a step; vLLM's own.
REQUEST_BLOCKS, STEP_BLOCKS = WINDOW // BLOCK + 1, CHUNK // BLOCK + 1
# Pages of the request that both pools are made for, and of the longest.
PAGES, MOST_PAGES = 29, LENGTH // BLOCK


def make_config(folder: str, **arguments: Any) -> Any:
    from vllm import EngineArgs

    vllm_config = EngineArgs(
        model=folder, skip_tokenizer_init=True, load_format="dummy", max_model_len=LENGTH,
        max_num_batched_tokens=CHUNK, block_size=BLOCK, **arguments,
    ).create_engine_config()  # fmt: skip
    vllm_config.cache_config.kv_cache_layout = "LBHNC"
    assert vllm_config.max_in_flight_tokens == CHUNK
    return vllm_config


@pytest.fixture
def vllm_config(folders: Callable[[str], str]) -> Any:
    return make_config(folders("gemma3"), kv_backend="kcache")


def specs(dense: bool = False, windows: int = 1) -> dict[str, Any]:
    """As the layers of a model ask for them; the second full one dense where that is wanted, and
    windows of so many sizes."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    shape = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    made: dict[str, Any] = {}
    for name in sorted([*FULL_NAMES, *WINDOW_NAMES]):
        if name in WINDOW_NAMES:
            window = WINDOW - BLOCK * (WINDOW_NAMES.index(name) % windows)
            made[name] = SlidingWindowSpec(**shape, sliding_window=window)
        else:
            keeps_v = dense and name == FULL_NAMES[1]
            made[name] = FullAttentionSpec(**shape, state_content_bytes=None if keeps_v else 36)
    return made


def planned(vllm_config: Any, available: int, **changes: Any) -> Any:
    """vLLM's configuration of two ranks with so many bytes each."""
    first, second = configs_of(vllm_config, [specs(**changes)] * 2, available)
    assert first == second
    return first


def room(requests: int) -> int:
    """Bytes of both pools for requests of `PAGES` pages."""
    blocks = STEP_BLOCKS + requests * REQUEST_BLOCKS
    return blocks * BLOCK_BYTES + (requests * PAGES + 1) * PAGE_BYTES


def test_full_layers_are_one_group_with_its_own_pool(vllm_config: Any) -> None:
    from vllm_kcache.integration.pools import own_pool_pages

    # So many that their bytes are those of whole blocks.
    config = planned(vllm_config, room(11))
    own, windows = config.kv_cache_groups
    assert (sorted(own.layer_names), own.host_resident) == (FULL_NAMES, True)
    assert (sorted(windows.layer_names), windows.host_resident) == (WINDOW_NAMES, False)
    assert config.num_blocks == STEP_BLOCKS + 11 * REQUEST_BLOCKS
    # Of the requests, and the page that vLLM keeps for itself.
    assert own_pool_pages(config) == 11 * PAGES + 1 == own.kv_cache_spec.num_pages
    assert not config.needs_kv_cache_zeroing


@pytest.mark.parametrize("few_blocks", [False, True])
def test_vllm_knows_how_many_requests_fit(vllm_config: Any, few_blocks: bool) -> None:
    """To its log and its metrics: those of the longest that both pools hold."""
    from vllm.v1.core.kv_cache_utils import (
        generate_scheduler_kv_cache_config,
        get_kv_cache_capacity,
    )

    config = planned(vllm_config, room(11))
    fits = 11 * PAGES / MOST_PAGES
    if few_blocks:
        config.num_blocks, fits = STEP_BLOCKS + 4 * REQUEST_BLOCKS, 4.0
    for each in config, generate_scheduler_kv_cache_config([config]):
        assert get_kv_cache_capacity(vllm_config, each) == (int(fits * LENGTH), fits)


def test_warming_up_stays_within_both_pools(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM gives ids to the steps that it makes by the number of blocks, whatever the group."""
    from vllm.v1.worker.gpu import warmup

    from vllm_kcache.integration.pools import ids_of_both, own_pool_pages

    vllm_config.scheduler_config.max_num_seqs = 256
    # Requests take blocks of each size of window: of pages there are fewer.
    config = planned(vllm_config, room(9), windows=3)
    blocks, pages = config.num_blocks, own_pool_pages(config)
    assert pages < blocks
    vllm_config.scheduler_config.max_num_batched_tokens = 1024
    runner = SimpleNamespace(
        vllm_config=vllm_config, scheduler_config=vllm_config.scheduler_config,
        speculative_config=None, kv_cache_config=config, max_model_len=LENGTH,
        num_speculative_steps=0, decode_query_len=1, is_pooling_model=False,
        is_encoder_decoder=False, is_last_pp_rank=False,
        model_state=None, kv_block_zeroer=None, kv_connector=Mock(), adaptive_verification=None,
        rejection_sampler=None,
    )  # fmt: skip
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    given: list[list[int]] = []

    def execute(step: Any) -> None:
        ids = [request.block_ids for request in step.scheduled_new_reqs]
        ids += [each for each in step.scheduled_cached_reqs.new_block_ids if each is not None]
        given.extend(own for own, *_ in ids)

    with ids_of_both(config):
        warmup.warmup_kernels(runner, execute, lambda grammar: None)
    assert config.num_blocks == blocks
    # As many as there are pages for, of all groups together, and none behind.
    assert pages - 8 < max(max(ids) for ids in given) < pages


@pytest.mark.parametrize("dense", [False, True])
def test_no_byte_is_in_both_pools(vllm_config: Any, dense: bool) -> None:
    from vllm.v1.worker.utils import allocate_kv_cache

    config = planned(vllm_config, room(2), dense=dense)
    layout = vllm_config.cache_config.get_resolved_kv_cache_layout()
    caches = allocate_kv_cache(config, torch.device("cpu"), layout)
    pages, blocks = config.hisparse_host_num_blocks, config.num_blocks
    assert blocks >= STEP_BLOCKS + REQUEST_BLOCKS
    token_bytes = [36, 2 * 64 * 2 if dense else 36]
    for name, each in zip(FULL_NAMES, token_bytes, strict=True):
        assert caches[name].shape[:3] == (pages, 2, BLOCK)
        assert caches[name].shape[3] * 2 == each
    for name in WINDOW_NAMES:
        assert caches[name].shape == (blocks, 2, BLOCK, 2 * 64)
    for number, cache in enumerate(caches.values(), 1):
        cache.fill_(number)
    for number, cache in enumerate(caches.values(), 1):
        assert bool((cache == number).all())


def test_an_override_is_of_window_blocks(vllm_config: Any) -> None:
    vllm_config.cache_config.num_gpu_blocks_override = STEP_BLOCKS + 2 * REQUEST_BLOCKS
    config = planned(vllm_config, 50 * (BLOCK_BYTES + PAGE_BYTES))
    assert config.num_blocks == STEP_BLOCKS + 2 * REQUEST_BLOCKS
    assert config.hisparse_host_num_blocks == 2 * PAGES + 1


@pytest.mark.parametrize("max_num_seqs", [256, 5, 1])
def test_the_worker_and_the_engine_agree(vllm_config: Any, max_num_seqs: int) -> None:
    """The worker asks for the bytes of so many pages; the engine makes as many of them, or some
    fewer where it takes whole blocks of the bytes, and never one more."""
    from vllm_kcache.integration import pools

    vllm_config.scheduler_config.max_num_seqs = max_num_seqs
    window = pools.window_pool(vllm_config, specs())
    assert window is not None
    assert (window.block_bytes, window.page_bytes) == (BLOCK_BYTES, PAGE_BYTES)
    assert (window.request_blocks, window.step_blocks) == (REQUEST_BLOCKS, STEP_BLOCKS)
    assert (window.request_pages, window.longest_pages) == (PAGES, MOST_PAGES)
    lost = 1 if pools.TAKES_WHOLE_BLOCKS else 0
    fewer = 2 * lost * BLOCK_BYTES // PAGE_BYTES
    for pages in range(MOST_PAGES + 1, 400):
        config = planned(vllm_config, pools.bytes_asked(window, pages))
        made = config.hisparse_host_num_blocks
        assert pages - fewer <= made <= pages
        assert window.blocks_for(made) - lost <= config.num_blocks <= window.blocks_for(pages)
        size = config.kv_cache_tensors[0].size
        assert window.bytes_for(made) - lost * BLOCK_BYTES <= size
        assert size < window.bytes_for(pages) + 4096
    # No block is for more requests than there may be.
    assert config.num_blocks <= STEP_BLOCKS + max_num_seqs * REQUEST_BLOCKS


def test_drafts_are_held_beside_the_window(folders: Callable[[str], str]) -> None:
    """As many blocks as the tokens that a step reads may lie in, wherever they begin."""
    from vllm_kcache.integration.pools import window_pool

    for drafts in (1, 3, BLOCK, BLOCK + 2):
        vllm_config = make_config(
            folders("gemma3"),
            kv_backend="kcache",
            speculative_config={
                "method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 2,
            },
        )  # fmt: skip
        window = window_pool(vllm_config, specs())
        assert window is not None
        last = WINDOW + drafts - 1
        most = max((first + last) // BLOCK - first // BLOCK + 1 for first in range(BLOCK))
        assert most <= window.request_blocks <= most + 1


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize(
    ("method", "drops"), [("eagle3", True), ("mtp", True), ("draft_model", False), ("ngram", False)]
)
def test_the_last_block_is_dropped_where_drafts_have_layers(
    method: str, drops: bool, windows: int, folders: Callable[[str], str]
) -> None:
    """Layers of a head are in the group of the full ones: of these, and of no others."""
    from vllm_kcache.integration.pools import planning

    vllm_config = make_config(
        folders("gemma3"), kv_backend="kcache",
        speculative_config={
            "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2,
        },
    )  # fmt: skip
    object.__setattr__(vllm_config.speculative_config, "method", method)
    groups = planning.get_kv_cache_groups(vllm_config, specs(windows=windows))
    assert len(groups) == 1 + windows
    assert [group.is_eagle_group for group in groups] == [drops] + [False] * windows


@pytest.mark.parametrize("length", [16, 200, 273, 512, 4000])
def test_one_request_has_the_blocks_that_vllm_asks_for(vllm_config: Any, length: int) -> None:
    from vllm_kcache.integration.pools import bytes_asked, window_pool

    vllm_config.model_config.max_model_len = length
    window = window_pool(vllm_config, specs())
    assert window is not None
    spec = specs()[WINDOW_NAMES[0]]
    pages = 1 + -(-length // BLOCK)
    most = spec.max_admission_blocks_per_request(CHUNK, length)
    assert window.blocks_for(pages) - 1 >= most
    config = planned(vllm_config, bytes_asked(window, pages))
    assert config.num_blocks > most
    assert config.hisparse_host_num_blocks == pages


def test_a_cache_to_measure_graphs_on_is_small(vllm_config: Any) -> None:
    from vllm_kcache.integration.pools import measuring, planning

    groups = planning.get_kv_cache_groups(vllm_config, specs())
    # So vLLM 0.33 asks for a few blocks, and 0.32.
    for override, available in ((None, 3 * BLOCK_BYTES), (3, 0)):
        vllm_config.cache_config.num_gpu_blocks_override = override
        with measuring():
            config = planning.get_kv_cache_config_from_groups(vllm_config, groups, available)
        assert config.hisparse_host_num_blocks == config.num_blocks == 3


def test_others_are_grouped_by_vllm(vllm_config: Any, folders: Callable[[str], str]) -> None:
    """A model without windows, and any model without our flag."""
    from vllm_kcache.integration.pools import own_pool_pages, planning, window_pool

    full = {name: spec for name, spec in specs().items() if name in FULL_NAMES}
    assert window_pool(vllm_config, full) is None
    for config, made in ((vllm_config, full), (make_config(folders("gemma3")), specs())):
        groups = planning.get_kv_cache_groups(config, dict(made))
        assert not any(group.host_resident for group in groups)
        (whole,) = configs_of(config, [made], 2**24)
        assert own_pool_pages(whole) is None
        assert whole.hisparse_host_num_blocks is None


def test_other_kinds_of_layers_are_refused(vllm_config: Any) -> None:
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    latent = MLAAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
    from vllm_kcache.integration.pools import planning

    with pytest.raises(KCacheConfigError, match=r"groups \(sliding_window, mla"):
        planning.get_kv_cache_groups(vllm_config, {**specs(), "model.layers.5.attn": latent})


@pytest.mark.parametrize("drafts", [0, 3])
def test_states_have_the_pool_of_window_layers(vllm_config: Any, drafts: int) -> None:
    """One block a request, and one for each draft; and pages of the full layers are no larger for
    them."""
    from vllm.v1.kv_cache_interface import MambaSpec

    from vllm_kcache.integration.pools import planning, window_pool

    length = vllm_config.model_config.max_model_len
    state = MambaSpec(
        block_size=length, shapes=((999, 64),), dtypes=(torch.float32,),
        num_speculative_blocks=drafts,
    )  # fmt: skip
    made = {name: spec if name in FULL_NAMES else state for name, spec in specs().items()}
    own, others = planning.get_kv_cache_groups(vllm_config, dict(made))
    assert set(own.layer_names) == set(FULL_NAMES)
    assert own.kv_cache_spec.block_size == BLOCK
    assert set(others.layer_names) == set(made) - set(FULL_NAMES)
    pool = window_pool(vllm_config, made)
    assert pool.request_blocks == 1 + drafts
    assert pool.request_blocks * state.page_size_bytes == state.max_memory_usage_bytes(vllm_config)
    assert pool.block_bytes == len(others.layer_names) * 999 * 64 * 4
    (config,) = configs_of(vllm_config, [made], 2**24)
    assert config.has_mamba_layers
    assert not config.needs_kv_cache_zeroing


@pytest.mark.parametrize(
    ("device", "within", "held"), [("cuda", 0, 2), ("cuda", 1, 3), ("cpu", 1, 2)]
)
def test_kept_states_have_blocks(vllm_config: Any, device: str, within: int, held: int) -> None:
    """With prefix caching: one more a request, and one within a prompt where a kernel keeps it."""
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
    from vllm.v1.kv_cache_interface import MambaSpec

    from vllm_kcache.integration.pools import window_pool

    cache_config = vllm_config.cache_config
    cache_config.enable_prefix_caching, cache_config.mamba_cache_mode = True, "align"
    object.__setattr__(vllm_config.device_config, "device_type", device)
    state = MambaSpec(
        block_size=BLOCK, shapes=((999, 64),), dtypes=(torch.float32,), mamba_cache_mode="align",
        num_prefill_checkpoint_blocks=within, prefill_checkpoint_alignment=within or None,
    )  # fmt: skip
    made = {name: spec if name in FULL_NAMES else state for name, spec in specs().items()}
    pool = window_pool(vllm_config, made)
    assert pool.request_blocks == held
    assert pool.step_blocks == held + 1
    (config,) = configs_of(vllm_config, [made], 2**26)
    (kept,) = (group.kv_cache_spec for group in config.kv_cache_groups[1:])
    assert kept.num_prefill_checkpoint_blocks == held - 2
    # Hits end where pages do, so that no page is copied in part.
    assert resolve_kv_cache_block_sizes(config, vllm_config) == (BLOCK, BLOCK)


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("mode", ["none", "align"])
def test_the_planner_knows_what_states_take(vllm_config: Any, mode: str, drafts: int) -> None:
    """As vLLM sizes a state of Qwen3.5-27B, and as many of them as it lets a request hold."""
    from vllm.model_executor.layers.mamba.mamba_utils import (
        MambaStateDtypeCalculator,
        MambaStateShapeCalculator,
    )
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

    from vllm_kcache.integration.pools import window_pool

    shape = read_shape(str(SHAPES / "qwen3.5-27b"))
    vllm_config.cache_config.mamba_cache_mode = mode
    state = MambaSpec(
        block_size=BLOCK if mode == "align" else LENGTH,
        shapes=MambaStateShapeCalculator.gated_delta_net_state_shape(
            1, 16, 48, 128, 128, 4, drafts
        ),
        dtypes=MambaStateDtypeCalculator.gated_delta_net_state_dtype(
            torch.bfloat16, "auto", "float32"
        ),
        mamba_cache_mode=mode, num_speculative_blocks=drafts,
    )  # fmt: skip
    full = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=4, head_size=256, dtype=torch.bfloat16,
        state_content_bytes=132,
    )  # fmt: skip
    layers = range(shape.num_layers)
    made = {f"layers.{n}.attn": state if n in shape.state_layers else full for n in layers}
    engine = Engine(
        LENGTH, vllm_config.scheduler_config.max_num_seqs, CHUNK, BLOCK,
        num_speculative_tokens=drafts, enable_prefix_caching=mode == "align",
    )  # fmt: skip
    planned_pool = planned_window_pool(shape, engine, KCacheConfig.from_user({"k_bits": 4}))
    assert planned_pool == window_pool(vllm_config, made)
    # Of one layer.
    most = planned_pool.request_blocks * planned_pool.block_bytes // len(shape.state_layers)
    assert most == state.max_memory_usage_bytes(vllm_config)


def test_a_kept_state_covers_a_page(vllm_config: Any) -> None:
    from vllm.platforms.interface import Platform

    cache_config = vllm_config.cache_config
    cache_config.block_size, cache_config.mamba_block_size = 48, 16
    cache_config.mamba_cache_mode = "align"
    Platform._align_hybrid_block_size(vllm_config, None)
    assert (cache_config.block_size, cache_config.mamba_block_size) == (48, 48)
    cache_config.mamba_cache_mode, cache_config.mamba_block_size = "none", 512
    Platform._align_hybrid_block_size(vllm_config, None)
    assert cache_config.mamba_block_size == 512


def test_chunked_layers_have_the_pool_of_window_layers(vllm_config: Any) -> None:
    """In blocks for at least what vLLM lets a request take."""
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec

    from vllm_kcache.integration.pools import planning, window_pool

    chunked = ChunkedLocalAttentionSpec(
        block_size=BLOCK, num_kv_heads=2, head_size=64, dtype=torch.bfloat16,
        attention_chunk_size=64,
    )  # fmt: skip
    made = {name: spec if name in FULL_NAMES else chunked for name, spec in specs().items()}
    own, *others = planning.get_kv_cache_groups(vllm_config, dict(made))
    assert set(own.layer_names) == set(FULL_NAMES)
    assert {name for group in others for name in group.layer_names} == set(made) - set(FULL_NAMES)
    pool = window_pool(vllm_config, made)
    most = chunked.max_admission_blocks_per_request(
        vllm_config.max_in_flight_tokens, vllm_config.model_config.max_model_len
    )
    assert pool.step_blocks + pool.request_blocks >= most * len(others)


@pytest.mark.parametrize(
    ("owner", "name", "value", "feature"),
    [
        ("scheduler_config", "disable_hybrid_kv_cache_manager", True, "one pool"),
        ("parallel_config", "pipeline_parallel_size", 2, "stages"),
        ("model_config", "original_max_model_len", -1, "length"),
    ],
)
def test_windows_that_no_setting_told_of(
    vllm_config: Any, owner: str, name: str, value: Any, feature: str
) -> None:
    """A model's own code may give its layers windows."""
    from vllm_kcache.integration.pools import planning

    setattr(getattr(vllm_config, owner), name, value)
    with pytest.raises(KCacheConfigError, match=f"{feature}.* beside sliding-window layers"):
        planning.get_kv_cache_groups(vllm_config, specs())


# The manager.


@pytest.fixture
def manager(vllm_config: Any) -> Any:
    """vLLM's manager, with windows for eleven requests and pages for two of the greatest length."""
    from dataclasses import replace

    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config, init_none_hash

    init_none_hash(sha256)
    config = planned(vllm_config, room(11))
    own, windows = config.kv_cache_groups
    pages = 2 * LENGTH // BLOCK + 1
    own = replace(own, kv_cache_spec=replace(own.kv_cache_spec, num_pages=pages))
    config = generate_scheduler_kv_cache_config([replace(config, kv_cache_groups=[own, windows])])
    return KVCacheManager(
        config, max_model_len=LENGTH, scheduler_block_size=BLOCK, hash_block_size=BLOCK,
        max_in_flight_tokens=CHUNK,
    )  # fmt: skip


def request(name: str, tokens: int, first: int = 0) -> Any:
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    prompt = list(range(first, first + tokens))
    hasher = get_request_block_hasher(BLOCK, sha256)
    return Request(name, prompt, SamplingParams(max_tokens=8), None, block_hasher=hasher)


def prefill(manager: Any, made: Any) -> bool:
    """Whether the request is let in; then all of its prompt, chunk by chunk."""
    blocks, hit, _ = manager.get_computed_blocks(made)
    chunk = min(CHUNK, made.num_tokens - hit)
    if manager.allocate_slots(made, chunk, hit, blocks, full_sequence_must_fit=True) is None:
        return False
    made.num_computed_tokens = hit + chunk
    while made.num_computed_tokens < made.num_tokens:
        chunk = min(CHUNK, made.num_tokens - made.num_computed_tokens)
        assert manager.allocate_slots(made, chunk) is not None
        made.num_computed_tokens += chunk
    return True


def free_blocks(manager: Any) -> tuple[int, int]:
    """Of the full layers' pool, and of the window layers'."""
    own, windows = (m.block_pool for m in manager.coordinator.single_type_managers)
    assert own is not windows
    return own.get_num_free_blocks(), windows.get_num_free_blocks()


def test_a_request_waits_for_pages(manager: Any) -> None:
    """Blocks of window layers are left, pages are not; and both come back where they belong."""
    before = free_blocks(manager)
    assert before == (2 * LENGTH // BLOCK, STEP_BLOCKS - 1 + 11 * REQUEST_BLOCKS)
    first, second = (request(str(i), LENGTH - 4 * BLOCK, 1000 * i) for i in range(2))
    assert prefill(manager, first)
    assert prefill(manager, second)
    assert free_blocks(manager)[0] == 8
    # Of a window only as much as it spans, of two of them.
    assert before[1] - free_blocks(manager)[1] <= 2 * (REQUEST_BLOCKS + CHUNK // BLOCK)
    assert not prefill(manager, request("nine pages", 9 * BLOCK, 2000))
    last = request("four pages", 4 * BLOCK, 3000)
    assert prefill(manager, last)
    # One that decodes takes the last pages, then the other must wait as well.
    for _ in range(4):
        assert manager.allocate_slots(first, BLOCK) is not None
        first.num_computed_tokens += BLOCK
    assert free_blocks(manager)[0] == 0
    assert manager.usage == 1.0
    assert manager.allocate_slots(second, BLOCK) is None
    manager.free(first)
    assert manager.allocate_slots(second, BLOCK) is not None
    # vLLM frees late what a step in flight still writes, through the pool of the others.
    for made in (second, last):
        manager.block_pool.free_blocks(reversed(manager.pop_blocks_for_free(made)))
    assert free_blocks(manager) == before
    assert manager.usage == 0.0


def test_a_prefix_is_found_in_both_pools(manager: Any) -> None:
    first = request("first", 400)
    assert prefill(manager, first)
    manager.free(first)
    _, hit, _ = manager.get_computed_blocks(request("again", 400))
    assert hit == 384
    # What only one of the two still has is no hit.
    own = manager.coordinator.single_type_managers[0].block_pool
    own.evict_blocks({block.block_id for block in own.blocks if block.block_hash is not None})
    _, hit, _ = manager.get_computed_blocks(request("later", 400))
    assert hit == 0
    assert manager.reset_prefix_cache()
