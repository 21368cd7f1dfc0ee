# SPDX-License-Identifier: Apache-2.0
"""Sizes of a model, read from its config.json alone."""

from __future__ import annotations

import json
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Bytes of a value by --dtype. With "auto" vLLM runs every checkpoint in a type of two bytes.
DTYPE_BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}
# Bits of a weight by quantisation method; other methods say so themselves in "bits".
_METHOD_BITS = {"fp8": 8, "fbgemm_fp8": 8, "modelopt": 8, "mxfp4": 4, "awq": 4}
MOST_WEIGHT_BITS = 32
# Feed-forward blocks of two matrices; all others are gated and have three.
_UNGATED = frozenset(
    ("opt", "gpt2", "gptj", "gpt_neox", "gpt_bigcode", "starcoder2", "phi", "nemotron")
)
# Families whose configurations may leave out which layers have a window: every so many-th has none.
_FULL_EVERY = {"gemma3_text": 6, "llama4_text": 4}
# Kinds of layers whose K and V stay in GPU memory, and the one that keeps a state instead.
WINDOW_KINDS = ("sliding_attention", "chunked_attention")
STATE_KIND = "linear_attention"
# Families whose attention has a gate of the size of its queries.
_GATED_ATTENTION = frozenset(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"))
# Sizes are bounded so that no sum of theirs passes what a float holds, and no list of layers
# fills the memory.
_MOST, _MOST_LAYERS = 2**31 - 1, 10_000


class PlanError(ValueError):
    """The planner cannot answer. The message names the file and key, or the flag."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model, whole (not one rank's).

    Attributes:
        name: Name of its folder, or its name on the Hugging Face hub.
        num_layers: Layers, with attention or with a state.
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
        experts_per_token: Experts that a token uses.
        expert_weight_bytes: One expert, over all layers.
        window: Tokens that the layers with a window attend to; 0 where there are none.
        window_layers: Their numbers, counted from 0 at the bottom.
        state_layers: Numbers of the linear layers, which keep a state in place of K and V.
        state_bytes: State of one request in one of those.
        draft_state_bytes: What a state is larger by for each draft that a step may verify.
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
    window: int = 0
    window_layers: tuple[int, ...] = ()
    state_layers: tuple[int, ...] = ()
    state_bytes: int = 0
    draft_state_bytes: int = 0

    @property
    def num_full_layers(self) -> int:
        """Layers that attend to the whole context."""
        return self.num_layers - len(self.window_layers) - len(self.state_layers)

    @property
    def request_state_bytes(self) -> int:
        """State of one request, in all layers."""
        return len(self.state_layers) * self.state_bytes

    def window_tokens(self, context: float) -> float:
        """Tokens that all window layers together attend to, of a request of so many tokens."""
        return len(self.window_layers) * min(context, self.window)

    def weight_bytes_of_step(self, num_tokens: float) -> float:
        """Weight bytes that a step of so many tokens reads: of the experts, those expected hit."""
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


class _Config:
    """A JSON object of a file; a wrong value raises PlanError with the file and the key."""

    def __init__(self, path: Path, values: dict[str, Any], within: str = "") -> None:
        self.path, self.values, self.within = path, values, within

    def typed(self, kind: type, key: str, default: Any) -> Any:
        """The value of a key, of one JSON type; the default where it is missing or null."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise self.wrong(key, f"a JSON {_JSON_NAMES[kind]}")
        return value

    def whole(
        self, *keys: str, default: int | None = None, least: int = 1, most: int = _MOST
    ) -> int:
        """The whole number of the first of these keys that is there. No default: one must be."""
        key = next((key for key in keys if self.values.get(key) is not None), None)
        if key is not None:
            value = self.values[key]
            if type(value) is not int or not least <= value <= most:
                raise self.wrong(key, f"a whole number from {least} to {most}")
            return value
        if default is None:
            raise PlanError(f"{self.path}: {keys[0]} is missing; read is {' or '.join(keys)}")
        return default

    def wrong(self, key: str, wanted: str) -> PlanError:
        value = _shown(self.values.get(key))
        return PlanError(f"{self.path}: {self.within}{key}={value}: must be {wanted}")


def _shown(value: Any) -> str:
    """A value in a message, whatever its size."""
    text = reprlib.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


_JSON_NAMES = {dict: "object", list: "array", str: "string", bool: "boolean"}


def read_shape(model: str, dtype: str = "auto", weight_bits: int | None = None) -> ModelShape:
    """Read the sizes of a model.

    Args:
        model: Folder, path of a config.json, or name of a cached Hugging Face model.
        dtype: Type the model runs in, as vLLM's --dtype: a key of DTYPE_BYTES.
        weight_bits: Bits of a weight of a linear layer; None reads them from the configuration.

    Raises:
        PlanError: Not found, not readable, a size is missing or impossible, or the model has a
            kind of attention that is not supported.
    """
    path = find_config(model)
    whole = _Config(path, read_config(path))
    config = _Config(path, whole.typed(dict, "text_config", whole.values))
    _refuse(config)
    name = path.absolute().parent.name if Path(model).exists() else model
    itemsize = DTYPE_BYTES[dtype]
    return _shape(name, whole, config, itemsize, weight_bits or _weight_bits(whole, itemsize))


def find_config(model: str) -> Path:
    """config.json of a folder, or of a Hugging Face model that lies in the local cache.

    Raises:
        PlanError: There is none; nothing is downloaded.
    """
    path = Path(model)
    try:
        for candidate in (path, path / "config.json"):
            if candidate.is_file():
                return candidate
    except OSError as error:
        raise PlanError(f"{model}: {error.strerror}") from None
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


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        PlanError: It cannot be read, is not UTF-8, not JSON, or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise PlanError(f"{path}: must be a JSON object, not {_shown(values)}")
    return values


def _refuse(config: _Config) -> None:
    """Attention whose cache the planner would get wrong."""
    kinds = config.typed(list, "layer_types", [])
    if not all(isinstance(kind, str) for kind in kinds):
        raise config.wrong("layer_types", "a JSON array of strings")
    window = _window(config)
    found = {
        "multi-head latent attention (kv_lora_rank)": config.whole(
            "kv_lora_rank", default=0, least=0
        ),
        f"layer_types {_shown(sorted(set(kinds)))}": set(kinds)
        - {"full_attention", "attention", *(WINDOW_KINDS if window else ()), *_states(config)},
        "windows and states": window and set(kinds) & set(_states(config)),
        "an encoder and a decoder (is_encoder_decoder)": config.typed(
            bool, "is_encoder_decoder", False
        ),
        f"sliding_window or attention_chunk_size {window} in every layer": window
        and not any(kind == "full_attention" for kind in _kinds(config)),
    }
    for feature, is_there in found.items():
        if is_there:
            raise PlanError(
                f"{config.path}: the model has {feature}, which the split cache does not serve. "
                "vllm-kcache check lists everything that would be refused."
            )


def _states(config: _Config) -> tuple[str, ...]:
    """The kind of layers with a state, where the configuration has their sizes."""
    return (STATE_KIND,) if config.values.get("linear_num_value_heads") is not None else ()


@dataclass(frozen=True)
class _LinearLayer:
    """Sizes of a linear layer (gated delta net).

    Attributes:
        weights: Weights of its matrices.
        state_bytes: State of a request: the last inputs of a convolution, and a matrix a head.
        input_bytes: One input of the convolution; a state keeps one more for each draft.
    """

    weights: int
    state_bytes: int
    input_bytes: int

    @classmethod
    def of(cls, config: _Config, hidden: int, itemsize: int) -> _LinearLayer:
        heads = config.whole("linear_num_value_heads")
        head_k, head_v = config.whole("linear_key_head_dim"), config.whole("linear_value_head_dim")
        keys, values = config.whole("linear_num_key_heads") * head_k, heads * head_v
        width = config.whole("linear_conv_kernel_dim", default=4)
        # Queries, keys, values, a gate; two numbers a head; and what leaves.
        weights = hidden * (2 * keys + 2 * values + 2 * heads + values) + width * (
            2 * keys + values
        )
        name = config.typed(str, "mamba_ssm_dtype", "auto")
        matrix = heads * head_k * head_v * DTYPE_BYTES.get(name if name != "auto" else "", itemsize)
        given = (2 * keys + values) * itemsize
        return cls(weights, (width - 1) * given + matrix, given)


def _window(config: _Config) -> int:
    """Tokens of the window, or of the chunks, that some or all layers have; 0 for none."""
    window = config.whole("sliding_window", default=0, least=0)
    if window and config.typed(bool, "use_sliding_window", True):
        return window
    return config.whole("attention_chunk_size", default=0, least=0)


def _kinds(config: _Config) -> list[str]:
    """The kind of each layer, where the configuration says it or its family implies it."""
    kinds = config.typed(list, "layer_types", [])
    family = config.typed(str, "model_type", "")
    every = config.whole("sliding_window_pattern", default=_FULL_EVERY.get(family, 0), least=0)
    if kinds or not every:
        return kinds
    layers = config.whole("num_hidden_layers", "n_layer", "n_layers", most=_MOST_LAYERS)
    return [
        "sliding_attention" if number % every else "full_attention"
        for number in range(1, layers + 1)
    ]


def _weight_bits(whole: _Config, itemsize: int) -> int:
    quantization = whole.typed(dict, "quantization_config", {})
    if not quantization:
        return 8 * itemsize
    config = _Config(whole.path, quantization, "quantization_config.")
    method = config.typed(str, "quant_method", "")
    bits = config.whole("bits", default=_METHOD_BITS.get(method, 0), most=MOST_WEIGHT_BITS)
    if not bits:
        raise PlanError(
            f"{whole.path}: quantization_config of quant_method={_shown(method)} does not "
            "say how many bits a weight has. Give --weight-bits."
        )
    return bits


def _shape(
    name: str, whole: _Config, config: _Config, itemsize: int, weight_bits: int
) -> ModelShape:
    hidden = config.whole("hidden_size", "n_embd", "d_model")
    layers = config.whole("num_hidden_layers", "n_layer", "n_layers", most=_MOST_LAYERS)
    heads = config.whole("num_attention_heads", "n_head", "n_heads", most=hidden)
    kv_heads = config.whole("num_key_value_heads", default=heads, most=heads)
    if heads % kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of the {heads} query heads")
    head_size = config.whole("head_dim", default=hidden // heads)
    vocab = config.whole("vocab_size")
    window = _window(config)

    family = config.typed(str, "model_type", "")
    gate = heads if family in _GATED_ATTENTION else 0
    kinds = list(enumerate(_kinds(config)[:layers]))
    states = tuple(number for number, kind in kinds if kind == STATE_KIND)
    attention = (layers - len(states)) * hidden * head_size * (2 * heads + 2 * kv_heads + gate)
    state_bytes = draft_state_bytes = 0
    if states:
        of_state = _LinearLayer.of(config, hidden, itemsize)
        attention += len(states) * of_state.weights
        state_bytes, draft_state_bytes = of_state.state_bytes, of_state.input_bytes
    matrices = 2 if family in _UNGATED else 3
    inner = config.whole("intermediate_size", "ffn_dim", default=4 * hidden)
    experts = config.whole(
        "num_local_experts", "num_experts", "n_routed_experts", default=0, least=0
    )
    per_token = expert_inner = 0
    feed_forward = inner
    if experts:
        per_token = config.whole("num_experts_per_tok", default=1, most=experts)
        expert_inner = config.whole("moe_intermediate_size", default=inner)
        feed_forward = config.whole("shared_expert_intermediate_size", default=0, least=0)
    linear = (attention + layers * matrices * hidden * feed_forward) * weight_bits // 8
    expert_bytes = layers * matrices * hidden * expert_inner * weight_bits // 8
    table = vocab * hidden * itemsize
    # A step reads the output matrix whole, of the embedding a row a token. Tied, they are one.
    tied = config.typed(
        bool, "tie_word_embeddings", whole.typed(bool, "tie_word_embeddings", False)
    )
    return ModelShape(
        name=name,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=max(inner, per_token * expert_inner),
        num_query_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        vocab_size=vocab,
        itemsize=itemsize,
        max_position=config.whole("max_position_embeddings", default=131072),
        weight_bytes=linear + table * (1 if tied else 2) + experts * expert_bytes,
        dense_weight_bytes=linear + table,
        num_experts=experts,
        experts_per_token=per_token,
        expert_weight_bytes=expert_bytes,
        window=window,
        window_layers=tuple(number for number, kind in kinds if window and kind in WINDOW_KINDS),
        state_layers=states,
        state_bytes=state_bytes,
        draft_state_bytes=draft_state_bytes,
    )
