# SPDX-License-Identifier: Apache-2.0
"""What the split cache does not support, refused at start with the reason and the way out.

Each entry names the feature, how to see that it is on, and what to change. A feature that would
lose V, or silently run without the split, must be here or work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vllm_kcache.config import KCacheConfig, KCacheConfigError


@dataclass(frozen=True)
class Refusal:
    """One unsupported feature.

    Attributes:
        feature: Name and, where there is one, the value ("{value}" is replaced).
        value: Takes vLLM's configuration; returns the offending value, or None/False when off.
        reason: Why it cannot work.
        remedy: What the user changes.
    """

    feature: str
    value: Callable[[Any], Any]
    reason: str
    remedy: str

    def message(self, value: Any) -> str:
        """The error text for a value that was found."""
        feature = self.feature.format(value=value)
        return f"--kv-backend kcache does not support {feature}: {self.reason}. {self.remedy}"


def check(vllm_config: Any, config: KCacheConfig) -> None:
    """Refuse what the split cache cannot serve.

    Args:
        vllm_config: vLLM's complete configuration.
        config: The plugin's settings.

    Raises:
        KCacheConfigError: The first unsupported feature, or a setting that does not fit the model.
    """
    for message in found(vllm_config, config):
        raise KCacheConfigError(message)


def found(vllm_config: Any, config: KCacheConfig) -> Iterator[str]:
    """All refusals of a configuration, as messages (what `vllm-kcache check` lists)."""
    for refusal in REFUSALS:
        value = refusal.value(vllm_config)
        if value is not None and value is not False:
            yield refusal.message(value)
    yield from _settings_that_do_not_fit(vllm_config, config)


def check_engine_args(engine_args: Any) -> None:
    """Refuse engine arguments that the plugin itself must set.

    Raises:
        KCacheConfigError: Another attention backend or worker class was chosen.
    """
    chosen = engine_args.attention_backend or engine_args.attention_config.backend
    name = getattr(chosen, "name", chosen)
    if name not in (None, "CUSTOM"):
        raise KCacheConfigError(
            f"--kv-backend kcache does not support attention_backend={name}: it brings its own "
            "attention. Leave --attention-backend out."
        )
    worker_cls = engine_args.worker_cls
    if worker_cls != "auto" and not str(worker_cls).startswith("vllm_kcache."):
        raise KCacheConfigError(
            f"--kv-backend kcache does not support worker_cls={worker_cls}: it brings its own "
            "worker. Leave --worker-cls out."
        )


def _settings_that_do_not_fit(vllm_config: Any, config: KCacheConfig) -> Iterator[str]:
    model_config = vllm_config.model_config
    page_tokens = vllm_config.cache_config.block_size
    try:
        v_block_tokens = config.resolved_v_block_tokens(
            model_config.get_head_size(), model_config.dtype.itemsize, page_tokens
        )
        config.selection(v_block_tokens)
        config.resolved_dense_layers(model_config.get_total_num_hidden_layers())
    except KCacheConfigError as error:
        yield str(error)
    if vllm_config.device_config.device_type == "cpu":
        if config.prefill not in ("auto", "torch"):
            yield (
                f"kcache_config.prefill={config.prefill!r}: needs a GPU; on the CPU use 'auto' or "
                "'torch'."
            )
    elif config.tail == "mean":
        yield (
            "kcache_config.tail='mean': only the CPU implementation has it; on a GPU use "
            "'renormalize' (as accurate in our measurements, docs/accuracy.md) or 'drop'."
        )


def _text_config(vllm_config: Any) -> Any:
    return vllm_config.model_config.hf_text_config


def _kv_connector(vllm_config: Any) -> str | None:
    transfer = vllm_config.kv_transfer_config
    name = getattr(transfer, "kv_connector", None)
    # DecodeBenchConnector only fills the cache for benchmarks; it moves nothing.
    return name if name not in (None, "DecodeBenchConnector") else None


def _sliding_window(vllm_config: Any) -> Any:
    text = _text_config(vllm_config)
    layer_types = getattr(text, "layer_types", None) or []
    if any("sliding" in str(kind) for kind in layer_types):
        return f"layer_types with {next(k for k in layer_types if 'sliding' in str(k))!r}"
    window = vllm_config.model_config.get_sliding_window()
    if getattr(text, "use_sliding_window", True) is False:
        return None
    return f"sliding_window={window}" if window else None


def _kv_dtype(vllm_config: Any) -> str | None:
    name = vllm_config.cache_config.cache_dtype
    return None if name in ("auto", "float16", "bfloat16", "float32") else name


def _alibi(vllm_config: Any) -> bool:
    text = _text_config(vllm_config)
    attn_config = getattr(text, "attn_config", None)
    nested = attn_config.get("alibi") if isinstance(attn_config, dict) else None
    return bool(getattr(text, "alibi", False) or nested or text.model_type == "bloom")


def _positive(value: Any) -> Any:
    return value if value and value > 1 else None


def _batch_invariance(_: Any) -> bool:
    from vllm import envs

    return bool(envs.VLLM_BATCH_INVARIANT)


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "kv_cache_dtype={value}",
        _kv_dtype,
        "V blocks are fetched in the model's dtype; quantised pages are not read yet",
        "Leave --kv-cache-dtype at auto.",
    ),
    Refusal(
        "kv_connector={value}",
        _kv_connector,
        "a connector would copy K pages and leave V behind",
        "Leave --kv-transfer-config out.",
    ),
    Refusal(
        "kv_offloading_size={value}",
        lambda c: c.cache_config.kv_offloading_size,
        "vLLM's offloading would copy K pages and leave V behind",
        "Leave --kv-offloading-size out; V is in host memory already.",
    ),
    Refusal(
        "kv_sharing_fast_prefill=True",
        lambda c: c.cache_config.kv_sharing_fast_prefill,
        "it skips layers whose V the host pool must hold",
        "Leave --kv-sharing-fast-prefill out.",
    ),
    Refusal(
        "speculative decoding (method={value})",
        lambda c: getattr(c.speculative_config, "method", None),
        "a verification step has several queries a request, and a decode step here has one",
        "Leave --speculative-config out.",
    ),
    Refusal(
        "sliding-window attention ({value})",
        _sliding_window,
        "selection covers the whole context",
        "Serve a model with full attention in every layer.",
    ),
    Refusal(
        "chunked local attention (attention_chunk_size={value})",
        lambda c: getattr(c.model_config, "attention_chunk_size", None),
        "selection covers the whole context",
        "Serve a model with full attention in every layer.",
    ),
    Refusal(
        "encoder-decoder models",
        lambda c: c.model_config.is_encoder_decoder,
        "cross attention keeps its own cache",
        "Serve a decoder-only model.",
    ),
    Refusal(
        "multi-head latent attention (MLA)",
        lambda c: c.model_config.use_mla,
        "its cache holds one latent vector a token, with no V of its own",
        "Serve it with vLLM's own backend.",
    ),
    Refusal(
        "hybrid or attention-free models",
        lambda c: c.model_config.is_hybrid or c.model_config.is_attention_free,
        "their state is not a KV cache",
        "Serve a model with attention in every layer.",
    ),
    Refusal(
        "pooling models (runner={value})",
        lambda c: c.model_config.runner_type if c.model_config.runner_type != "generate" else None,
        "they never decode, so there is nothing to gain",
        "Serve it with vLLM's own backend.",
    ),
    Refusal(
        "ALiBi",
        _alibi,
        "scores get no position bias here",
        "Serve a model with rotary or learned positions.",
    ),
    Refusal(
        "attn_logit_softcapping={value}",
        lambda c: getattr(_text_config(c), "attn_logit_softcapping", None),
        "scores are not capped here",
        "Serve a model without a soft cap on attention logits.",
    ),
    Refusal(
        "decode_context_parallel_size={value}",
        lambda c: _positive(c.parallel_config.decode_context_parallel_size),
        "pages of one request would lie on several ranks",
        "Use --tensor-parallel-size.",
    ),
    Refusal(
        "prefill_context_parallel_size={value}",
        lambda c: _positive(c.parallel_config.prefill_context_parallel_size),
        "pages of one request would lie on several ranks",
        "Use --tensor-parallel-size.",
    ),
    Refusal(
        "microbatching (enable_dbo or ubatch_size)",
        lambda c: c.parallel_config.use_ubatching,
        "two halves of a batch would share the fetch buffers",
        "Leave --enable-dbo and --ubatch-size out.",
    ),
    Refusal(
        "enable_elastic_ep=True",
        lambda c: c.parallel_config.enable_elastic_ep,
        "ranks that join later have no host pool",
        "Leave --enable-elastic-ep out.",
    ),
    Refusal(
        "enable_fault_tolerance=True",
        lambda c: c.parallel_config.enable_fault_tolerance,
        "a restarted rank has lost its host pool",
        "Leave --enable-fault-tolerance out.",
    ),
    Refusal(
        "HiSparse",
        lambda c: c.attention_config.hisparse_config is not None,
        "it is another split of the same cache",
        "Leave hisparse_config out.",
    ),
    Refusal(
        "batch invariance (VLLM_BATCH_INVARIANT=1)",
        _batch_invariance,
        "the order of sums depends on the selection",
        "Unset VLLM_BATCH_INVARIANT.",
    ),
)
