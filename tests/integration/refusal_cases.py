# SPDX-License-Identifier: Apache-2.0
"""How to meet each refusal, with the message expected; and what must keep working."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PREFIX = "--kv-backend kcache does not support "


@dataclass
class Case:
    """One way to meet a refusal.

    Attributes:
        entry: `feature` of the entry in REFUSALS.
        expected: Beginning of the message after PREFIX, with the value.
        remedy: Part of the message that says what to do.
        model: Name in tiny_models.py.
        arguments: Engine arguments that switch the feature on.
        changed: Fields of the finished configuration to set, by dotted name.
        variables: Environment variables to set.
        settings: The plugin's settings without which it is not refused.
    """

    entry: str
    expected: str
    remedy: str
    model: str = "llama"
    arguments: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


KV_DTYPE = "kv_cache_dtype={value}"
WINDOW = "sliding-window attention in every layer ({value})"
SINKS = "attention sinks ({value})"
ALIBI = "ALiBi ({value})"
CONNECTOR = "kv_connector={value}"
MICROBATCHING = "microbatching ({value})"
CHUNKED = "chunked local attention in every layer ({value})"
STATES = "speculative decoding beside layers with a state, by vLLM's first runner (method={value})"
SPECULATION = "speculative decoding (method={value})"
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
NO_NUMBERS = tuple(map(float, ("inf", "-inf", "nan")))
OTHER_DRAFTS = (
    "medusa", "mlp_speculator", "extract_hidden_states", "dflash", "dspark",
)  # fmt: skip
OWN_BACKEND = "vLLM's own backend"
FULL_ATTENTION = "Serve a model with full attention in every layer"

# fmt: off
CASES = {
    "fp8 KV": Case(
        KV_DTYPE,
        "kv_cache_dtype=fp8: pages and host rows have formats of their own, by kcache_config.k_bits"
        " and host_dtype",
        "Leave --kv-cache-dtype at auto", arguments={"kv_cache_dtype": "fp8"},
    ),
    "int8 KV": Case(
        KV_DTYPE, "kv_cache_dtype=int8_per_token_head:", "Leave --kv-cache-dtype at auto",
        changed={"cache_config.cache_dtype": "int8_per_token_head"},
    ),
    "KV of another float type": Case(
        KV_DTYPE, "kv_cache_dtype=bfloat16:", "Leave --kv-cache-dtype at auto",
        arguments={"dtype": "float32"}, changed={"cache_config.cache_dtype": "bfloat16"},
    ),
    "fp8 KV of the checkpoint": Case(
        KV_DTYPE, "kv_cache_dtype=fp8, from kv_cache_scheme={",
        "set --kv-cache-dtype to the model's",
        model="llama, fp8 KV in the checkpoint",
    ),
    "offloading": Case(
        "kv_offloading_size={value}", "kv_offloading_size=1.0:", "Leave --kv-offloading-size out",
        arguments={"kv_offloading_size": 1.0},
    ),
    "connector": Case(
        CONNECTOR, "kv_connector=OffloadingConnector:", "Leave --kv-transfer-config out",
        arguments={
            "kv_transfer_config": {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
        },
    ),
    "fast prefill": Case(
        "kv_sharing_fast_prefill={value}", "kv_sharing_fast_prefill=True:",
        "Leave --kv-sharing-fast-prefill out",
        arguments={"kv_sharing_fast_prefill": True},
    ),
    "n-grams of a GPU": Case(
        SPECULATION, "speculative decoding (method=ngram_gpu, on a CPU):",
        "set its method to ngram",
        arguments={"speculative_config": {**NGRAM, "method": "ngram_gpu"}},
    ),
    **{
        f"drafts by {method}": Case(
            SPECULATION, f"speculative decoding (method={method}):", "set its method to ngram",
            arguments={"speculative_config": NGRAM},
            changed={"speculative_config.method": method},
        )
        for method in OTHER_DRAFTS
    },
    "drafts made at once": Case(
        SPECULATION, "speculative decoding (method=ngram, parallel_drafting=True):",
        "set its method to ngram",
        arguments={"speculative_config": NGRAM},
        changed={"speculative_config.parallel_drafting": True},
    ),
    "drafts of other words": Case(
        SPECULATION, "speculative decoding (method=ngram, use_heterogeneous_vocab=True):",
        "set its method to ngram",
        arguments={"speculative_config": NGRAM},
        changed={"speculative_config.use_heterogeneous_vocab": True},
    ),
    "speculative decoding on stages": Case(
        "speculative decoding on pipeline stages (pipeline_parallel_size={value})",
        "speculative decoding on pipeline stages (pipeline_parallel_size=2):",
        "Use --tensor-parallel-size",
        arguments={"speculative_config": NGRAM, "pipeline_parallel_size": 2},
    ),
    "all layers with a window": Case(
        WINDOW, "sliding-window attention in every layer (sliding_window=256):",
        "--disable-sliding-window", model="mistral, window",
    ),
    "use_sliding_window": Case(
        WINDOW, "sliding-window attention in every layer (sliding_window=256):",
        "full attention in some layers", model="qwen2, window",
    ),
    "window as long as the context": Case(
        WINDOW, "sliding-window attention in every layer (sliding_window=512):",
        "--disable-sliding-window", model="phi3, window as long as the context",
    ),
    "one pool beside windows": Case(
        "one pool for all layers beside sliding-window layers ({value})",
        "one pool for all layers beside sliding-window layers "
        "(disable_hybrid_kv_cache_manager=True):",
        "Leave --disable-hybrid-kv-cache-manager out", model="gemma3",
        arguments={"disable_hybrid_kv_cache_manager": True},
    ),
    "stages beside windows": Case(
        "pipeline stages beside sliding-window layers ({value})",
        "pipeline stages beside sliding-window layers (pipeline_parallel_size=2):",
        "Use --tensor-parallel-size",
        model="gemma3", arguments={"pipeline_parallel_size": 2},
    ),
    "a length that vLLM chooses beside windows": Case(
        "a length that vLLM chooses beside sliding-window layers ({value})",
        "a length that vLLM chooses beside sliding-window layers (max_model_len=-1):",
        "Set --max-model-len", model="gemma3",
        arguments={"max_model_len": -1},
    ),
    "chunked layers alone": Case(
        CHUNKED, "chunked local attention in every layer (layer_types with 'chunked_attention'):",
        "Serve a model with full attention in some layers", model="llama4 text, chunks alone",
    ),
    "chunks in every layer": Case(
        CHUNKED, "chunked local attention in every layer (attention_chunk_size=128):",
        "Serve a model with full attention in some layers",
        changed={"model_config.attention_chunk_size": 128},
    ),
    "reference window": Case(
        "reference sliding-window attention (rswa_window={value})",
        "reference sliding-window attention (rswa_window=64):", FULL_ATTENTION,
        changed={"model_config.model_arch_config.rswa_window": 64},
    ),
    "encoder-decoder": Case(
        "encoder-decoder models ({value})",
        "encoder-decoder models (WhisperForConditionalGeneration):", "Serve a decoder-only model",
        model="whisper",
    ),
    "MLA": Case(
        "multi-head latent attention, MLA ({value})",
        "multi-head latent attention, MLA (DeepseekV2ForCausalLM):", OWN_BACKEND,
        model="deepseek v2",
    ),
    "prefixes that end within a page, beside states": Case(
        "part of a page as a prefix, beside layers with a state (prefix_match_unit={value})",
        "part of a page as a prefix, beside layers with a state (prefix_match_unit=8):",
        "Leave --prefix-match-unit out", model="jamba",
        arguments={"enable_prefix_caching": True, "prefix_match_unit": 8},
    ),
    "states and drafts on a CPU": Case(
        STATES, "speculative decoding beside layers with a state, by vLLM's first runner "
        "(method=ngram):", "on a CPU leave --speculative-config out", model="jamba",
        arguments={"speculative_config": NGRAM},
    ),
    # A CPU has no second one, so that none is asked for.
    "states and drafts of the first runner of a GPU": Case(
        STATES, "speculative decoding beside layers with a state, by vLLM's first runner "
        "(method=ngram):", "On a GPU take a method of the second runner", model="jamba",
        arguments={"speculative_config": NGRAM},
        changed={"device_config.device_type": "cuda"},
        variables={"VLLM_USE_V2_MODEL_RUNNER": "0"},
    ),
    # Of n-grams vLLM's configuration names the model itself.
    "states in a draft model": Case(
        "layers with a state in a draft model ({value})",
        "layers with a state in a draft model (JambaForCausalLM):",
        "Take a draft model with full attention in every layer", model="jamba",
        arguments={"speculative_config": NGRAM},
        changed={"speculative_config.method": "draft_model"},
    ),
    "one pool beside states": Case(
        "one pool for all layers beside sliding-window layers ({value})",
        "one pool for all layers beside sliding-window layers (disable_hybrid_kv_cache_manager",
        "Leave --disable-hybrid-kv-cache-manager out", model="jamba",
        changed={"scheduler_config.disable_hybrid_kv_cache_manager": True},
    ),
    "attention-free": Case(
        "attention-free models ({value})", "attention-free models (MambaForCausalLM):",
        "Serve a model with attention in some layers", model="mamba",
    ),
    "diffusion": Case(
        "diffusion models ({value})", "diffusion models (LlamaForCausalLM):",
        "Serve a model that decodes token by token",
        arguments={"diffusion_config": {"canvas_length": 8}},
    ),
    "images": Case(
        "bidirectional attention among the tokens of an image ({value})",
        "bidirectional attention among the tokens of an image (LlamaForCausalLM):",
        "--language-model-only",
        changed={"model_config.model_arch_config.is_mm_prefix_lm": True},
    ),
    "encoder only": Case(
        "encoder-only instances (mm_encoder_only of {value})",
        "encoder-only instances (mm_encoder_only of WhisperForConditionalGeneration):",
        "Leave --mm-encoder-only", model="whisper",
        changed={"model_config.multimodal_config.mm_encoder_only": True},
    ),
    "not causal": Case(
        "use_non_causal={value}", "use_non_causal=True:", "Leave use_non_causal out",
        arguments={"attention_config": {"use_non_causal": True}},
    ),
    "pooling model": Case(
        "pooling models (runner={value})", "pooling models (runner=pooling):", OWN_BACKEND,
        model="bert",
    ),
    "pooling runner": Case(
        "pooling models (runner={value})", "pooling models (runner=pooling):", OWN_BACKEND,
        arguments={"runner": "pooling"},
    ),
    "Bloom": Case(ALIBI, "ALiBi (BloomForCausalLM):", "Serve a model with rotary", model="bloom"),
    "Falcon": Case(
        ALIBI, "ALiBi (FalconForCausalLM):", "Serve a model with rotary", model="falcon, ALiBi"
    ),
    "Step1": Case(ALIBI, "ALiBi (Step1ForCausalLM):", "Serve a model with rotary", model="step1"),
    "sinks of Granite": Case(
        SINKS, "attention sinks (layer_types of Granite):", "Serve a model without learned sinks",
        model="granite, sinks",
    ),
    "sinks by a setting": Case(
        SINKS, "attention sinks (add_full_attention_sink_bias=True):",
        "Serve a model without learned sinks",
        changed={"model_config.hf_text_config.add_full_attention_sink_bias": True},
    ),
    **{
        f"a soft cap of {cap}": Case(
            "a soft cap on scores out of range ({value})",
            f"a soft cap on scores out of range (attn_logit_softcapping={cap}):",
            "null is none", changed={"model_config.hf_text_config.attn_logit_softcapping": cap},
        )
        for cap in (*NO_NUMBERS, -50.0, 1025.0, 9e-4, "50")
    },
    **{
        f"{setting} of {value}": Case(
            "a scale of scores out of range ({value})",
            f"a scale of scores out of range ({setting}={value}):", "Correct what it is made of",
            changed={f"model_config.hf_text_config.{setting}": value},
        )
        for setting in ("query_pre_attn_scalar", "attention_multiplier")
        for value in (*NO_NUMBERS, 0, -64, 1e300)
    },
    "head size": Case(
        "head_size={value}", "head_size=32:", "Serve a model with one of these head sizes",
        model="llama, head size 32",
    ),
    "block size": Case(
        "block_size={value}", "block_size=8:", "Set --block-size to 16, 32, 64 or 128",
        arguments={"block_size": 8},
    ),
    "wide groups on a GPU": Case(
        "{value} query heads per KV head", "20 query heads per KV head:",
        "Serve a model with more KV heads", model="llama, 20 query heads on one KV head",
        changed={"device_config.device_type": "cuda"},
    ),
    "decode context parallel": Case(
        "decode_context_parallel_size={value}", "decode_context_parallel_size=2:",
        "Use --tensor-parallel-size",
        changed={"parallel_config.decode_context_parallel_size": 2},
    ),
    "prefill context parallel": Case(
        "prefill_context_parallel_size={value}", "prefill_context_parallel_size=2:",
        "Use --tensor-parallel-size",
        changed={"parallel_config.prefill_context_parallel_size": 2},
    ),
    "dual batch overlap": Case(
        MICROBATCHING, "microbatching (enable_dbo=True):", "Leave --enable-dbo",
        changed={"parallel_config.enable_dbo": True},
    ),
    "micro batches": Case(
        MICROBATCHING, "microbatching (ubatch_size=4):", "--ubatch-size out",
        changed={"parallel_config.ubatch_size": 4},
    ),
    "elastic experts": Case(
        "enable_elastic_ep={value}", "enable_elastic_ep=True:", "Leave --enable-elastic-ep out",
        changed={"parallel_config.enable_elastic_ep": True},
    ),
    "fault tolerance": Case(
        "enable_fault_tolerance={value}", "enable_fault_tolerance=True:",
        "Leave --enable-fault-tolerance",
        changed={"parallel_config.enable_fault_tolerance": True},
    ),
    "sleep mode": Case(
        "sleep mode ({value})", "sleep mode (enable_sleep_mode=True):",
        "Leave --enable-sleep-mode",
        changed={"model_config.enable_sleep_mode": True},
    ),
    "the allocator of sleep mode": Case(
        "sleep mode ({value})", "sleep mode (enable_cumem_allocator=True):",
        "--enable-cumem-allocator out",
        changed={"model_config.enable_cumem_allocator": True},
    ),
    "transfer of weights": Case(
        "weight_transfer_config={value}",
        "weight_transfer_config=nccl:", "Leave --weight-transfer-config out, or",
        arguments={"weight_transfer_config": {"backend": "nccl"}}, settings={"k_bits": 4},
    ),
    "HiSparse": Case(
        "HiSparse (hisparse_config={value})", "HiSparse (hisparse_config=HiSparseConfig(",
        "Leave hisparse_config out",
        changed={"attention_config.hisparse_config": "vllm.config.attention:HiSparseConfig"},
    ),
    "batch invariance": Case(
        "batch invariance ({value})", "batch invariance (VLLM_BATCH_INVARIANT=1):",
        "Unset VLLM_BATCH_INVARIANT", variables={"VLLM_BATCH_INVARIANT": "1"},
    ),
}
# fmt: on

# Model and engine arguments that are not refused.
FREE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2 with use_sliding_window false": ("qwen2", {}),
    "qwen3 with layer_types of full attention": ("qwen3", {}),
    "mistral with sliding_window null": ("mistral", {}),
    "mistral with its window capped": ("mistral, window", {"disable_sliding_window": True}),
    "mistral with a window in some layers": ("mistral, some windows", {}),
    "gemma3": ("gemma3", {}),
    "gemma3 with its windows capped, in one pool": (
        "gemma3",
        {"disable_sliding_window": True, "disable_hybrid_kv_cache_manager": True},
    ),
    "olmo3": ("olmo3", {}),
    "granite without sinks": ("granite", {}),
    "gpt-oss": ("gpt-oss", {}),
    "gpt-oss with K itself": ("gpt-oss", {"kcache_config": {"k_bits": 16}}),
    "wide groups on the CPU": ("llama, 20 query heads on one KV head", {}),
    "the model's dtype, named": ("llama", {"kv_cache_dtype": "bfloat16"}),
    "a checkpoint's fp8 KV, overruled": (
        "llama, fp8 KV in the checkpoint",
        {"kv_cache_dtype": "bfloat16"},
    ),
    "float32": ("llama", {"dtype": "float32"}),
    "float16": ("llama", {"dtype": "float16"}),
    "prefix caching off": ("llama", {"enable_prefix_caching": False}),
    "LoRA": ("llama", {"enable_lora": True}),
    "KV events": (
        "llama",
        {"kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}},
    ),
    "layers skipped by KV quantisation, without it": (
        "llama",
        {"kv_cache_dtype_skip_layers": ["0"]},
    ),
    "prompt embeddings": ("llama", {"enable_prompt_embeds": True}),
    "the filling connector of benchmarks": (
        "llama",
        {"kv_transfer_config": {"kv_connector": "DecodeBenchConnector", "kv_role": "kv_both"}},
    ),
    "transfer of weights, with K itself": (
        "llama",
        {"weight_transfer_config": {"backend": "nccl"}, "kcache_config": {"k_bits": 16}},
    ),
    "Transformers' model code": ("llama", {"model_impl": "transformers"}),
    "layers with a state": ("jamba", {}),
    "layers with a state, without prefix caching": ("jamba", {"enable_prefix_caching": False}),
    "n-grams": ("llama", {"speculative_config": NGRAM}),
    "n-grams beside window layers": ("gemma3", {"speculative_config": NGRAM}),
    "drafts of a class of one's own": (
        "llama",
        {
            "speculative_config": {
                "method": "custom_class",
                "model": "tests.integration.drafting.KnownTexts",
                "num_speculative_tokens": 2,
            }
        },
    ),
    "tensor parallel": ("llama", {"tensor_parallel_size": 2}),
    "pipeline parallel": ("llama", {"pipeline_parallel_size": 2}),
    "data parallel": ("llama", {"data_parallel_size": 2}),
    "any multiple of 16 as block size": ("llama", {"block_size": 48}),
    "cascade attention's old flag": ("llama", {"disable_cascade_attn": False}),
}
