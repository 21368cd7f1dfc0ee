# SPDX-License-Identifier: Apache-2.0
"""Reads from vLLM's configuration which features are on. Each function returns the value, or None.

Every function takes a complete `VllmConfig`, the first three vLLM's `EngineArgs`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from vllm_kcache.types import MOST_QUERY_HEADS_GPU

SNAPSHOT_SERVER = "vllm.snapshot.server"
# With learned sinks, and not served.
SINK_MODEL_TYPES = ("openai_privacy_filter",)
# In vLLM's own attention beside split layers.
WINDOW_KINDS = ("sliding_attention", "chunked_attention")
# Drafts of a custom class are taken to need no layers. `ngram_gpu` on a CPU is of vLLM's second
# runner alone.
SERVED_SPECULATION = (
    "ngram", "ngram_gpu", "suffix", "custom_class", "draft_model", "eagle", "eagle3", "mtp",
)  # fmt: skip
# Of these, methods whose drafts a model makes.
DRAFT_MODELS = ("draft_model", "eagle", "eagle3", "mtp")
# Least and most. The GPU's kernels know a capped score within 2**-20 of the cap; outside, or past
# what a float32 holds, scores would be wrong or NaN, and no model is near.
SOFT_CAPS = 2.0**-10, 2.0**10
SCALES = 2.0**-20, 2.0**20
SINK_SETTINGS = (
    "attention_sinks",
    "add_full_attention_sink_bias",
    "add_swa_attention_sink_bias",
    "swa_attention_sink_enabled",
    "param_sink_number",
)


def attention_backend(engine_args: Any) -> str | None:
    """Name of an attention backend that is not ours."""
    chosen = engine_args.attention_backend or engine_args.attention_config.backend
    name = getattr(chosen, "name", chosen)
    return None if name == "CUSTOM" else name


def backend_per_kind(engine_args: Any) -> str | None:
    """Attention backends by kind of layer."""
    chosen = engine_args.attention_config.backend_per_kind
    names = ", ".join(f"{kind}: {backend.name}" for kind, backend in chosen.items())
    return f"{{{names}}}" if names else None


def worker_cls(engine_args: Any) -> str | None:
    """A worker class that is not ours."""
    name = str(engine_args.worker_cls)
    return None if name == "auto" or name.startswith("vllm_kcache.") else name


def text_config(vllm_config: Any) -> Any:
    """The language model's part of the Hugging Face configuration."""
    return vllm_config.model_config.hf_text_config


def architecture(vllm_config: Any) -> str:
    """The model class that vLLM runs."""
    return vllm_config.model_config.architecture


def architecture_if(is_on: Callable[[Any], Any]) -> Callable[[Any], str | None]:
    """Value of a feature that the model brings: the model's architecture."""
    return lambda vllm_config: architecture(vllm_config) if is_on(vllm_config) else None


def true(value: Any) -> Any:
    """The value of a setting that is off when false, zero or empty."""
    return value or None


def positive(value: Any) -> Any:
    """A degree of parallelism above 1."""
    return value if value and value > 1 else None


def kv_connector(vllm_config: Any) -> str | None:
    """Name of a connector that would move K pages. That of kv_offloading_size is refused by it."""
    if vllm_config.cache_config.kv_offloading_size:
        return None
    transfer = vllm_config.kv_transfer_config
    name = getattr(transfer, "kv_connector", None)
    # DecodeBenchConnector only fills the cache for benchmarks; it moves nothing.
    return name if name not in (None, "DecodeBenchConnector") else None


def other_speculation(vllm_config: Any) -> str | None:
    """Method of speculative decoding, or a setting of it, that was not tried."""
    config = vllm_config.speculative_config
    if config is None or config.method not in SERVED_SPECULATION:
        return getattr(config, "method", None)
    is_cpu = vllm_config.device_config.device_type == "cpu"
    if config.method == "ngram_gpu" and is_cpu and not vllm_config.use_v2_model_runner:
        return "ngram_gpu, on a CPU"
    for name in ("parallel_drafting", "use_heterogeneous_vocab"):
        if getattr(config, name):
            return f"{config.method}, {name}=True"
    return None


def drafts_beside_states(vllm_config: Any) -> str | None:
    """Method of speculative decoding, where vLLM's first runner serves a model whose layers keep a
    state."""
    config = vllm_config.speculative_config
    if config is None or not vllm_config.model_config.is_hybrid:
        return None
    is_cpu = vllm_config.device_config.device_type == "cpu"
    return config.method if is_cpu or not vllm_config.use_v2_model_runner else None


def draft_states(vllm_config: Any) -> str | None:
    """A model that makes drafts and has layers with a state: its class."""
    config = vllm_config.speculative_config
    # Of a method without a model vLLM names the model that is served.
    if config is None or config.method not in DRAFT_MODELS:
        return None
    draft = config.draft_model_config
    return draft.architecture if draft.is_hybrid or draft.is_attention_free else None


def speculation_on_stages(vllm_config: Any) -> int | None:
    """Stages of a model, where drafts are verified."""
    if vllm_config.speculative_config is None:
        return None
    return positive(vllm_config.parallel_config.pipeline_parallel_size)


def window_size(vllm_config: Any) -> int | None:
    """Tokens that layers with a window or with chunks attend to at most."""
    model_config = vllm_config.model_config
    return model_config.get_sliding_window() or model_config.attention_chunk_size


def has_window_layers(vllm_config: Any) -> bool:
    """Whether the configuration gives some layers a window, or chunks, and others the whole
    context."""
    kinds = {str(kind) for kind in getattr(text_config(vllm_config), "layer_types", None) or []}
    mixed = "full_attention" in kinds and not kinds.isdisjoint(WINDOW_KINDS)
    return mixed and bool(window_size(vllm_config))


def window_layers(vllm_config: Any) -> list[int]:
    """Numbers of the layers with a window or with chunks, where others have neither."""
    if not has_window_layers(vllm_config):
        return []
    kinds = enumerate(text_config(vllm_config).layer_types)
    return [number for number, kind in kinds if str(kind) in WINDOW_KINDS]


def has_second_pool(vllm_config: Any) -> bool:
    """Whether some layers keep a window, chunks or a state, in a pool beside that of the others."""
    return has_window_layers(vllm_config) or vllm_config.model_config.is_hybrid


def beside_windows(value: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The value of a setting that cannot be beside a second pool, where there is one."""
    return lambda vllm_config: value(vllm_config) if has_second_pool(vllm_config) else None


def beside_states(value: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The value of a setting that cannot be beside layers with a state, where there are any."""
    return lambda c: value(c) if c.model_config.is_hybrid else None


def one_pool(vllm_config: Any) -> str | None:
    """Setting that gives all layers one pool of blocks."""
    is_on = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    return "disable_hybrid_kv_cache_manager=True" if is_on else None


def stages(vllm_config: Any) -> str | None:
    """Setting that cuts the model in several stages."""
    number = positive(vllm_config.parallel_config.pipeline_parallel_size)
    return None if number is None else f"pipeline_parallel_size={number}"


def length_left_to_vllm(vllm_config: Any) -> str | None:
    """Setting with which vLLM takes the length that fits."""
    left = vllm_config.model_config.original_max_model_len == -1
    return "max_model_len=-1" if left else None


def sliding_window(vllm_config: Any) -> str | None:
    """Setting that gives every layer a window."""
    text, window = text_config(vllm_config), vllm_config.model_config.get_sliding_window()
    if not window or getattr(text, "use_sliding_window", True) is False:
        return None
    if has_window_layers(vllm_config):
        return None
    layer_types = getattr(text, "layer_types", None)
    if layer_types and "sliding_attention" not in map(str, layer_types):
        return None
    return f"sliding_window={window}"


def chunked_attention(vllm_config: Any) -> str | None:
    """Setting that gives every layer chunks."""
    if has_window_layers(vllm_config):
        return None
    text = text_config(vllm_config)
    layer_types = getattr(text, "layer_types", None) or []
    chunked = [str(kind) for kind in layer_types if "chunked" in str(kind)]
    if chunked:
        return f"layer_types with {chunked[0]!r}"
    size = vllm_config.model_config.attention_chunk_size
    return f"attention_chunk_size={size}" if size else None


def kv_dtype(vllm_config: Any) -> str | None:
    """Name of a cache dtype that is not the model's own."""
    name = vllm_config.cache_config.cache_dtype
    scheme = getattr(vllm_config.quant_config, "kv_cache_scheme", None)
    # vLLM follows the checkpoint only when it builds the layers, and only where nothing was asked.
    if name == "auto" and scheme is not None:
        return f"fp8, from kv_cache_scheme={scheme} of the checkpoint"
    model_dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    return None if name in ("auto", model_dtype) else name


def head_size(vllm_config: Any) -> int | None:
    """A head size that the kernels do not take. A model without attention reports 0."""
    from vllm_kcache.integration.backend import KCacheBackend

    size = vllm_config.model_config.get_head_size()
    return None if size in (0, *KCacheBackend.get_supported_head_sizes()) else size


def block_size(vllm_config: Any) -> int | None:
    """Tokens of a page that the kernels do not take."""
    from vllm_kcache.integration.backend import KCacheBackend

    tokens = vllm_config.cache_config.block_size
    return None if KCacheBackend.supports_block_size(tokens) else tokens


def group_size_on_gpu(vllm_config: Any) -> int | None:
    """Query heads that share a KV head; the reference on the CPU takes any number."""
    if vllm_config.device_config.device_type == "cpu":
        return None
    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    kv_heads = model_config.get_num_kv_heads(parallel)
    # A model without attention has no KV heads, and its own refusal.
    group = model_config.get_num_attention_heads(parallel) // max(kv_heads, 1)
    return group if group > MOST_QUERY_HEADS_GPU else None


def alibi(vllm_config: Any) -> str | None:
    """Position biases on the scores. vLLM's own list lacks Step1, which always has them."""
    name = architecture(vllm_config)
    return name if vllm_config.model_config.uses_alibi or name == "Step1ForCausalLM" else None


def attention_sinks(vllm_config: Any) -> str | None:
    """Learned sinks, an extra term of the softmax that is no token, of models not tried."""
    text = text_config(vllm_config)
    if text.model_type in SINK_MODEL_TYPES:
        return f"model type {text.model_type}"
    # Granite has them wherever it names its layers, unless it says otherwise.
    if (
        text.model_type in ("granite", "granitemoe")
        and getattr(text, "layer_types", None) is not None
        and getattr(text, "attention_sinks", True)
    ):
        return "layer_types of Granite"
    for name in SINK_SETTINGS:
        value = getattr(text, name, None)
        if value:
            return f"{name}={value}"
    return None


def soft_cap(vllm_config: Any) -> str | None:
    """A bound of the scores that the kernels do not take."""
    cap = getattr(text_config(vllm_config), "attn_logit_softcapping", None)
    # 0 is none, as to vLLM.
    return f"attn_logit_softcapping={cap}" if cap and not is_within(cap, SOFT_CAPS) else None


def scale(vllm_config: Any) -> str | None:
    """A setting of the factor of the scores that gives none that the kernels take."""
    text = text_config(vllm_config)
    for name, power in (("query_pre_attn_scalar", -0.5), ("attention_multiplier", 1)):
        value = getattr(text, name, None)
        if value is None:
            continue
        if not is_within(value, tuple(sorted(bound ** (1 / power) for bound in SCALES))):
            return f"{name}={value}"
    return None


def is_within(value: Any, bounds: tuple[float, float]) -> bool:
    """Whether it is a number, and from one bound to the other; NaN is not."""
    return isinstance(value, (int, float)) and bounds[0] <= value <= bounds[1]


def microbatching(vllm_config: Any) -> str | None:
    """Setting that splits a batch in two."""
    parallel = vllm_config.parallel_config
    if parallel.enable_dbo:
        return "enable_dbo=True"
    return f"ubatch_size={parallel.ubatch_size}" if parallel.use_ubatching else None


def sleep_mode(vllm_config: Any) -> str | None:
    """Setting with which `sleep` frees K pages: it asks only how they were allocated."""
    for name in ("enable_sleep_mode", "enable_cumem_allocator"):
        if getattr(vllm_config.model_config, name):
            return f"{name}=True"
    return None


def batch_invariance(_: Any) -> str | None:
    """Environment variable that asks for it."""
    from vllm import envs

    return "VLLM_BATCH_INVARIANT=1" if envs.VLLM_BATCH_INVARIANT else None


def snapshot(_: Any) -> str | None:
    """`vllm snapshot create` starts the engine in a server module of its own."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return "vllm snapshot create" if getattr(spec, "name", None) == SNAPSHOT_SERVER else None
