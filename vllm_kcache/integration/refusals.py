# SPDX-License-Identifier: Apache-2.0
"""What the split cache does not support, refused at start with the reason and the way out.

Each entry of the one table names the feature, how to see that it is on, and what to change. A
feature that would lose V, or silently run without the split, must be here or work. What shows only
when layers are built is refused by whoever meets it, with `refuse`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from vllm_kcache.config import KCacheConfig, KCacheConfigError
from vllm_kcache.integration import features
from vllm_kcache.types import MOST_QUERY_HEADS_GPU


@dataclass(frozen=True)
class Refusal:
    """One unsupported feature.

    Attributes:
        name: Short name, for `refuse`.
        feature: Name of the feature with its value ("{value}" is replaced).
        reason: Why it cannot work.
        remedy: What the user changes.
        value: Takes vLLM's configuration; returns the offending value, or None when off.
        argument: The same of vLLM's engine arguments: what the plugin itself must set.
        codes_only: Refused with K codes in the pages only.

    An entry without either is found later, in a layer or in what the model asks of the cache.
    """

    name: str
    feature: str
    reason: str
    remedy: str
    value: Callable[[Any], Any] | None = None
    argument: Callable[[Any], Any] | None = None
    codes_only: bool = False

    def message(self, value: Any) -> str:
        """The error text for a value that was found."""
        feature = self.feature.format(value=value)
        return f"--kv-backend kcache does not support {feature}: {self.reason}. {self.remedy}"


def refuse(name: str, value: Any = None) -> NoReturn:
    """Refuse a feature that was met.

    Args:
        name: `name` of the entry.
        value: What was found, if the entry shows a value.

    Raises:
        KCacheConfigError: Always.
    """
    (refusal,) = (refusal for refusal in REFUSALS if refusal.name == name)
    raise KCacheConfigError(refusal.message(value))


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
        if refusal.codes_only and config.resolved_k_bits == 16:
            continue
        value = None if refusal.value is None else refusal.value(vllm_config)
        if value is not None:
            yield refusal.message(value)
    yield from _settings_that_do_not_fit(vllm_config, config)


def check_beside_windows(vllm_config: Any) -> None:
    """Refuse what cannot be beside window layers, where they show in what layers ask of the cache.

    Raises:
        KCacheConfigError: The first such setting.
    """
    for name, value in (
        ("one_pool", features.one_pool),
        ("window_stages", features.stages),
        ("window_length", features.length_left_to_vllm),
    ):
        found = value(vllm_config)
        if found is not None:
            refuse(name, found)


def check_engine_args(engine_args: Any) -> None:
    """Refuse engine arguments that the plugin itself must set.

    Raises:
        KCacheConfigError: Another attention backend or worker class was chosen.
    """
    for message in found_in_arguments(engine_args):
        raise KCacheConfigError(message)


def found_in_arguments(engine_args: Any) -> Iterator[str]:
    """All refusals of engine arguments that the plugin itself must set, as messages."""
    for refusal in REFUSALS:
        value = None if refusal.argument is None else refusal.argument(engine_args)
        if value is not None:
            yield refusal.message(value)


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
    is_cpu = vllm_config.device_config.device_type == "cpu"
    if is_cpu and config.prefill not in ("auto", "torch"):
        yield (
            f"kcache_config.prefill={config.prefill!r}: needs a GPU; on the CPU use 'auto' or "
            "'torch'."
        )


_STOCK = "Serve this model with vLLM's own backend."
_OLD_CONSTANTS = "with k_bits 4 codes are made by what was measured of the weights at start"

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "attention_backend",
        "attention_backend={value}",
        "the split cache brings its own attention",
        "Leave --attention-backend out.",
        argument=features.attention_backend,
    ),
    Refusal(
        "backend_per_kind",
        "backend_per_kind={value}",
        "the split cache brings its own attention",
        "Leave backend_per_kind out of --attention-config.",
        argument=features.backend_per_kind,
    ),
    Refusal(
        "worker_cls",
        "worker_cls={value}",
        "the split cache brings its own worker",
        "Leave --worker-cls out.",
        argument=features.worker_cls,
    ),
    Refusal(
        "kv_dtype",
        "kv_cache_dtype={value}",
        "pages and host rows have formats of their own, by kcache_config.k_bits and host_dtype: K "
        "of 4 bits and, for models of 2 bytes a value, rows of int8 unless these say otherwise",
        "Leave --kv-cache-dtype at auto; where the checkpoint asks for it, set --kv-cache-dtype to "
        "the model's dtype.",
        value=features.kv_dtype,
    ),
    Refusal(
        "kv_offloading",
        "kv_offloading_size={value}",
        "vLLM's offloading would copy K pages and leave V behind",
        "Leave --kv-offloading-size out; V is in host memory already.",
        value=lambda c: features.true(c.cache_config.kv_offloading_size),
    ),
    Refusal(
        "kv_connector",
        "kv_connector={value}",
        "a connector would copy K pages and leave V behind",
        "Leave --kv-transfer-config out.",
        value=features.kv_connector,
    ),
    Refusal(
        "fast_prefill",
        "kv_sharing_fast_prefill={value}",
        "it skips layers whose V the host pool must hold",
        "Leave --kv-sharing-fast-prefill out.",
        value=lambda c: features.true(c.cache_config.kv_sharing_fast_prefill),
    ),
    Refusal(
        "speculation",
        "speculative decoding (method={value})",
        f"of all methods {', '.join(features.SERVED_SPECULATION)} were tried",
        "Leave --speculative-config out, or set its method to ngram.",
        value=features.other_speculation,
    ),
    Refusal(
        "speculation_on_stages",
        "speculative decoding on pipeline stages (pipeline_parallel_size={value})",
        "the last stage alone makes drafts, and vLLM's runner of a CPU asks each of them",
        "Use --tensor-parallel-size, or leave --speculative-config out.",
        value=features.speculation_on_stages,
    ),
    Refusal(
        "sliding_window",
        "sliding-window attention in every layer ({value})",
        "there is no layer to split: selection covers the whole context",
        "Serve a model with full attention in some layers, or cap the context at the window, with "
        "--disable-sliding-window.",
        value=features.sliding_window,
    ),
    Refusal(
        "one_pool",
        "one pool for all layers beside sliding-window layers ({value})",
        "the split layers have a pool of pages of their own",
        "Leave --disable-hybrid-kv-cache-manager out.",
        value=features.beside_windows(features.one_pool),
    ),
    Refusal(
        "window_stages",
        "pipeline stages beside sliding-window layers ({value})",
        "stages have different shares of the two kinds of layers",
        "Use --tensor-parallel-size.",
        value=features.beside_windows(features.stages),
    ),
    Refusal(
        "window_length",
        "a length that vLLM chooses beside sliding-window layers ({value})",
        "memory is divided between the two kinds of layers by the length of a request",
        "Set --max-model-len to the length that is needed.",
        value=features.beside_windows(features.length_left_to_vllm),
    ),
    Refusal(
        "chunked_attention",
        "chunked local attention in every layer ({value})",
        "there is no layer to split: selection covers the whole context",
        "Serve a model with full attention in some layers.",
        value=features.chunked_attention,
    ),
    Refusal(
        "reference_window",
        "reference sliding-window attention (rswa_window={value})",
        "selection covers the whole context",
        "Serve a model with full attention in every layer.",
        value=lambda c: features.true(c.model_config.rswa_window),
    ),
    Refusal(
        "encoder_decoder",
        "encoder-decoder models ({value})",
        "cross attention keeps its own cache",
        "Serve a decoder-only model.",
        value=features.architecture_if(lambda c: c.model_config.is_encoder_decoder),
    ),
    Refusal(
        "mla",
        "multi-head latent attention, MLA ({value})",
        "its cache holds one latent vector a token, with no V of its own",
        _STOCK,
        value=features.architecture_if(lambda c: c.model_config.use_mla),
    ),
    Refusal(
        "no_kv_cache",
        "attention-free models ({value})",
        "their state is not a KV cache",
        "Serve a model with attention in some layers.",
        value=features.architecture_if(lambda c: c.model_config.is_attention_free),
    ),
    Refusal(
        "state_match_unit",
        "part of a page as a prefix, beside layers with a state (prefix_match_unit={value})",
        "vLLM copies parts of pages of K there, and their V would stay behind",
        "Leave --prefix-match-unit out: hits end where pages do.",
        value=features.beside_states(lambda c: c.cache_config.prefix_match_unit),
    ),
    Refusal(
        "states_with_drafts",
        "speculative decoding beside layers with a state, by vLLM's first runner (method={value})",
        "tokens that it reads again after a preemption it takes for drafts, and kernels of a CPU "
        "keep what a rejected draft leaves in a state",
        "On a GPU take a method of the second runner (ngram, ngram_gpu, draft_model, eagle, eagle3 "
        "or mtp); on a CPU leave --speculative-config out.",
        value=features.drafts_beside_states,
    ),
    Refusal(
        "draft_states",
        "layers with a state in a draft model ({value})",
        "vLLM does not take back what rejected drafts leave in those",
        "Take a draft model with full attention in every layer.",
        value=features.draft_states,
    ),
    Refusal(
        "diffusion",
        "diffusion models ({value})",
        "a step has several queries a request that see each other, and a decode step here has one",
        "Serve a model that decodes token by token.",
        value=features.architecture_if(lambda c: c.diffusion_config or c.model_config.is_diffusion),
    ),
    Refusal(
        "image_attention",
        "bidirectional attention among the tokens of an image ({value})",
        "prefill is causal here",
        "Serve text only, with --language-model-only, or use vLLM's own backend.",
        value=features.architecture_if(lambda c: c.model_config.is_mm_prefix_lm),
    ),
    Refusal(
        "encoder_only",
        "encoder-only instances (mm_encoder_only of {value})",
        "they hold no KV cache, so there is nothing to split",
        "Leave --mm-encoder-only and the ec_producer role out.",
        value=features.architecture_if(lambda c: c.is_mm_encoder_only),
    ),
    Refusal(
        "use_non_causal",
        "use_non_causal={value}",
        "prefill is causal here",
        "Leave use_non_causal out of --attention-config.",
        value=lambda c: features.true(c.attention_config.use_non_causal),
    ),
    Refusal(
        "pooling",
        "pooling models (runner={value})",
        "they never decode, so there is nothing to gain",
        _STOCK,
        value=lambda c: (
            c.model_config.runner_type if c.model_config.runner_type != "generate" else None
        ),
    ),
    Refusal(
        "alibi",
        "ALiBi ({value})",
        "scores get no position bias here",
        "Serve a model with rotary or learned positions.",
        value=features.alibi,
    ),
    Refusal(
        "attention_sinks",
        "attention sinks ({value})",
        "these were not tried here: they are learned in another form than gpt-oss's",
        "Serve a model without learned sinks, or with those of gpt-oss.",
        value=features.attention_sinks,
    ),
    Refusal(
        "soft_cap",
        "a soft cap on scores out of range ({value})",
        "the kernels take caps from 2**-10 to 2**10",
        "Correct it in the model's config.json; null is none.",
        value=features.soft_cap,
    ),
    Refusal(
        "scale",
        "a scale of scores out of range ({value})",
        "the kernels take scales from 2**-20 to 2**20",
        "Correct what it is made of in the model's config.json.",
        value=features.scale,
    ),
    Refusal(
        "head_size",
        "head_size={value}",
        "the kernels take 64, 80, 96, 128 and 256",
        "Serve a model with one of these head sizes.",
        value=features.head_size,
    ),
    Refusal(
        "block_size",
        "block_size={value}",
        "a K page must be a multiple of 16 tokens",
        "Set --block-size to 16, 32, 64 or 128, or leave it out.",
        value=features.block_size,
    ),
    Refusal(
        "query_heads",
        "{value} query heads per KV head",
        f"the GPU kernels take at most {MOST_QUERY_HEADS_GPU}",
        "Serve a model with more KV heads, or use vLLM's own backend.",
        value=features.group_size_on_gpu,
    ),
    Refusal(
        "decode_context_parallel",
        "decode_context_parallel_size={value}",
        "pages of one request would lie on several ranks",
        "Use --tensor-parallel-size.",
        value=lambda c: features.positive(c.parallel_config.decode_context_parallel_size),
    ),
    Refusal(
        "prefill_context_parallel",
        "prefill_context_parallel_size={value}",
        "pages of one request would lie on several ranks",
        "Use --tensor-parallel-size.",
        value=lambda c: features.positive(c.parallel_config.prefill_context_parallel_size),
    ),
    Refusal(
        "microbatching",
        "microbatching ({value})",
        "two halves of a batch would share the fetch buffers",
        "Leave --enable-dbo and --ubatch-size out.",
        value=features.microbatching,
    ),
    Refusal(
        "elastic_ep",
        "enable_elastic_ep={value}",
        "ranks that join later have no host pool",
        "Leave --enable-elastic-ep out.",
        value=lambda c: features.true(c.parallel_config.enable_elastic_ep),
    ),
    Refusal(
        "fault_tolerance",
        "enable_fault_tolerance={value}",
        "a restarted rank has lost its host pool",
        "Leave --enable-fault-tolerance and --fault-tolerance-config out.",
        value=lambda c: features.true(c.parallel_config.enable_fault_tolerance),
    ),
    Refusal(
        "hisparse",
        "HiSparse (hisparse_config={value})",
        "it is another split of the same cache",
        "Leave hisparse_config out of --attention-config.",
        value=lambda c: c.attention_config.hisparse_config,
    ),
    Refusal(
        "batch_invariance",
        "batch invariance ({value})",
        "the order of sums depends on the selection",
        "Unset VLLM_BATCH_INVARIANT.",
        value=features.batch_invariance,
    ),
    Refusal(
        "snapshot",
        "snapshots ({value})",
        "the image of the process would hold the host pool, and restoring does not pin it again",
        "Start the server with vllm serve.",
        value=features.snapshot,
    ),
    Refusal(
        "sleep_mode",
        "sleep mode ({value})",
        "it would free the K pages under a hot cache and a host pool that keep their V",
        "Leave --enable-sleep-mode and --enable-cumem-allocator out, and stop the server when its "
        "memory is needed.",
        value=features.sleep_mode,
    ),
    Refusal(
        "weight_transfer",
        "weight_transfer_config={value}",
        _OLD_CONSTANTS,
        "Leave --weight-transfer-config out, or set kcache_config.k_bits to 16.",
        value=lambda c: getattr(c.weight_transfer_config, "backend", None),
        codes_only=True,
    ),
    Refusal(
        "reload_weights",
        "reload_weights",
        _OLD_CONSTANTS,
        "Start another engine with the new weights, or set kcache_config.k_bits to 16.",
        codes_only=True,
    ),
    Refusal(
        "draft_windows",
        "a sliding window in a draft model ({value})",
        "its layers were not tried beside pools for window layers",
        "Take a draft model with full attention in every layer.",
    ),
    Refusal(
        "draft_shares",
        "drafts that read the cache of the model ({value})",
        "its pages hold no V",
        "Leave --speculative-config out, or set its method to ngram.",
    ),
    Refusal(
        "window_layer",
        "a sliding window in a split layer ({value})",
        "selection covers the whole context",
        _STOCK,
    ),
    Refusal(
        "attention_type",
        "attention of another type than a decoder's ({value})",
        "it reads no cache, or that of an encoder",
        _STOCK,
    ),
    Refusal(
        "derived_backend",
        "attention derived from ours ({value})",
        "vLLM changes what is attended, and prefill is causal here",
        _STOCK,
    ),
    Refusal(
        "not_causal",
        "attention that is not causal",
        "prefill is causal here",
        _STOCK,
    ),
    Refusal(
        "output_quantisation",
        "quantised attention output",
        "it is not written here",
        "Leave the fusion that asks for it off.",
    ),
    Refusal(
        "kv_cache_groups",
        "several KV cache groups ({value})",
        "one id must name a block of K and its block of V",
        _STOCK,
    ),
    Refusal(
        "layer_shapes",
        "layers of different shapes ({value})",
        "there is one host pool for all layers",
        _STOCK,
    ),
    Refusal(
        "v_head_size",
        "V heads of another size than K heads ({value})",
        "there is one host pool for all layers, of the shape of K",
        _STOCK,
    ),
    Refusal(
        "layer_query_heads",
        "layers of different numbers of query heads ({value})",
        "all split layers share their buffers",
        _STOCK,
    ),
    Refusal(
        "shared_cache",
        "layers that share the cache of another layer, on a GPU ({value})",
        "a prompt's V would be read back before it has left",
        _STOCK,
    ),
)
