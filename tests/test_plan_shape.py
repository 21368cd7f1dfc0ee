# SPDX-License-Identifier: Apache-2.0
"""Sizes read from a config.json: known models to the parameter, and what is not supported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_kcache.planner.shape import PlanError, read_shape

SHAPES = Path(__file__).resolve().parents[1] / "benchmarks/shapes"
SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
}
# Mixtral 8x7B, without its norms and routers.
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def shape_of(tmp_path: Path, config: dict[str, Any], **arguments: Any) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_shape(str(tmp_path), **arguments)


@pytest.mark.parametrize(
    ("name", "parameters"), [("llama-2-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248)]
)
def test_known_models(name: str, parameters: int) -> None:
    shape = read_shape(str(SHAPES / name))
    # Norms are left out: 4096 values each.
    norms = (2 * 32 + 1) * 4096
    assert shape.weight_bytes == 2 * (parameters - norms)
    assert shape.dense_weight_bytes == shape.weight_bytes - 2 * shape.vocab_size * 4096
    assert (shape.name, shape.num_layers, shape.head_size) == (name, 32, 128)


@pytest.mark.parametrize(
    ("name", "billions", "full", "windows", "states"),
    [
        ("gpt-oss-20b", 20.91, 12, 12, 0),
        ("gemma-3-27b", 27.01, 10, 52, 0),
        ("qwen3.5-27b", 26.90, 16, 0, 48),
    ],
)
def test_models_of_several_kinds_of_layers(
    name: str, billions: float, full: int, windows: int, states: int
) -> None:
    """Parameters of the text models, as they are published."""
    shape = read_shape(str(SHAPES / name))
    assert shape.weight_bytes / 2e9 == pytest.approx(billions, rel=0.001)
    found = shape.num_full_layers, len(shape.window_layers), len(shape.state_layers)
    assert found == (full, windows, states)
    assert shape.num_layers == full + windows + states


def test_a_state_is_the_one_that_vllm_keeps() -> None:
    """48 matrices of 128 x 128 in float32, and 3 inputs of a convolution of 10240 channels."""
    shape = read_shape(str(SHAPES / "qwen3.5-27b"))
    assert shape.state_bytes == 48 * 128 * 128 * 4 + 3 * 10240 * 2
    assert shape.request_state_bytes == 48 * shape.state_bytes


def test_experts(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, MIXTRAL)
    assert shape.weight_bytes / 2 == pytest.approx(46.7e9, rel=0.002)
    assert shape.flops_of_token() / 2 == pytest.approx(12.8e9, rel=0.01)
    # One token reads two experts; a large batch reads them all.
    one, many = shape.weight_bytes_of_step(1), shape.weight_bytes_of_step(1000)
    assert one == shape.dense_weight_bytes + 2 * shape.expert_weight_bytes
    assert many == pytest.approx(shape.dense_weight_bytes + 8 * shape.expert_weight_bytes)


def test_tied_embedding_is_held_once_and_read(tmp_path: Path) -> None:
    plain = shape_of(tmp_path, SMALL)
    tied = shape_of(tmp_path, {**SMALL, "tie_word_embeddings": True})
    assert plain.weight_bytes - tied.weight_bytes == 100 * 64 * 2
    assert plain.dense_weight_bytes == tied.dense_weight_bytes


def test_sizes_of_the_language_model(tmp_path: Path) -> None:
    assert shape_of(tmp_path, {"model_type": "llava", "text_config": SMALL}).num_layers == 2


def test_dtype_and_bits(tmp_path: Path) -> None:
    plain = shape_of(tmp_path, SMALL)
    assert shape_of(tmp_path, SMALL, dtype="float32").weight_bytes == 2 * plain.weight_bytes
    linear = 2 * (64 * 16 * 12 + 3 * 64 * 128)
    quantised = {**SMALL, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    assert plain.weight_bytes - shape_of(tmp_path, quantised).weight_bytes == linear * 3 // 2
    fp8 = {**SMALL, "quantization_config": {"quant_method": "fp8"}}
    assert plain.weight_bytes - shape_of(tmp_path, fp8).weight_bytes == linear
    assert plain.weight_bytes - shape_of(tmp_path, SMALL, weight_bits=8).weight_bytes == linear


def test_path_of_the_file_itself(tmp_path: Path) -> None:
    shape_of(tmp_path, SMALL)
    assert read_shape(str(tmp_path / "config.json")).name == tmp_path.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lora_rank": 512}, "multi-head latent attention (kv_lora_rank)"),
        (
            {"layer_types": ["full_attention", "chunked_attention"]},
            "layer_types ['chunked_attention', 'full_attention']",
        ),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types ['full_attention', 'sliding_attention']",
        ),
        (
            {"layer_types": ["linear_attention", "sliding_attention"], "sliding_window": 9},
            "layer_types ['linear_attention', 'sliding_attention']",
        ),
        (
            {
                "layer_types": ["linear_attention", "sliding_attention"],
                "sliding_window": 9,
                "linear_num_value_heads": 2,
            },
            "windows and states",
        ),
        ({"is_encoder_decoder": True}, "an encoder and a decoder"),
        ({"sliding_window": 4096}, "sliding_window or attention_chunk_size 4096 in every layer"),
        ({"attention_chunk_size": 64}, "sliding_window or attention_chunk_size 64 in every layer"),
        (
            {"sliding_window": 4096, "layer_types": ["sliding_attention"] * 2},
            "sliding_window or attention_chunk_size 4096 in every layer",
        ),
    ],
)
def test_attention_that_is_not_served(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(PlanError) as caught:
        shape_of(tmp_path, {**SMALL, **changes})
    assert f"the model has {message}" in str(caught.value)
    assert "vllm-kcache check lists" in str(caught.value)


def test_window_layers(tmp_path: Path) -> None:
    mixed = {"sliding_window": 40, "layer_types": ["full_attention", "sliding_attention"]}
    shape = shape_of(tmp_path, {**SMALL, **mixed})
    assert (shape.window, shape.window_layers, shape.num_full_layers) == (40, (1,), 1)
    assert (shape.window_tokens(39), shape.window_tokens(41)) == (39, 40)
    # Gemma 3 as it was published does not say which layers: five of six.
    gemma = {**SMALL, "model_type": "gemma3_text", "sliding_window": 40, "num_hidden_layers": 14}
    shape = shape_of(tmp_path, {"text_config": gemma})
    assert shape.window_layers == (0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13)
    third = shape_of(tmp_path, {**gemma, "sliding_window_pattern": 3})
    assert third.num_full_layers == 4
    # Nor does Llama 4: three of four have chunks.
    llama = {**SMALL, "model_type": "llama4_text", "attention_chunk_size": 40}
    shape = shape_of(tmp_path, {"text_config": {**llama, "num_hidden_layers": 8}})
    assert (shape.window, shape.window_layers) == (40, (0, 1, 2, 4, 5, 6))


def test_a_window_that_is_switched_off(tmp_path: Path) -> None:
    off = {**SMALL, "sliding_window": 4096, "use_sliding_window": False}
    assert shape_of(tmp_path, off).num_layers == 2


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    without = {key: value for key, value in SMALL.items() if key != "num_hidden_layers"}
    with pytest.raises(PlanError, match="num_hidden_layers is missing"):
        shape_of(tmp_path, without)
    with pytest.raises(PlanError, match=r"does not say how many bits.*Give --weight-bits"):
        shape_of(tmp_path, {**SMALL, "quantization_config": {"quant_method": "new"}})


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, **_: Any) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    shape_of(tmp_path, SMALL)
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(PlanError, match=r"config\.json: Permission denied"):
        read_shape(str(tmp_path))
    with pytest.raises(PlanError, match="File name too long"):
        read_shape("x" * 5000)


def test_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("nobody/nothing", str(tmp_path / "nothing")):
        with pytest.raises(PlanError, match=r"neither a folder with a config\.json nor a model"):
            read_shape(name)
