# SPDX-License-Identifier: Apache-2.0
"""Rules that choose V blocks, and what each does for the mass it drops.

Shapes: Hkv KV heads, G query heads of each, Q queries, T tokens, P V blocks, D head size. A query
has the scale of the scores in it. A rule sees what the scoring step of the engine sees: the exact
softmax, or that of 4-bit K codes. Codes, rows and the clipped tail are those of
vllm_kcache/reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.study.model import attend_exactly, causal_mask
from vllm_kcache.reference.attend import clipped_weights
from vllm_kcache.reference.codes import (
    decode,
    encode,
    quantise_int8,
    round_query,
    transform_keys,
    transform_query,
)
from vllm_kcache.types import KStats

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
        length: L; with a threshold, `level` and `clip` are multiplied with
            min(1, (L / tokens of the request) ** `power`), so that they fall with its length from
            L on. 0: they do not.
        power: see `length`.
        dense_layers: the first layers attend to everything and are left out of the counts.
        k_bits: what scores are made of: 16, K; 4, K codes. Then K and V of the selected tokens come
            from rows, and the dropped mass is an estimate; the tail is "clip" or "renormalize".
        host_dtype: of rows: "model", K and V as they are; "int8".
    """

    stop: str = "coverage"
    level: float = 0.95
    combine: str = "mean"
    floor: float = 0.0
    tail: str = "renormalize"
    clip: float = 0.0
    length: int = 0
    power: float = 1.0
    dense_layers: int = 0
    block_tokens: int = 8
    k_bits: int = 16
    host_dtype: str = "model"

    def __post_init__(self) -> None:
        known = {
            "stop": ("coverage", "threshold"),
            "combine": ("mean", "max", "rms"),
            "tail": ("renormalize", "clip", "request", "page", "drop"),
            "k_bits": (4, 16),
            "host_dtype": ("model", "int8"),
        }
        for name, accepted in known.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {accepted}")
        if self.tail == "clip" and not self.clip > 0:
            raise ValueError(f"clip={self.clip}: must be above 0 with tail 'clip'")
        if self.length and self.stop != "threshold":
            raise ValueError(f"length={self.length}: needs stop 'threshold'")
        if self.k_bits == 16 and self.host_dtype == "int8":
            raise ValueError("host_dtype='int8': needs k_bits 4")
        if self.k_bits == 4 and self.tail not in ("clip", "renormalize"):
            raise ValueError(f"tail={self.tail!r}: not with k_bits 4")

    def factor(self, lengths: torch.Tensor) -> torch.Tensor:
        """What `level` and `clip` are multiplied with, for requests of so many tokens."""
        if not self.length:
            return torch.ones_like(lengths, dtype=torch.float32)
        return (self.length / lengths).clamp_max(1.0) ** self.power

    def __str__(self) -> str:
        """In words, as the tables say it."""
        parts = [f"{self.stop} {_number(self.level)}"]
        if self.length:
            power = "" if self.power == 1 else f"^{_number(self.power)}"
            parts[0] += f" x ({self.length}/T){power}"
        ordinary = "mean" if self.stop == "coverage" else "max"
        parts += [self.combine] if self.combine != ordinary else []
        parts += [f"floor {_number(self.floor)}"] if self.floor else []
        halved = self.stop == "threshold" and self.clip == self.level / 2
        is_clip = self.tail == "clip"
        parts += [f"clip {_number(self.clip)}" if is_clip and not halved else self.tail]
        parts += [f"blocks of {self.block_tokens}"] if self.block_tokens != 8 else []
        parts += [f"{self.dense_layers} dense"] if self.dense_layers else []
        parts += ["K codes"] if self.k_bits == 4 else []
        parts += ["int8 rows"] if self.host_dtype == "int8" else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Stock:
    """Full attention to a cache of K and V in `kv_cache_dtype`, in every layer: a baseline.

    As vLLM keeps it without calibrated scales, e4m3 with a scale of 1. The query is not quantised,
    as some of vLLM's kernels do beside; so it is fp8 at best.
    """

    kv_cache_dtype: str = "fp8"

    def __post_init__(self) -> None:
        if self.kv_cache_dtype != "fp8":
            raise ValueError(f"kv_cache_dtype={self.kv_cache_dtype!r}: must be 'fp8'")

    def __str__(self) -> str:
        return f"all, {self.kv_cache_dtype} cache"

    @staticmethod
    def store(x: torch.Tensor) -> torch.Tensor:
        """K or V as the cache keeps it; what is too large saturates."""
        most = torch.finfo(torch.float8_e4m3fn).max
        return x.clamp(-most, most).to(torch.float8_e4m3fn).to(x.dtype)


def compared() -> list[Rule | Stock]:
    """What is measured where no rule is named: candidates for the default, each by K and by codes.

    Fixed thresholds, with and without a floor of coverage, and thresholds that fall with length.
    """
    rules: list[Rule | Stock] = [Stock()]
    choices: list[dict[str, Any]] = [{"level": level} for level in (0.002, 0.001, 0.0005)]
    choices += [{"level": 0.002, "floor": floor} for floor in (0.9, 0.95)]
    choices += [{"level": 0.001, "floor": 0.9}]
    lengths = ((0.002, 4096), (0.002, 8192), (0.003, 4096), (0.003, 6144))
    choices += [{"level": level, "length": length} for level, length in lengths]
    choices += [{"level": 0.002, "length": length, "power": 0.5} for length in (4096, 8192)]
    for more in ({}, {"k_bits": 4}, {"k_bits": 4, "host_dtype": "int8"}):
        rules += [clipped_threshold(**choice, **more) for choice in choices]
    return rules


def clipped_threshold(level: float, **more: Any) -> Rule:
    """A threshold with the tail that the package has beside it."""
    common = {"stop": "threshold", "combine": "max", "tail": "clip", "clip": level / 2}
    return Rule(**{**common, **more, "level": level})


def _number(value: float) -> str:
    """.002 for 0.002."""
    return f"{value:g}".removeprefix("0") or "0"


class RuleAttention:
    """Attention of the last positions through one rule; counts what it selects.

    Args:
        rule: the rule.
        k_stats: constants of the codes, by layer; with `k_bits` 4.

    Attributes:
        tokens: for each layer, mean tokens selected for a KV head and position.
        fetched: for each layer, mean tokens of blocks not kept in any of the last 8 steps, of the
            later positions.
        dropped: for each layer, mean dropped mass of a query head; by codes, the estimate of it.
    """

    WARM_UP_POSITIONS, STEPS = 64, 8

    def __init__(self, rule: Rule, k_stats: Sequence[KStats] = ()) -> None:
        self.rule = rule
        self.k_stats = k_stats
        self.tokens: dict[int, float] = {}
        self.fetched: dict[int, float] = {}
        self.dropped: dict[int, float] = {}

    def __call__(
        self, layer: int, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        rule = self.rule
        if layer < rule.dense_layers:
            return attend_exactly(layer, query, k, v)
        rows = None if rule.k_bits == 16 else Rows(query, k, v, self.k_stats[layer], rule)
        scores = masked_scores(query, k) if rows is None else rows.estimates
        lse = scores.logsumexp(-1, keepdim=True)
        weights = scores.sub_(lse).exp_()
        masses = weights.unflatten(-1, (-1, rule.block_tokens)).sum(-1)
        exists, forced = self.blocks(query.shape[2], k.shape[1], query.device)
        factor = self.factor(query.shape[2], k.shape[1], query.device)
        keep = (self.choose(masses, forced, factor) | forced) & exists
        self.count(layer, masses, keep)
        left_out = exists & ~keep
        if rows is None:
            return attend_selected(rule, weights, masses, keep, left_out, v, rule.clip * factor)
        dropped = (masses * left_out[:, None]).sum(-1, keepdim=True)
        return rows.attend(keep, lse, dropped, rule.clip * factor)

    def factor(self, num_queries: int, length: int, device: torch.device) -> torch.Tensor:
        """[Q, 1]: of the level and the clip, for each query's length."""
        last = torch.arange(length - num_queries, length, device=device)
        return self.rule.factor(last + 1)[:, None]

    def blocks(
        self, num_queries: int, length: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[Q, P] bool: the blocks that exist for each query; those that are always selected."""
        size = self.rule.block_tokens
        if length % size:
            raise ValueError(f"length={length}: must be a multiple of {size}")
        positions = torch.arange(length - num_queries, length, device=device)[:, None]
        block_ids = torch.arange(length // size, device=device)
        exists = block_ids <= positions // size
        sink = block_ids < -(-SINK_TOKENS // size)
        recent = block_ids >= (positions + 1 - RECENT_TOKENS).clamp_min(0) // size
        return exists, exists & (sink | recent)

    def choose(
        self, masses: torch.Tensor, forced: torch.Tensor, factor: torch.Tensor
    ) -> torch.Tensor:
        """[Hkv, Q, P] bool: blocks chosen by the rule; what is forced counts first."""
        rule = self.rule
        combined = combine_heads(masses, rule.combine)
        if rule.stop == "threshold" and not rule.floor:
            return combined >= rule.level * factor
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
            take = combined.gather(-1, order) >= rule.level * factor
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


def masked_scores(query: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[Hkv, G, Q, T]: scores of all keys, -inf for those after the query; the last sees all T."""
    num_queries, length = query.shape[2], k.shape[1]
    scores = (query.flatten(1, 2) @ k.transpose(1, 2)).unflatten(1, query.shape[1:3])
    late = slice(length - num_queries, length)
    seen = causal_mask(num_queries, length, query.device)[:, late]
    scores[..., late].masked_fill_(~seen, -torch.inf)
    return scores


class Rows:
    """K codes and rows of one layer, and attention from them.

    Args:
        query, k, v: as for `Attend`.
        stats: constants of the codes.
        rule: says what rows hold, and the tail.

    Attributes:
        estimates: [Hkv, G, Q, T] scores by codes, -inf for keys after the query.
    """

    def __init__(
        self, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, stats: KStats, rule: Rule
    ) -> None:
        self.rule = rule
        transformed = transform_keys(k.transpose(0, 1), stats).transpose(0, 1)
        by_query = query.permute(2, 0, 1, 3).flatten(1, 2)
        rotated, bias = transform_query(by_query, stats)
        grouped, rounded = (
            x.unflatten(1, query.shape[:2]).permute(1, 2, 0, 3)
            for x in (rotated, round_query(rotated))
        )
        bias = bias.unflatten(1, query.shape[:2]).permute(1, 2, 0)[..., None]
        self.estimates = masked_scores(rounded, decode(*encode(transformed))) + bias
        if rule.host_dtype == "int8":
            self.scores = masked_scores(grouped, _through_int8(transformed)) + bias
            self.values = _through_int8(v)
        else:
            self.scores, self.values = masked_scores(query, k), v

    def attend(
        self,
        keep: torch.Tensor,
        lse: torch.Tensor,
        dropped: torch.Tensor,
        clip: torch.Tensor,
    ) -> torch.Tensor:
        """[Hkv, G, Q, D]: `reference.attend.attend_rows` of the kept blocks, over all tokens.

        Args:
            keep: [Hkv, Q, P] bool.
            lse: [Hkv, G, Q, 1] of the estimates of all tokens.
            dropped: [Hkv, G, Q, 1] estimated mass of what is not kept.
            clip: [Q, 1].
        """
        blocks = self.scores.unflatten(-1, (-1, self.rule.block_tokens))
        blocks.masked_fill_(~keep[:, None, :, :, None], -torch.inf)
        exponents = self.scores.sub_(lse)
        # In units of the largest kept token, as there.
        most = exponents.amax(-1, keepdim=True).clamp_min(-60.0)
        unit = (-most).exp()
        weights = exponents.sub_(most).exp_()
        if self.rule.tail == "renormalize":
            dropped = torch.zeros_like(dropped)
        return times_v(clipped_weights(weights, clip * unit, dropped * unit), self.values)


def _through_int8(x: torch.Tensor) -> torch.Tensor:
    """What an int8 row says of K or V, [Hkv, T, D]."""
    values, scale = quantise_int8(x)
    return values.to(x.dtype) * scale.to(x.dtype)[..., None]


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
    clip: torch.Tensor,
) -> torch.Tensor:
    """[Hkv, G, Q, D]: attention over the kept blocks, the dropped mass treated as `rule.tail` says.

    Args:
        weights: [Hkv, G, Q, T] exact softmax; overwritten.
        masses: [Hkv, G, Q, P] of blocks.
        keep, left_out: [Hkv, Q, P] bool, of blocks. Blocks in neither do not exist.
        v: [Hkv, T, D].
        clip: [Q, 1], for the tail "clip".
    """
    size, tail = rule.block_tokens, rule.tail
    gone = masses * left_out[:, None]
    dropped = gone.sum(-1, keepdim=True)
    weights.unflatten(-1, (-1, size)).mul_(keep[:, None, :, :, None])
    if tail == "clip":
        return times_v(clipped_weights(weights, clip), v)
    out = times_v(weights, v)
    if tail == "drop":
        return out
    rescaled = out / (1 - dropped)
    if tail == "renormalize":
        return rescaled
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
