# SPDX-License-Identifier: Apache-2.0
"""Dense attention and selection in float64, written from the definitions and without pages."""

from __future__ import annotations

import math

import torch

from tests.shapes import Case
from vllm_kcache.types import Selection


def dense_kv(case: Case, request: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one request for each query head: [Hq, tokens, D] float64."""
    group = case.shape.group_size
    keys, values = case.keys[request].double(), case.values[request].double()
    return (
        torch.stack([keys[:, head // group] for head in range(case.shape.num_heads)]),
        torch.stack([values[:, head // group] for head in range(case.shape.num_heads)]),
    )


def token_scores(case: Case, request: int) -> torch.Tensor:
    """Scaled scores of every token: [Hq, tokens] float64."""
    keys, _ = dense_kv(case, request)
    query = case.query[request].double().cpu()
    return torch.einsum("hd,htd->ht", query, keys) * case.scale


def block_lse(case: Case, request: int) -> torch.Tensor:
    """Log-sum-exp of each V block: [Hq, blocks] float64."""
    scores = token_scores(case, request)
    if not scores.shape[1]:
        return scores
    blocks = scores.split(case.shape.v_block_tokens, dim=1)
    return torch.stack([block.exp().sum(1).log() for block in blocks], dim=1)


def full_attention(case: Case, request: int) -> torch.Tensor:
    """Attention over every token: [Hq, D] float64."""
    _, values = dense_kv(case, request)
    return torch.einsum("ht,htd->hd", token_scores(case, request).softmax(1), values)


def forced(seq_len: int, v_block_tokens: int, selection: Selection) -> set[int]:
    """Sink and recent V blocks of a request, found token by token."""
    recent = range(max(0, seq_len - selection.recent_tokens), seq_len)
    sink_tokens = min(seq_len, selection.sink_blocks * v_block_tokens)
    return {token // v_block_tokens for token in [*range(sink_tokens), *recent]}


def covered_mass(masses: torch.Tensor, blocks: list[int], combine: str) -> float:
    """Mass of `blocks` for a group of query heads, [G, blocks] float64."""
    per_head = masses[:, blocks].sum(1)
    return float(per_head.mean() if combine == "sum" else per_head.min())


def threshold(selection: Selection, seq_len: int) -> float:
    """The least mass that a request of so many tokens keeps a V block for."""
    assert selection.mass_threshold is not None
    if selection.threshold_length is None or seq_len <= selection.threshold_length:
        return selection.mass_threshold
    return float(selection.mass_threshold * math.sqrt(selection.threshold_length / seq_len))


def select(
    masses: torch.Tensor, seq_len: int, v_block_tokens: int, selection: Selection
) -> list[int]:
    """The selected V blocks of one KV head, in rank order, from the masses of its query heads."""
    num_blocks = -(-seq_len // v_block_tokens)
    combined = (masses.mean(0) if selection.combine == "sum" else masses.amax(0)).tolist()
    first = sorted(forced(seq_len, v_block_tokens, selection))
    others = [block for block in range(num_blocks) if block not in first]
    ranked = first + sorted(others, key=lambda block: (-combined[block], block))
    most = num_blocks if selection.top_n is None else min(selection.top_n, num_blocks)
    if selection.mass_threshold is not None:
        least = threshold(selection, seq_len)
        heavy = [block for block in others if combined[block] >= least]
        return ranked[: min(most, len(first) + len(heavy))]
    if selection.coverage is None:
        return ranked[:most]
    for count in range(len(first), most):
        if covered_mass(masses, ranked[:count], selection.combine) >= selection.coverage:
            return ranked[:count]
    return ranked[:most]


def attend(
    case: Case, request: int, blocks: list[list[int]], tail: str, clip: float = 0.0
) -> torch.Tensor:
    """Attention over the selected V blocks of each KV head: [Hq, D] float64."""
    shape = case.shape
    _, values = dense_kv(case, request)
    scores = token_scores(case, request)
    tokens = torch.arange(scores.shape[1])
    results = []
    for head in range(shape.num_heads):
        kept = blocks[head // shape.group_size]
        chosen = torch.tensor([int(token) // shape.v_block_tokens in kept for token in tokens])
        if tail == "renormalize":
            weights = scores[head].masked_fill(~chosen, -torch.inf).softmax(0)
            results.append(weights @ values[head])
            continue
        weights = scores[head].softmax(0)
        result = (weights * chosen) @ values[head]
        claims = [min(float(weights[t]), clip) if chosen[t] else 0.0 for t in tokens]
        dropped = 1 - sum(float(weights[t]) for t in tokens if chosen[t])
        shares = torch.tensor(claims, dtype=torch.float64) / sum(claims)
        result = result + dropped * shares @ values[head]
        results.append(result)
    return torch.stack(results)
