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
from vllm_kcache.integration import features
from vllm_kcache.types import MOST_QUERY_HEADS_GPU


@dataclass(frozen=True)
class Refusal:
    """One unsupported feature.

    Attributes:
        feature: Name of the feature with its value ("{value}" is replaced).
        value: Takes vLLM's configuration; returns the offending value, or None when off.
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
        if value is not None:
            yield refusal.message(value)
    yield from _settings_that_do_not_fit(vllm_config, config)


def check_engine_args(engine_args: Any) -> None:
    """Refuse engine arguments that the plugin itself must set.

    Raises:
        KCacheConfigError: Another attention backend or worker class was chosen.
    """
    for message in found_in_arguments(engine_args):
        raise KCacheConfigError(message)


def found_in_arguments(engine_args: Any) -> Iterator[str]:
    """All refusals of engine arguments that the plugin itself must set, as messages."""
    refused = "--kv-backend kcache does not support"
    chosen = engine_args.attention_backend or engine_args.attention_config.backend
    name = getattr(chosen, "name", chosen)
    if name not in (None, "CUSTOM"):
        yield (
            f"{refused} attention_backend={name}: it brings its own attention. "
            "Leave --attention-backend out."
        )
    per_kind = engine_args.attention_config.backend_per_kind
    if per_kind:
        names = ", ".join(f"{kind}: {backend.name}" for kind, backend in per_kind.items())
        yield (
            f"{refused} backend_per_kind={{{names}}}: it brings its own attention. "
            "Leave backend_per_kind out of --attention-config."
        )
    worker_cls = engine_args.worker_cls
    if worker_cls != "auto" and not str(worker_cls).startswith("vllm_kcache."):
        yield (
            f"{refused} worker_cls={worker_cls}: it brings its own worker. Leave --worker-cls out."
        )


def _settings_that_do_not_fit(vllm_config: Any, config: KCacheConfig) -> Iterator[str]:
    model_config = vllm_config.model_config
    if model_config.is_attention_free:
        # No head to measure a V block by, and refused already.
        return
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
            "'clip' (with a mass_threshold), 'renormalize' or 'drop'."
        )


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "kv_cache_dtype={value}",
        features.kv_dtype,
        "V blocks are fetched in the model's dtype, and pages in another are not read yet",
        "Leave --kv-cache-dtype at auto; where the checkpoint asks for it, set --kv-cache-dtype to "
        "the model's dtype.",
    ),
    Refusal(
        "kv_offloading_size={value}",
        lambda c: features.true(c.cache_config.kv_offloading_size),
        "vLLM's offloading would copy K pages and leave V behind",
        "Leave --kv-offloading-size out; V is in host memory already.",
    ),
    Refusal(
        "kv_connector={value}",
        features.kv_connector,
        "a connector would copy K pages and leave V behind",
        "Leave --kv-transfer-config out.",
    ),
    Refusal(
        "kv_sharing_fast_prefill={value}",
        lambda c: features.true(c.cache_config.kv_sharing_fast_prefill),
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
        features.sliding_window,
        "selection covers the whole context",
        "Serve a model with full attention in every layer; where all layers have the window, "
        "--disable-sliding-window caps the context at it instead.",
    ),
    Refusal(
        "chunked local attention ({value})",
        features.chunked_attention,
        "selection covers the whole context",
        "Serve a model with full attention in every layer.",
    ),
    Refusal(
        "reference sliding-window attention (rswa_window={value})",
        lambda c: features.true(c.model_config.rswa_window),
        "selection covers the whole context",
        "Serve a model with full attention in every layer.",
    ),
    Refusal(
        "encoder-decoder models ({value})",
        features.architecture_if(lambda c: c.model_config.is_encoder_decoder),
        "cross attention keeps its own cache",
        "Serve a decoder-only model.",
    ),
    Refusal(
        "multi-head latent attention, MLA ({value})",
        features.architecture_if(lambda c: c.model_config.use_mla),
        "its cache holds one latent vector a token, with no V of its own",
        "Serve it with vLLM's own backend.",
    ),
    Refusal(
        "hybrid or attention-free models ({value})",
        features.architecture_if(
            lambda c: c.model_config.is_hybrid or c.model_config.is_attention_free
        ),
        "their state is not a KV cache",
        "Serve a model with attention in every layer.",
    ),
    Refusal(
        "diffusion models ({value})",
        features.architecture_if(lambda c: c.diffusion_config or c.model_config.is_diffusion),
        "a step has several queries a request that see each other, and a decode step here has one",
        "Serve a model that decodes token by token.",
    ),
    Refusal(
        "bidirectional attention among the tokens of an image ({value})",
        features.architecture_if(lambda c: c.model_config.is_mm_prefix_lm),
        "prefill is causal here",
        "Serve text only, with --language-model-only, or use vLLM's own backend.",
    ),
    Refusal(
        "encoder-only instances (mm_encoder_only of {value})",
        features.architecture_if(lambda c: c.is_mm_encoder_only),
        "they hold no KV cache, so there is nothing to split",
        "Leave --mm-encoder-only and the ec_producer role out.",
    ),
    Refusal(
        "use_non_causal={value}",
        lambda c: features.true(c.attention_config.use_non_causal),
        "prefill is causal here",
        "Leave use_non_causal out of --attention-config.",
    ),
    Refusal(
        "pooling models (runner={value})",
        lambda c: c.model_config.runner_type if c.model_config.runner_type != "generate" else None,
        "they never decode, so there is nothing to gain",
        "Serve it with vLLM's own backend.",
    ),
    Refusal(
        "ALiBi ({value})",
        features.alibi,
        "scores get no position bias here",
        "Serve a model with rotary or learned positions.",
    ),
    Refusal(
        "attn_logit_softcapping={value}",
        lambda c: features.true(getattr(features.text_config(c), "attn_logit_softcapping", None)),
        "scores are not capped here",
        "Serve a model without a soft cap on attention logits.",
    ),
    Refusal(
        "attention sinks ({value})",
        features.attention_sinks,
        "the softmax has no term beside the tokens here",
        "Serve a model without learned sinks.",
    ),
    Refusal(
        "head_size={value}",
        features.head_size,
        "the kernels take 64, 80, 96, 128 and 256",
        "Serve a model with one of these head sizes.",
    ),
    Refusal(
        "block_size={value}",
        features.block_size,
        "a K page must be a multiple of 16 tokens",
        "Set --block-size to 16, 32, 64 or 128, or leave it out.",
    ),
    Refusal(
        "{value} query heads per KV head",
        features.group_size_on_gpu,
        f"the GPU kernels take at most {MOST_QUERY_HEADS_GPU}",
        "Serve a model with more KV heads, or use vLLM's own backend.",
    ),
    Refusal(
        "decode_context_parallel_size={value}",
        lambda c: features.positive(c.parallel_config.decode_context_parallel_size),
        "pages of one request would lie on several ranks",
        "Use --tensor-parallel-size.",
    ),
    Refusal(
        "prefill_context_parallel_size={value}",
        lambda c: features.positive(c.parallel_config.prefill_context_parallel_size),
        "pages of one request would lie on several ranks",
        "Use --tensor-parallel-size.",
    ),
    Refusal(
        "microbatching ({value})",
        features.microbatching,
        "two halves of a batch would share the fetch buffers",
        "Leave --enable-dbo and --ubatch-size out.",
    ),
    Refusal(
        "enable_elastic_ep={value}",
        lambda c: features.true(c.parallel_config.enable_elastic_ep),
        "ranks that join later have no host pool",
        "Leave --enable-elastic-ep out.",
    ),
    Refusal(
        "enable_fault_tolerance={value}",
        lambda c: features.true(c.parallel_config.enable_fault_tolerance),
        "a restarted rank has lost its host pool",
        "Leave --enable-fault-tolerance and --fault-tolerance-config out.",
    ),
    Refusal(
        "HiSparse (hisparse_config={value})",
        lambda c: c.attention_config.hisparse_config,
        "it is another split of the same cache",
        "Leave hisparse_config out of --attention-config.",
    ),
    Refusal(
        "batch invariance ({value})",
        features.batch_invariance,
        "the order of sums depends on the selection",
        "Unset VLLM_BATCH_INVARIANT.",
    ),
    Refusal(
        "snapshots ({value})",
        features.snapshot,
        "the image of the process would hold the host pool, and restoring does not pin it again",
        "Start the server with vllm serve.",
    ),
)
