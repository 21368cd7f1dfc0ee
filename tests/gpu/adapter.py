# SPDX-License-Identifier: Apache-2.0
"""A small random LoRA adapter for a Llama-shaped model, as PEFT would have saved it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 8


def write_adapter(folder: Path, model: Path, seed: int = 0) -> Path:
    """Write an adapter whose effect on the text shows; returns its folder.

    Args:
        folder: Made here.
        model: Folder of the model's config.json.
    """
    config = json.loads((model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_size = config.get("head_dim") or hidden // heads
    modules = {
        "self_attn.q_proj": (hidden, heads * head_size),
        "self_attn.k_proj": (hidden, kv_heads * head_size),
        "self_attn.v_proj": (hidden, kv_heads * head_size),
        "self_attn.o_proj": (heads * head_size, hidden),
        "mlp.down_proj": (inner, hidden),
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (inputs, outputs) in modules.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            # A change of some per cent of a weight matrix in size: the text is another one, and
            # still far from noise.
            for side, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
                values = torch.randn(shape, generator=generator) * 0.05
                tensors[f"{stem}.lora_{side}.weight"] = values
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": [name.rpartition(".")[2] for name in modules],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
