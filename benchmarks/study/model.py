# SPDX-License-Identifier: Apache-2.0
"""A Llama model whose last positions attend through a rule, for the study of rules.

The tokens before the last positions run once, exactly, and leave their K and V. The last positions
then run as one batch per rule: what a rule gets wrong in one layer, the next layers see.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.accuracy.texts import read_text

PREFIX_CHUNK = 512
# Name: file, and where in it the passage starts (share of the file's characters).
PASSAGES = {
    "job": ("kjv.txt.gz", 0.02),
    "isaiah": ("kjv.txt.gz", 0.25),
    "luke": ("kjv.txt.gz", 0.75),
    "jargon-a": ("jargon.txt.gz", 0.30),
    "jargon-c": ("jargon.txt.gz", 0.70),
    "python-a": ("stdlib.py.txt.gz", 0.10),
    "python-b": ("stdlib.py.txt.gz", 0.45),
    "python-c": ("stdlib.py.txt.gz", 0.80),
}
# (layer, query [Hkv, G, Q, D], k [Hkv, T, D], v [Hkv, T, D]) -> [Hkv, G, Q, D]. Query i stands at
# position T - Q + i and may see the keys up to its own.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Prefix:
    """A passage and its exact past.

    Attributes:
        name: passage.
        tokens: [T + 1] int64. The last `num_positions` tokens but one attend by rule.
        keys, values: for each layer [Hkv, T - num_positions, D] float32; keys after rotation.
        digest: hash of the tokens.
    """

    name: str
    tokens: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    digest: str

    @property
    def context(self) -> int:
        return len(self.tokens) - 1

    @property
    def num_positions(self) -> int:
        return self.context - self.keys[0].shape[1]


class StudyModel:
    """SmolLM2 or another Llama in float32 on the CPU, one request."""

    def __init__(self, path: Path) -> None:
        # A passage is tokenised whole and then cut: no warning about its length.
        self.tokenizer = AutoTokenizer.from_pretrained(path, model_max_length=1 << 30)
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        config = self.model.config
        self.num_layers: int = config.num_hidden_layers
        self.num_kv_heads: int = config.num_key_value_heads
        self.group: int = config.num_attention_heads // config.num_key_value_heads
        self.head_size: int = config.head_dim

    def read_passage(self, name: str, num_tokens: int) -> torch.Tensor:
        """[num_tokens] int64: tokens of a passage of benchmarks/data/."""
        file, start = PASSAGES[name]
        text = read_text(file)
        first = text.index("\n", int(start * len(text))) + 1
        tokens = self.tokenizer(text[first : first + 8 * num_tokens]).input_ids[:num_tokens]
        if len(tokens) < num_tokens:
            raise ValueError(f"passage {name} has {len(tokens)} tokens, not {num_tokens}")
        return torch.tensor(tokens)

    def make_prefix(self, name: str, context: int, num_positions: int) -> Prefix:
        """Run all but the last positions exactly."""
        tokens = self.read_passage(name, context + 1)
        digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:12]
        empty = torch.empty(self.num_kv_heads, 0, self.head_size)
        keys, values = [empty] * self.num_layers, [empty] * self.num_layers
        end = context - num_positions
        for start in range(0, end, PREFIX_CHUNK):
            chunk = tokens[start : min(start + PREFIX_CHUNK, end)]
            self.run(chunk, keys, values, attend_exactly, keep=True)
        return Prefix(name, tokens, keys, values, digest)

    def logits(self, prefix: Prefix, attend: Attend) -> torch.Tensor:
        """[Q, vocabulary] of the last positions, each attending by `attend` in every layer."""
        tokens = prefix.tokens[prefix.context - prefix.num_positions : prefix.context]
        hidden = self.run(tokens, prefix.keys, prefix.values, attend)
        return self.model.lm_head(self.model.model.norm(hidden))[0]

    def run(
        self,
        tokens: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        attend: Attend,
        keep: bool = False,
    ) -> torch.Tensor:
        """[1, Q, hidden] after the last layer; with `keep`, K and V are appended to the lists."""
        body = self.model.model
        hidden = body.embed_tokens(tokens[None])
        past = keys[0].shape[1]
        rotation = body.rotary_emb(hidden, torch.arange(past, past + len(tokens))[None])
        for number, layer in enumerate(body.layers):
            normed = layer.input_layernorm(hidden)
            q, k, v = (
                projection(normed).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
                for projection in (
                    layer.self_attn.q_proj,
                    layer.self_attn.k_proj,
                    layer.self_attn.v_proj,
                )
            )
            q, k = apply_rotary_pos_emb(q, k, *rotation)
            all_k = torch.cat((keys[number], k[0]), dim=1)
            all_v = torch.cat((values[number], v[0]), dim=1)
            if keep:
                keys[number], values[number] = all_k, all_v
            grouped = q[0].unflatten(0, (self.num_kv_heads, self.group))
            out = attend(number, grouped, all_k, all_v)
            out = out.flatten(0, 1).transpose(0, 1).flatten(1)[None]
            hidden = hidden + layer.self_attn.o_proj(out)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden


def attend_exactly(
    layer: int, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Full causal attention."""
    num_queries, length = query.shape[2], k.shape[1]
    seen = causal_mask(num_queries, length)
    return functional.scaled_dot_product_attention(query, k[:, None], v[:, None], attn_mask=seen)


def causal_mask(num_queries: int, length: int) -> torch.Tensor:
    """[Q, T] bool: True where the query may see the key."""
    positions = torch.arange(length - num_queries, length)
    return torch.arange(length) <= positions[:, None]
