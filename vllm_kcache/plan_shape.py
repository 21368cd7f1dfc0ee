# SPDX-License-Identifier: Apache-2.0
"""What the planner needs to know of a model, read from its config.json alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Bytes of a value by --dtype. With "auto" vLLM runs every checkpoint in a type of two bytes.
DTYPE_BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}
# Quantisation methods by the bits of a weight; others say so themselves in "bits".
_METHOD_BITS = {"fp8": 8, "fbgemm_fp8": 8, "modelopt": 8, "mxfp4": 4, "awq": 4}
# Feed-forward blocks of two matrices; everybody else gates, with three.
_UNGATED = frozenset(
    ("opt", "gpt2", "gptj", "gpt_neox", "gpt_bigcode", "starcoder2", "phi", "nemotron")
)
_NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
    "vocab_size": ("vocab_size",),
}


class PlanError(ValueError):
    """The planner cannot answer; the message says what is missing or not supported."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model, whole (not one rank's).

    Attributes:
        name: Name of its folder.
        num_layers: Attention layers.
        hidden_size: Width.
        intermediate_size: Width of the widest feed-forward block of a token.
        num_query_heads: Hq.
        num_kv_heads: Hkv.
        head_size: D.
        vocab_size: Rows of the embedding.
        itemsize: Bytes of a value of K and V, and of an activation.
        max_position: Longest request the model was made for, tokens.
        weight_bytes: Weights in GPU memory.
        dense_weight_bytes: Weights that every step reads, whatever the batch.
        num_experts: Experts of each layer; 0 for a dense model.
        experts_per_token: Of those, how many a token uses.
        expert_weight_bytes: One expert, over all layers.
    """

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    itemsize: int
    max_position: int
    weight_bytes: int
    dense_weight_bytes: int
    num_experts: int = 0
    experts_per_token: int = 0
    expert_weight_bytes: int = 0

    @property
    def k_bytes_per_token(self) -> int:
        """Bytes of K of one token, over all layers; V has as many."""
        return self.num_layers * self.num_kv_heads * self.head_size * self.itemsize

    def weight_bytes_of_step(self, num_tokens: float) -> float:
        """Weight bytes that a step of so many tokens reads: of the experts, those that are hit."""
        if not self.num_experts:
            return self.dense_weight_bytes
        missed = (1 - self.experts_per_token / self.num_experts) ** num_tokens
        return self.dense_weight_bytes + (
            self.num_experts * (1 - missed) * self.expert_weight_bytes
        )

    def flops_of_token(self) -> float:
        """Multiply-adds of the weights for one token, times two."""
        used = self.dense_weight_bytes + self.experts_per_token * self.expert_weight_bytes
        return 2 * used / self.itemsize


def find_config(model: str) -> Path:
    """config.json of a folder, or of a Hugging Face model that lies in the local cache.

    Raises:
        PlanError: There is none; nothing is downloaded.
    """
    path = Path(model)
    for candidate in (path, path / "config.json"):
        if candidate.is_file():
            return candidate
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise PlanError(
            f"{model}: no config.json there, and huggingface_hub is not installed. Give a folder."
        ) from None
    try:
        cached = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        cached = None
    if not isinstance(cached, str):
        raise PlanError(
            f"{model}: neither a folder with a config.json nor a model in the local cache. "
            "Download it first, or give a folder."
        )
    return Path(cached)


def read_shape(model: str, dtype: str = "auto", weight_bits: int | None = None) -> ModelShape:
    """Read the sizes of a model.

    Args:
        model: Folder, path of a config.json, or name of a cached Hugging Face model.
        dtype: Type the model runs in, as vLLM's --dtype.
        weight_bits: Bits of a weight of a linear layer; None reads them from the configuration.

    Raises:
        PlanError: Not found, a size is missing, or a kind of attention that is not supported.
    """
    path = find_config(model)
    try:
        whole = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise PlanError(f"{path}: not valid JSON ({error})") from None
    if dtype not in DTYPE_BYTES:
        raise PlanError(f"dtype={dtype}: must be one of {', '.join(DTYPE_BYTES)}")
    config = whole.get("text_config", whole)
    _refuse(path, config)
    return _shape(path, whole, config, DTYPE_BYTES[dtype], weight_bits)


def _refuse(path: Path, config: dict[str, Any]) -> None:
    """Attention whose cache the planner would get wrong."""
    kinds = {str(kind) for kind in config.get("layer_types") or ()}
    found = {
        "multi-head latent attention (kv_lora_rank)": config.get("kv_lora_rank"),
        f"layer_types {sorted(kinds)}": kinds - {"full_attention", "attention"},
        "an encoder and a decoder (is_encoder_decoder)": config.get("is_encoder_decoder"),
        f"sliding_window={config.get('sliding_window')}": config.get("sliding_window")
        and config.get("use_sliding_window", True),
    }
    for feature, is_there in found.items():
        if is_there:
            raise PlanError(
                f"{path}: the model has {feature}, which the split cache does not serve. "
                "vllm-kcache check lists everything that would be refused."
            )


def _size(path: Path, config: dict[str, Any], name: str) -> int:
    for alias in _NAMES[name]:
        if isinstance(config.get(alias), int):
            return config[alias]
    raise PlanError(f"{path}: {name} is missing; the planner reads {', '.join(_NAMES[name])}")


def _weight_bits(
    path: Path, whole: dict[str, Any], itemsize: int, weight_bits: int | None
) -> float:
    if weight_bits is not None:
        return weight_bits
    quantization = whole.get("quantization_config")
    if not quantization:
        return 8 * itemsize
    method = str(quantization.get("quant_method", ""))
    bits = quantization.get("bits", _METHOD_BITS.get(method))
    if not isinstance(bits, int):
        raise PlanError(
            f"{path}: quantization_config of {method or 'an unknown method'} does not say how many "
            "bits a weight has. Give --weight-bits."
        )
    return bits


def _shape(
    path: Path,
    whole: dict[str, Any],
    config: dict[str, Any],
    itemsize: int,
    weight_bits: int | None,
) -> ModelShape:
    hidden = _size(path, config, "hidden_size")
    layers = _size(path, config, "num_hidden_layers")
    heads = _size(path, config, "num_attention_heads")
    vocab = _size(path, config, "vocab_size")
    kv_heads = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or hidden // heads
    bytes_each = _weight_bits(path, whole, itemsize, weight_bits) / 8

    attention = hidden * head_size * (2 * heads + 2 * kv_heads)
    matrices = 2 if config.get("model_type") in _UNGATED else 3
    inner = config.get("intermediate_size") or config.get("ffn_dim") or 4 * hidden
    experts = int(
        config.get("num_local_experts")
        or config.get("num_experts")
        or config.get("n_routed_experts")
        or 0
    )
    if experts:
        expert = matrices * hidden * (config.get("moe_intermediate_size") or inner)
        shared = matrices * hidden * int(config.get("shared_expert_intermediate_size") or 0)
        feed_forward, per_token = shared, int(config.get("num_experts_per_tok") or 1)
    else:
        expert, per_token, feed_forward = 0, 0, matrices * hidden * inner
    linear = int(layers * (attention + feed_forward) * bytes_each)
    table = vocab * hidden * itemsize
    # A step reads the output matrix whole, of the embedding a row a token. Tied, they are one.
    tied = bool(config.get("tie_word_embeddings", whole.get("tie_word_embeddings", False)))
    expert_bytes = int(layers * expert * bytes_each)
    return ModelShape(
        name=path.parent.name,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=max(inner, per_token * (expert // max(1, matrices * hidden))),
        num_query_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        vocab_size=vocab,
        itemsize=itemsize,
        max_position=int(config.get("max_position_embeddings") or 131072),
        weight_bytes=linear + table * (1 if tied else 2) + experts * expert_bytes,
        dense_weight_bytes=linear + table,
        num_experts=experts,
        experts_per_token=per_token,
        expert_weight_bytes=expert_bytes,
    )
