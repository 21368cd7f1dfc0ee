# SPDX-License-Identifier: Apache-2.0
"""Which attention backend each layer gets: ours, or vLLM's own for dense and window layers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from vllm_kcache.config import KCacheConfig
from vllm_kcache.integration.patches import PatchRecord, wrap
from vllm_kcache.integration.settings import settings_of

BACKEND_PATH = "vllm_kcache.integration.backend.KCacheBackend"
# What vLLM's runners call a model that makes drafts while they build it (`set_model_tag`): one of
# its own, or a head over hidden states of the model that is served (EAGLE, MTP).
DRAFT_TAGS = ("draft_model", "eagle_head")

_LAYER_RECORD = PatchRecord(
    target="vllm.model_executor.layers.attention.attention.Attention.__init__",
    why="vLLM picks one backend for all layers, and the pick does not see the layer's name.",
    how="While a dense, window or draft layer is built none is chosen, so it gets vLLM's own.",
    upstream="backend_per_kind picks by kind of cache, not by layer.",
    until="vLLM can pick a backend by layer name.",
)
_CHUNKED_RECORD = PatchRecord(
    target=(
        "vllm.model_executor.layers.attention.chunked_local_attention.ChunkedLocalAttention"
        ".__init__"
    ),
    why="It derives its backend from the one chosen for layers of the whole context.",
    how="While it is built no backend is chosen, so it derives from vLLM's own.",
    upstream="So in 0.32 and 0.33.",
    until="vLLM can pick a backend for chunked layers.",
)
_CPU_RECORD = PatchRecord(
    target="vllm.platforms.cpu.CpuPlatform.get_attn_backend_cls",
    why="The CPU platform ignores the chosen backend and takes CPU_ATTN without an error.",
    how="CUSTOM is honoured and validated; every other choice goes to the original.",
    upstream="CPU accepts CPU_ATTN only (0.32.0).",
    until="The CPU platform validates the chosen backend as the CUDA platform does.",
)


def install() -> None:
    """Wrap the layer constructor and, on the CPU platform, the choice of backend."""
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.platforms import current_platform

    wrap(Attention, "__init__", _some_layers_keep_stock_backend, _LAYER_RECORD)
    # Elsewhere, a backend derived from ours would be refused (worker.py).
    with contextlib.suppress(ImportError):
        from vllm.model_executor.layers.attention.chunked_local_attention import (
            ChunkedLocalAttention,
        )

        wrap(ChunkedLocalAttention, "__init__", _chunked_layers_keep_stock_backend, _CHUNKED_RECORD)
    if current_platform.is_cpu():
        from vllm.platforms.cpu import CpuPlatform

        wrap(CpuPlatform, "get_attn_backend_cls", _honour_custom_on_cpu, _CPU_RECORD)


def activate_backend() -> None:
    """Register our attention backend under vLLM's CUSTOM name, in this process.

    A new enum member would not survive the way to the engine core: the configuration is unpickled
    there before plugins are loaded.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)


def is_dense_layer(layer_name: str, config: KCacheConfig, num_layers: int) -> bool:
    """Whether the layer keeps V in GPU memory.

    Args:
        layer_name: vLLM's name, such as "model.layers.3.self_attn.attn".
        config: The settings; `dense_layers` counts from the bottom or lists layers.
        num_layers: Attention layers of the whole model.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    return extract_layer_index(layer_name) in config.resolved_dense_layers(num_layers)


def _is_drafting() -> bool:
    """Whether the model that is being built makes drafts. Its layers' names do not tell."""
    from vllm.compilation import backends

    return backends.model_tag in DRAFT_TAGS


def _some_layers_keep_stock_backend(original: Callable) -> Callable:
    signature = inspect.signature(original)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from vllm.config import get_current_vllm_config

        vllm_config = get_current_vllm_config()
        config = settings_of(vllm_config)
        if config is None:
            original(self, *args, **kwargs)
            return
        given = signature.bind(self, *args, **kwargs).arguments
        is_draft = _is_drafting()
        is_open = given.get("prefix") and given.get("attn_backend") is None
        if is_open and (
            _is_custom(vllm_config) if is_draft else _is_stock(given, config, vllm_config)
        ):
            with _no_choice(vllm_config):
                original(self, *args, **kwargs)
        else:
            original(self, *args, **kwargs)
        # vLLM sets it when all layers are built; of 0.32 one of its runners does not.
        self.is_draft_layer = is_draft

    return __init__


def _chunked_layers_keep_stock_backend(original: Callable) -> Callable:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from vllm.config import get_current_vllm_config

        vllm_config = get_current_vllm_config()
        if settings_of(vllm_config) is None:
            original(self, *args, **kwargs)
            return
        with _no_choice(vllm_config):
            original(self, *args, **kwargs)

    return __init__


@contextlib.contextmanager
def _no_choice(vllm_config: Any) -> Iterator[None]:
    """While this lasts vLLM chooses a backend by itself."""
    attention = vllm_config.attention_config
    chosen, attention.backend = attention.backend, None
    try:
        yield
    finally:
        attention.backend = chosen


def chunk_of(layer: Any) -> int | None:
    """Tokens of the chunks that an attention layer attends within; None for one without."""
    return getattr(layer, "attention_chunk_size", None)


def _is_custom(vllm_config: Any) -> bool:
    """Whether our backend is the one of all layers. To drafts one of vLLM's runners gives their
    own, the other this."""
    return getattr(vllm_config.attention_config.backend, "name", None) == "CUSTOM"


def _is_stock(given: dict[str, Any], config: KCacheConfig, vllm_config: Any) -> bool:
    """Whether a layer of the model that is served runs vLLM's own attention."""
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    return _has_window(given) or is_dense_layer(given["prefix"], config, num_layers)


def _has_window(given: dict[str, Any]) -> bool:
    """Whether a layer is built with a window, its own or that of all layers."""
    if given.get("per_layer_sliding_window") is not None:
        return True
    return getattr(given.get("cache_config"), "sliding_window", None) is not None


def _honour_custom_on_cpu(original: Callable) -> Callable:
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        from vllm.platforms.interface import DeviceCapability
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        if selected_backend != AttentionBackendEnum.CUSTOM:
            return original(cls, selected_backend, attn_selector_config, num_heads)
        backend = selected_backend.get_class()
        reasons = backend.validate_configuration(
            device_capability=DeviceCapability(0, 0), **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(
                f"--kv-backend kcache cannot run this model: {', '.join(reasons)}. "
                "Serve it with vLLM's own backend."
            )
        return selected_backend.get_path()

    return get_attn_backend_cls
