# SPDX-License-Identifier: Apache-2.0
"""Model folders: most with nothing but a config.json, for tests that never load weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

# 4 query heads of 64 values on 2 KV heads; every family spells it its own way.
_COMMON = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llama_like(architecture: str, model_type: str, **changes: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **_COMMON,
        **changes,
    }


def llama(**changes: Any) -> dict[str, Any]:
    """A Llama configuration, changed."""
    return _llama_like("LlamaForCausalLM", "llama", **changes)


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": llama(),
    "llama, head size 32": llama(num_attention_heads=8, num_key_value_heads=2),
    "llama, 20 query heads on one KV head": llama(
        hidden_size=1280, num_attention_heads=20, num_key_value_heads=1
    ),
    "llama, fp8 KV in the checkpoint": llama(
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {},
            "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"},
        }
    ),
    "qwen2": _llama_like("Qwen2ForCausalLM", "qwen2", use_sliding_window=False, sliding_window=256),
    "qwen3": _llama_like(
        "Qwen3ForCausalLM",
        "qwen3",
        head_dim=64,
        use_sliding_window=False,
        sliding_window=None,
        layer_types=["full_attention", "full_attention"],
    ),
    "qwen2, window": _llama_like(
        "Qwen2ForCausalLM",
        "qwen2",
        use_sliding_window=True,
        sliding_window=256,
        max_window_layers=0,
    ),
    "mistral": _llama_like("MistralForCausalLM", "mistral", sliding_window=None),
    "mistral, window": _llama_like("MistralForCausalLM", "mistral", sliding_window=256),
    "mistral, some windows": _llama_like(
        "MistralForCausalLM",
        "mistral",
        sliding_window=256,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma3": _llama_like(
        "Gemma3ForCausalLM",
        "gemma3_text",
        head_dim=64,
        sliding_window=256,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "olmo3": _llama_like(
        "Olmo3ForCausalLM",
        "olmo3",
        sliding_window=256,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "granite": _llama_like("GraniteForCausalLM", "granite"),
    "granite, sinks": _llama_like(
        "GraniteForCausalLM", "granite", layer_types=["full_attention", "full_attention"]
    ),
    "phi3, window as long as the context": _llama_like(
        "Phi3ForCausalLM", "phi3", sliding_window=512, pad_token_id=0
    ),
    "gemma2": _llama_like(
        "Gemma2ForCausalLM",
        "gemma2",
        head_dim=64,
        sliding_window=256,
        attn_logit_softcapping=50.0,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "bloom": {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": 128,
        "hidden_size": 256,
        "n_layer": 2,
        "n_head": 4,
        "torch_dtype": "bfloat16",
    },
    "falcon, ALiBi": {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "vocab_size": 128,
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "alibi": True,
        "torch_dtype": "bfloat16",
    },
    "step1": _llama_like("Step1ForCausalLM", "llama"),
    "llama4 text": _llama_like(
        "Llama4ForCausalLM",
        "llama4_text",
        head_dim=64,
        attention_chunk_size=128,
        layer_types=["chunked_attention", "full_attention"],
        num_local_experts=2,
        intermediate_size_mlp=128,
    ),
    "llama4 text, chunks alone": _llama_like(
        "Llama4ForCausalLM",
        "llama4_text",
        head_dim=64,
        attention_chunk_size=128,
        layer_types=["chunked_attention", "chunked_attention"],
        num_local_experts=2,
        intermediate_size_mlp=128,
    ),
    "whisper": {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "vocab_size": 128,
        "d_model": 256,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "max_source_positions": 64,
        "max_target_positions": 64,
        "is_encoder_decoder": True,
        "torch_dtype": "bfloat16",
    },
    "deepseek v2": _llama_like(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        kv_lora_rank=64,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=64,
        first_k_dense_replace=2,
    ),
    "jamba": _llama_like(
        "JambaForCausalLM",
        "jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=16,
        use_mamba_kernels=False,
    ),
    "mamba": {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "vocab_size": 128,
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "state_size": 16,
        "torch_dtype": "bfloat16",
    },
    "bert": {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": 128,
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "torch_dtype": "bfloat16",
    },
    "gpt-oss": _llama_like(
        "GptOssForCausalLM",
        "gpt_oss",
        head_dim=64,
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"],
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
}


def model_folder(parent: Path, config: dict[str, Any]) -> str:
    """Write a folder that vLLM can read a configuration from; return its path."""
    parent.mkdir(parents=True, exist_ok=True)
    (parent / "config.json").write_text(json.dumps(config))
    return str(parent)


def write_llama(folder: Path, **changes: Any) -> str:
    """A Llama model with random float32 weights; returns its folder.

    The weights are large enough for greedy decoding to leave no ties.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{**_COMMON, "torch_dtype": "float32", "initializer_range": 0.1, **changes}
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


# vLLM ties its embeddings always. Scores are about as large as the cap; logits need none.
GEMMA2 = {
    "tie_word_embeddings": True,
    "attn_logit_softcapping": 10.0,
    "final_logit_softcapping": None,
}


def write_window_model(folder: Path, model_type: str, **changes: Any) -> str:
    """A random float32 model of which some layers have a window of 64 tokens; returns its folder.

    Args:
        model_type: "gemma3_text", "gemma2", "olmo3", "llama4_text", or "gpt_oss" with sinks that
            weigh.
        changes: Of its configuration.
    """
    of_some: dict[str, Any] = {
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "sliding_window": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
    if model_type == "gemma2":
        of_some |= GEMMA2
    if model_type == "llama4_text":
        # Chunks in place of windows, and no rotary embedding in the other layers.
        kinds = changes.pop("layer_types")
        changes["layer_types"] = [kind.replace("sliding", "chunked") for kind in kinds]
        changes["no_rope_layers"] = [int(kind != "full_attention") for kind in kinds]
        of_some |= {"attention_chunk_size": of_some.pop("sliding_window")}
        of_some["intermediate_size_mlp"] = 128
    return write_random_model(folder, model_type, **{**of_some, **changes})


def write_random_model(folder: Path, model_type: str, **changes: Any) -> str:
    """A random float32 model of a family; returns its folder.

    Args:
        model_type: Transformers' name of the family.
        changes: Of its configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        **{
            **_COMMON,
            "num_hidden_layers": 4,
            "vocab_size": 512,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            "initializer_range": 0.2,
            "torch_dtype": "float32",
            **changes,
        },
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        # What a new model has as zeros.
        if name.endswith(("sinks", "proj.bias")):
            torch.nn.init.normal_(parameter, std=2.0 if name.endswith("sinks") else 0.2)
    if config.tie_word_embeddings:
        # Otherwise a random model says the word again that it was given.
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.01)
    model.save_pretrained(folder)
    return str(folder)


# Of the tokens that stand for images, and of a rotary embedding in three directions.
_IMAGES = {
    "image_token_id": 508, "video_token_id": 509, "vision_start_token_id": 510,
    "vision_end_token_id": 511,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [12, 10, 10]}


def write_qwen3_vl(folder: Path) -> str:
    """A random float32 Qwen3-VL, an encoder of images before its language layers; returns its
    folder."""
    import torch
    from transformers import AutoModelForImageTextToText, Qwen3VLConfig

    torch.manual_seed(0)
    text = {
        **_COMMON, "num_hidden_layers": 4, "vocab_size": 512, "head_dim": 64, "pad_token_id": 0,
        "initializer_range": 0.2, "rope_parameters": {**_ROPE, "mrope_interleaved": True},
        "torch_dtype": "float32",
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 4,
        "out_hidden_size": text["hidden_size"], "deepstack_visual_indexes": [0],
        "num_position_embeddings": 64,
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, torch_dtype="float32", tie_word_embeddings=False,
        **_IMAGES,
    )  # fmt: skip
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return str(folder)


def write_qwen2_5_vl(folder: Path) -> str:
    """A random float32 Qwen2.5-VL with a tokenizer of bytes and the processors of its images;
    returns its folder. Needs torchvision."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    end, image, video, start, stop = special = [
        "<|endoftext|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>",
    ]  # fmt: skip
    tokenizer, ids = _bytes_and(special, end)
    size = {"shortest_edge": 56 * 56, "longest_edge": 560 * 280}
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size), tokenizer, Qwen2VLVideoProcessor(size=size)
    ).save_pretrained(folder)
    text = {**_SEEING, "rope_parameters": {**_ROPE, "mrope_section": [8, 12, 12]},
            "bos_token_id": ids[end], "eos_token_id": ids[end]}  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 128, "intermediate_size": 128, "num_heads": 2,
        "out_hidden_size": text["hidden_size"], "fullatt_block_indexes": [1],
        "initializer_range": 0.2,
    }  # fmt: skip
    return _save_seeing(
        Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, torch_dtype="float32",
            tie_word_embeddings=False, image_token_id=ids[image], video_token_id=ids[video],
            vision_start_token_id=ids[start], vision_end_token_id=ids[stop],
        ),
        folder,
    )  # fmt: skip


def write_idefics3(folder: Path) -> str:
    """A random float32 Idefics3, the form of SmolVLM, with a tokenizer of bytes and a processor, in
    which an image has 64 tokens and one on each side; returns its folder."""
    from transformers import Idefics3Config, Idefics3ImageProcessor, Idefics3Processor

    side, end = 112, "<|endoftext|>"
    special = [end, "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer, ids = _bytes_and(special, end)
    size = {"longest_edge": side}
    images = Idefics3ImageProcessor(size=size, max_image_size=size, do_image_splitting=False)
    Idefics3Processor(images, tokenizer, image_seq_len=64).save_pretrained(folder)
    vision = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": side, "patch_size": 7, "initializer_range": 0.2,
    }  # fmt: skip
    return _save_seeing(
        Idefics3Config(
            text_config={**_SEEING, "model_type": "llama"}, vision_config=vision, scale_factor=2,
            image_token_id=ids["<image>"], pad_token_id=ids[end], torch_dtype="float32",
        ),
        folder,
    )  # fmt: skip


# The language model of one that takes images.
_SEEING = {
    **_COMMON, "num_hidden_layers": 3, "vocab_size": 512, "max_position_embeddings": 1024,
    "initializer_range": 0.2, "torch_dtype": "float32",
}  # fmt: skip


def _bytes_and(special: list[str], end: str) -> tuple[Any, dict[str, int]]:
    """A tokenizer of a token a byte and then these; and the numbers of these."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={each: i for i, each in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, pad_token=end)
    return tokenizer, {name: made.token_to_id(name) for name in special}


def _save_seeing(config: Any, folder: Path) -> str:
    import torch
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return str(folder)


def write_gemma3_images(folder: Path) -> str:
    """A random float32 Gemma 3 with its encoder of images, and no processor; returns its
    folder."""
    import torch
    from transformers import AutoModelForImageTextToText, Gemma3Config

    torch.manual_seed(0)
    text = {
        **_COMMON, "num_hidden_layers": 3, "vocab_size": 512, "head_dim": 64,
        "initializer_range": 0.2, "sliding_window": 64, "torch_dtype": "float32",
        # Attention that is not flat: what is read then depends on the last token.
        "query_pre_attn_scalar": 4,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, torch_dtype="float32",
        image_token_index=508, boi_token_index=509, eoi_token_index=510,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config)
    # Otherwise a random model says the word again that it was given.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.01)
    model.save_pretrained(folder)
    return str(folder)


def cut_model(source: Path, folder: Path, layers: list[int]) -> str:
    """The model of `source` with these of its layers only, in a new folder; returns its path."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder.mkdir()
    for path in source.glob("*.json"):
        shutil.copy(path, folder)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": len(layers)}))
    weights = {}
    with safe_open(source / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dictionary)
            numbered = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
            if not numbered:
                weights[name] = file.get_tensor(name)
            elif int(numbered[1]) in layers:
                place = layers.index(int(numbered[1]))
                weights[f"model.layers.{place}.{numbered[2]}"] = file.get_tensor(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)
