# SPDX-License-Identifier: Apache-2.0
"""Heads that draft from hidden states of the model they are made for: EAGLE, EAGLE-3, MTP.

Each is the first or the last layer of that model behind a random layer that takes hidden states in:
what it drafts depends on K and V of its own, on hidden states, and is right now and then.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.integration.tiny_models import write_random_model


def write_eagle_head(model: Path, folder: Path, method: str) -> str:
    """A head for a Llama model, in a new folder; returns its path.

    Args:
        model: Folder of the model, of two layers at least.
        folder: Made for the head.
        method: "eagle", or "eagle3": over hidden states of three places, with its own output layer.
    """
    import torch

    config, weights = _read(model)
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    first = "model.layers.0."
    head = {
        "layers.0." + name.removeprefix(first): weight
        for name, weight in weights.items()
        if name.startswith(first)
    }
    generator = torch.Generator().manual_seed(0)

    def noise(scale: float, *shape: int) -> Any:
        return scale * torch.randn(shape, generator=generator)

    if method == "eagle":
        # In place of the norm: embeddings of this model are about a tenth as large.
        del head["layers.0.input_layernorm.weight"]
        head["fc.weight"] = torch.cat([10 * torch.eye(hidden), noise(0.01, hidden, hidden)], 1)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            head[f"layers.0.{name}.weight"] = 10 * head[f"layers.0.{name}.weight"]
    else:
        for name in (f"layers.0.self_attn.{each}_proj.weight" for each in "qkv"):
            head[name] = torch.cat([head[name], noise(0.1, *head[name].shape)], 1)
        head["layers.0.hidden_norm.weight"] = head["norm.weight"] = torch.ones(hidden)
        head["fc.weight"] = noise(0.01, hidden, 3 * hidden)
        head["lm_head.weight"] = weights["lm_head.weight"]
        config["draft_vocab_size"] = vocabulary
        config["eagle_aux_hidden_state_layer_ids"] = [0, 1, 2]
    config["num_hidden_layers"] = 1
    return _write(folder, config, head)


def write_mtp_model(folder: Path, **changes: Any) -> str:
    """A random model as GLM-4.5's, with a layer behind the last one that drafts; returns its path.

    Args:
        folder: Made for the model.
        changes: Of its configuration; of all layers one more is there.
    """
    import torch

    config, weights = _read(Path(write_random_model(folder, "glm4_moe", **changes)))
    config["num_hidden_layers"] -= 1
    config["num_nextn_predict_layers"] = 1
    hidden, layer = config["hidden_size"], f"model.layers.{config['num_hidden_layers']}."
    # Otherwise the model says the same few words again.
    weights["model.embed_tokens.weight"] *= 0.05
    for name in ("enorm", "hnorm", "shared_head.norm"):
        weights[f"{layer}{name}.weight"] = torch.ones(hidden)
    noise = torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(0))
    weights[f"{layer}eh_proj.weight"] = torch.cat([torch.eye(hidden), 0.01 * noise], 1)
    return _write(folder, config, weights)


def write_qwen_mtp_model(folder: Path, model_type: str, **changes: Any) -> str:
    """A random model as Qwen3-Next, or Qwen3.5, with a full layer behind the last one that drafts;
    returns its path.

    Args:
        folder: Made for the model.
        model_type: "qwen3_next" or "qwen3_5_text".
        changes: Of its configuration; of all layers one more is there, the last, which is full.
    """
    import torch

    config, weights = _read(Path(write_random_model(folder, model_type, **changes)))
    assert config["layer_types"].pop() == "full_attention"
    config["num_hidden_layers"] -= 1
    config["num_nextn_predict_layers"] = config["mtp_num_hidden_layers"] = 1
    _rename_last_layer(config, weights, "mtp.layers.0.")
    hidden = config["hidden_size"]
    # Weights of these norms are what is added to one.
    for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
        weights[f"mtp.{name}.weight"] = torch.zeros(hidden)
    noise = torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(0))
    weights["mtp.fc.weight"] = torch.cat([0.01 * noise, torch.eye(hidden)], 1)
    return _write(folder, config, weights)


def write_mimo_model(folder: Path, **changes: Any) -> str:
    """A random model as MiMo, which is Qwen2 with a layer beside the others that drafts; returns
    its path. Arguments as those of `write_mtp_model`."""
    import torch

    config, weights = _read(Path(write_random_model(folder, "qwen2", **changes)))
    config["num_hidden_layers"] -= 1
    config["layer_types"].pop()
    config |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    _rename_last_layer(config, weights, "model.mtp_layers.0.")
    hidden = config["hidden_size"]
    for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        weights[f"model.mtp_layers.0.{name}.weight"] = torch.ones(hidden)
    noise = torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(0))
    weights["model.mtp_layers.0.input_proj.weight"] = torch.cat(
        [torch.eye(hidden), 0.01 * noise], 1
    )
    return _write(folder, config, weights)


def _rename_last_layer(config: dict[str, Any], weights: dict[str, Any], prefix: str) -> None:
    """Weights of the layer past those that the configuration counts."""
    layer = f"model.layers.{config['num_hidden_layers']}."
    for name in [name for name in weights if name.startswith(layer)]:
        weights[prefix + name.removeprefix(layer)] = weights.pop(name)


def _read(model: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of a model, and its weights."""
    from safetensors.torch import load_file

    return json.loads((model / "config.json").read_text()), load_file(model / "model.safetensors")


def _write(folder: Path, config: dict[str, Any], weights: dict[str, Any]) -> str:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    # What is shared is written for each.
    parts = {name: weight.clone().contiguous() for name, weight in weights.items()}
    save_file(parts, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)
