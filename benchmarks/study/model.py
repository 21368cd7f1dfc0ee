# SPDX-License-Identifier: Apache-2.0
"""A model of transformers whose last positions attend through a rule, for the study of rules.

The tokens before the last positions run once, exactly, and leave their K and V. The last positions
then run as one batch per rule: what a rule gets wrong in one layer, the next layers see.

Rules are for layers of full attention. Layers that see only a window stay exact.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.accuracy.texts import read_text
from vllm_kcache.reference.codes import stats_of
from vllm_kcache.types import KStats

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
# As in vllm_kcache/integration/calibration.py, which needs vLLM; a test holds the two together.
CALIBRATION_TOKENS = 2048
# (layer, query [Hkv, G, Q, D] with the scale of the scores in it, k [Hkv, T, D], v [Hkv, T, D]) ->
# [Hkv, G, Q, D]. Query i stands at position T - Q + i and may see the keys up to its own.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# What a cache keeps of K or V, [Hkv, T, D] to the same.
Store = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Prefix:
    """A passage and its exact past.

    Attributes:
        name: passage.
        tokens: [T + 1] int64. The last `num_positions` tokens but one attend by rule.
        num_positions: Q.
        keys, values: for each layer [Hkv, T - Q, D] float32, keys after rotation; of layers with a
            window the last tokens only.
        digest: hash of the tokens.
    """

    name: str
    tokens: torch.Tensor
    num_positions: int
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    digest: str

    @property
    def context(self) -> int:
        return len(self.tokens) - 1


@dataclass
class Pass:
    """How every layer attends while some tokens run through the model.

    Attributes:
        keys, values: of the tokens before, by layer.
        attend: in layers of full attention.
        store: what the cache keeps, of all layers' K and V.
        keep: K and V of these tokens are appended to `keys` and `values`.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    attend: Attend
    store: Store | None = None
    keep: bool = False

    def __call__(
        self, layer: int, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """As `Attend`, of the new tokens' K and V; a query sees `window` tokens, its own too."""
        k = torch.cat((self.keys[layer], k), dim=1)
        v = torch.cat((self.values[layer], v), dim=1)
        if self.keep:
            # The next token still sees all but one of a window.
            kept = slice(0 if window is None else max(0, k.shape[1] - window + 1), None)
            self.keys[layer], self.values[layer] = k[:, kept], v[:, kept]
        if self.store is not None:
            k, v = self.store(k), self.store(v)
        if window is not None:
            return attend_exactly(layer, query, k, v, window)
        return self.attend(layer, query, k, v)


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None,
    *, scaling: float, through: Pass, sliding_window: int | None = None, **rest: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention as transformers calls it, of one request; hands the call on to `through`."""
    grouped = (query[0] * scaling).unflatten(0, (key.shape[1], -1))
    out = through(module.layer_idx, grouped, key[0], value[0], sliding_window)
    return out.flatten(0, 1).transpose(0, 1)[None], None


IMPLEMENTATION = "kcache_study"
ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention)


class StudyModel:
    """A model in float32, one request.

    Args:
        model: of transformers, for causal language modelling.
        tokenizer: its own.
        device: where it runs.
    """

    def __init__(self, model: Any, tokenizer: Any, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.tokenizer = tokenizer
        self.model = model.float().eval().requires_grad_(False).to(self.device)
        self.model.set_attn_implementation(IMPLEMENTATION)
        config = self.model.config
        self.num_layers: int = config.num_hidden_layers
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_size: int = config.head_dim

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> StudyModel:
        """SmolLM2, Gemma 3 or another, of a Hugging Face folder."""
        # A passage is tokenised whole and then cut: no warning about its length.
        tokenizer = AutoTokenizer.from_pretrained(path, model_max_length=1 << 30)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return cls(model, tokenizer, device)

    def read_passage(self, name: str, num_tokens: int) -> torch.Tensor:
        """[num_tokens] int64: tokens of a passage of benchmarks/data/."""
        file, start = PASSAGES[name]
        text = read_text(file)
        first = text.index("\n", int(start * len(text))) + 1
        tokens = self.tokenizer(text[first : first + 8 * num_tokens]).input_ids[:num_tokens]
        if len(tokens) < num_tokens:
            raise ValueError(f"passage {name} has {len(tokens)} tokens, not {num_tokens}")
        return torch.tensor(tokens)

    def make_prefix(self, name: str, tokens: torch.Tensor, num_positions: int) -> Prefix:
        """Run all but the last positions of [T + 1] tokens exactly."""
        digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:12]
        keys, values = self._nothing(), self._nothing()
        through = Pass(keys, values, attend_exactly, keep=True)
        end = len(tokens) - 1 - num_positions
        for number, chunk in enumerate(tokens[:end].to(self.device).split(PREFIX_CHUNK)):
            self._run(self.model.base_model, chunk, through, number * PREFIX_CHUNK)
        return Prefix(name, tokens, num_positions, keys, values, digest)

    def logits(self, prefix: Prefix, attend: Attend, store: Store | None = None) -> torch.Tensor:
        """[Q, vocabulary] of the last positions, each attending by `attend` in every layer of full
        attention, to what `store` makes of K and V."""
        first = prefix.context - prefix.num_positions
        tokens = prefix.tokens[first : prefix.context].to(self.device)
        through = Pass(list(prefix.keys), list(prefix.values), attend, store)
        return self._run(self.model, tokens, through, first).logits[0]

    @functools.cached_property
    def k_stats(self) -> list[KStats]:
        """Mean and deviation of K of each layer over the text that the package measures K by.

        Of a layer with a window they are of the text's end, and no code needs them.
        """
        text = resources.files("vllm_kcache").joinpath("integration/calibration.txt")
        ids = self.tokenizer.encode(text.read_text(encoding="utf-8"))
        repeats = -(-CALIBRATION_TOKENS // len(ids))
        tokens = torch.tensor((ids * repeats)[:CALIBRATION_TOKENS], device=self.device)
        keys = self._nothing()
        through = Pass(keys, self._nothing(), attend_exactly, keep=True)
        self._run(self.model.base_model, tokens, through, 0)
        return [key_stats(key) for key in keys]

    def _nothing(self) -> list[torch.Tensor]:
        """K or V of no tokens, by layer."""
        empty = torch.empty(self.num_kv_heads, 0, self.head_size, device=self.device)
        return [empty] * self.num_layers

    def _run(self, model: Any, tokens: torch.Tensor, through: Pass, first: int) -> Any:
        """What the model, or its body, returns for [Q] tokens, at position `first` and on."""
        positions = torch.arange(first, first + len(tokens), device=self.device)
        return model(tokens[None], position_ids=positions[None], use_cache=False, through=through)


def attend_exactly(
    layer: int, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """Full causal attention, or to the last `window` tokens."""
    seen = causal_mask(query.shape[2], k.shape[1], query.device)
    if window is not None:
        seen = seen & ~causal_mask(query.shape[2], k.shape[1], query.device, behind=window)
    return functional.scaled_dot_product_attention(
        query, k[:, None], v[:, None], attn_mask=seen, scale=1.0
    )


def key_stats(key: torch.Tensor) -> KStats:
    """Mean and deviation over the tokens of [Hkv, T, D]."""
    exact = key.double()
    return stats_of(exact.mean(1), exact.var(1, correction=0))


def causal_mask(
    num_queries: int, length: int, device: torch.device, behind: int = 0
) -> torch.Tensor:
    """[Q, T] bool: True where the key is at least `behind` tokens before the query."""
    positions = torch.arange(length - num_queries, length, device=device) - behind
    return torch.arange(length, device=device) <= positions[:, None]
