# SPDX-License-Identifier: Apache-2.0
"""Rules that choose V blocks, and what each does for the mass it drops.

Shapes: Hkv KV heads, G query heads of each, Q queries, T tokens, P V blocks, D head size. A rule
sees the exact softmax, as the scoring step of the engine does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.study.model import attend_exactly, causal_mask

SINK_TOKENS = 8
RECENT_TOKENS = 32


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        stop: which blocks are enough. "coverage": the fewest whose share of the mass reaches
            `level`; "threshold": each whose mass is at least `level`.
        level: see `stop`.
        combine: how the query heads of a KV head speak as one: "mean", "max" or "rms" of their
            masses. With coverage, "max" asks each head to be covered.
        floor: blocks are also added, in descending order, until they cover this mass.
        tail: where the dropped mass goes. "renormalize": to the selected tokens, in proportion to
            their p; "clip": in proportion to min(p, `clip`); "request": half to the mean V of all
            tokens not selected, half in proportion to p; "page": to the mean V of the 16-token page
            it falls in; "drop": nowhere.
        dense_layers: the first layers attend to everything and are left out of the counts.
    """

    stop: str = "coverage"
    level: float = 0.95
    combine: str = "mean"
    floor: float = 0.0
    tail: str = "renormalize"
    clip: float = 0.0
    dense_layers: int = 0
    block_tokens: int = 8

    def __post_init__(self) -> None:
        known = {
            "stop": ("coverage", "threshold"),
            "combine": ("mean", "max", "rms"),
            "tail": ("renormalize", "clip", "request", "page", "drop"),
        }
        for name, accepted in known.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {accepted}")
        if self.tail == "clip" and not self.clip > 0:
            raise ValueError(f"clip={self.clip}: must be above 0 with tail 'clip'")


class RuleAttention:
    """Attention of the last positions through one rule; counts what it selects.

    Attributes:
        tokens: for each layer, mean tokens selected for a KV head and position.
        fetched: for each layer, mean tokens of blocks not kept in any of the last 8 steps, of the
            later positions.
        dropped: for each layer, mean dropped mass of a query head.
    """

    WARM_UP_POSITIONS, STEPS = 64, 8

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.tokens: dict[int, float] = {}
        self.fetched: dict[int, float] = {}
        self.dropped: dict[int, float] = {}

    def __call__(
        self, layer: int, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        rule = self.rule
        if layer < rule.dense_layers:
            return attend_exactly(layer, query, k, v)
        weights = exact_softmax(query, k)
        masses = weights.unflatten(-1, (-1, rule.block_tokens)).sum(-1)
        exists, forced = self.blocks(query.shape[2], k.shape[1])
        keep = (self.choose(masses, forced) | forced) & exists
        self.count(layer, masses, keep)
        return attend_selected(rule, weights, masses, keep, exists & ~keep, v)

    def blocks(self, num_queries: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[Q, P] bool: the blocks that exist for each query; those that are always selected."""
        size = self.rule.block_tokens
        if length % size:
            raise ValueError(f"length={length}: must be a multiple of {size}")
        positions = torch.arange(length - num_queries, length)[:, None]
        block_ids = torch.arange(length // size)
        exists = block_ids <= positions // size
        sink = block_ids < -(-SINK_TOKENS // size)
        recent = block_ids >= (positions + 1 - RECENT_TOKENS).clamp_min(0) // size
        return exists, exists & (sink | recent)

    def choose(self, masses: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
        """[Hkv, Q, P] bool: blocks chosen by the rule; what is forced counts first."""
        rule = self.rule
        combined = combine_heads(masses, rule.combine)
        if rule.stop == "threshold" and not rule.floor:
            return combined >= rule.level
        order = combined.masked_fill(forced, torch.inf).argsort(
            dim=-1, descending=True, stable=True
        )
        if rule.stop == "coverage":
            by_head = masses if rule.combine == "max" else combined[:, None]
            shares = by_head.gather(-1, order[:, None].expand_as(by_head))
            enough = rule.level * by_head.sum(-1, keepdim=True)
            take = (shares.cumsum(-1) - shares < enough).any(1)
        else:
            covered = masses.mean(1).gather(-1, order)
            take = combined.gather(-1, order) >= rule.level
            take |= covered.cumsum(-1) - covered < rule.floor
        return torch.zeros_like(take).scatter_(-1, order, take)

    def count(self, layer: int, masses: torch.Tensor, keep: torch.Tensor) -> None:
        size, steps = self.rule.block_tokens, self.STEPS
        self.tokens[layer] = keep.float().sum(-1).mean().item() * size
        self.dropped[layer] = (masses * ~keep[:, None]).sum(-1).mean().item()
        first = min(self.WARM_UP_POSITIONS, keep.shape[1] - 1)
        windows = keep.float().cumsum(1)
        before = torch.nn.functional.pad(windows, (0, 0, 1, 0))[:, :-1]
        earlier = torch.nn.functional.pad(windows, (0, 0, steps + 1, 0))[:, : keep.shape[1]]
        new = keep & (before - earlier == 0)
        self.fetched[layer] = new[:, first:].float().sum(-1).mean().item() * size


def exact_softmax(query: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[Hkv, G, Q, T]: causal softmax over all keys; the last query sees all T."""
    num_queries, length = query.shape[2], k.shape[1]
    scores = (query.flatten(1, 2) * query.shape[-1] ** -0.5) @ k.transpose(1, 2)
    scores = scores.unflatten(1, query.shape[1:3])
    late = slice(length - num_queries, length)
    scores[..., late].masked_fill_(~causal_mask(num_queries, length)[:, late], -torch.inf)
    scores -= scores.amax(-1, keepdim=True)
    weights = scores.exp_()
    weights /= weights.sum(-1, keepdim=True)
    return weights


def combine_heads(found: torch.Tensor, how: str) -> torch.Tensor:
    """[Hkv, Q, P] from [Hkv, G, Q, P]."""
    if how == "mean":
        return found.mean(1)
    if how == "max":
        return found.amax(1)
    return found.square().mean(1).sqrt()


def attend_selected(
    rule: Rule,
    weights: torch.Tensor,
    masses: torch.Tensor,
    keep: torch.Tensor,
    left_out: torch.Tensor,
    v: torch.Tensor,
) -> torch.Tensor:
    """[Hkv, G, Q, D]: attention over the kept blocks, the dropped mass treated as `rule.tail` says.

    Args:
        weights: [Hkv, G, Q, T] exact softmax; overwritten.
        masses: [Hkv, G, Q, P] of blocks.
        keep, left_out: [Hkv, Q, P] bool, of blocks. Blocks in neither do not exist.
        v: [Hkv, T, D].
    """
    size, tail = rule.block_tokens, rule.tail
    gone = masses * left_out[:, None]
    dropped = gone.sum(-1, keepdim=True)
    weights.unflatten(-1, (-1, size)).mul_(keep[:, None, :, :, None])
    out = times_v(weights, v)
    if tail == "drop":
        return out
    rescaled = out / (1 - dropped)
    if tail == "renormalize":
        return rescaled
    if tail == "clip":
        flat = weights.clamp_max(rule.clip)
        return out + dropped * times_v(flat, v) / flat.sum(-1, keepdim=True)
    block_sums = v.unflatten(1, (-1, size)).sum(2)
    if tail == "request":
        over = left_out.float()
        # A query with nothing left out has no dropped mass: what is divided is zero.
        mean = (over @ block_sums) / (over.sum(-1, keepdim=True) * size).clamp_min(1)
        return out + dropped * (mean[:, None] + rescaled) / 2
    blocks = 16 // size
    pages = gone.unflatten(-1, (-1, blocks)).sum(-1)
    return out + times_v(pages, block_sums.unflatten(1, (-1, blocks)).sum(2) / 16)


def times_v(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[Hkv, G, Q, D] from [Hkv, G, Q, N] and [Hkv, N, D]."""
    return (weights.flatten(1, 2) @ v).unflatten(1, weights.shape[1:3])
