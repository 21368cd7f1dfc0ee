# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the accuracy benchmark: how far two next-token distributions are apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

# What is kept of each forced position.
FIELDS = ("logprob", "stock_logprob", "kl", "agrees")
# Logits that are compared at once: bounds the scratch in float64.
_PIECE_VALUES = 1 << 24


def compare_logits(logits: torch.Tensor, stock: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Compare next-token distributions, exactly: over the whole vocabulary, in float64.

    Args:
        logits: [R, vocabulary] float32. Of the engine under test, before any processing.
        stock: [R, vocabulary] float32, same device. Of stock vLLM at the same positions.
        tokens: [R] int64, same device. The tokens that the text has there.

    Returns:
        [R, 4] float64, columns as `FIELDS`: log-probability of the text's token by the engine under
        test and by stock, KL(stock || test) in nats, and 1 where both put the same token first.
    """
    rows = max(1, _PIECE_VALUES // logits.shape[1])
    parts = [
        _compare(logits[first : first + rows], stock[first : first + rows], tokens[first:][:rows])
        for first in range(0, logits.shape[0], rows)
    ]
    return torch.cat(parts) if parts else logits.new_zeros((0, len(FIELDS)), dtype=torch.float64)


def _compare(logits: torch.Tensor, stock: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    test_logprobs = logits.double().log_softmax(-1)
    stock_logprobs = stock.double().log_softmax(-1)
    terms = stock_logprobs.exp() * (stock_logprobs - test_logprobs)
    # A token that stock rules out adds nothing, whatever the other thinks of it.
    kl = terms.masked_fill(torch.isneginf(stock_logprobs), 0.0).sum(-1)
    at = tokens[:, None]
    return torch.stack(
        [
            test_logprobs.gather(1, at)[:, 0],
            stock_logprobs.gather(1, at)[:, 0],
            kl,
            (logits.argmax(-1) == stock.argmax(-1)).double(),
        ],
        dim=1,
    )


def summarise(positions: np.ndarray, kinds: list[str]) -> dict[str, Any]:
    """Figures of one setting.

    Args:
        positions: [steps, items, 4] float64, columns as `FIELDS`.
        kinds: kind of text of each item ("prose", "code").

    Returns:
        The figures of all items, and under `by_kind` those of each kind. `*_error` is the standard
        error of a mean over items: positions of one text are not independent.
    """
    result = _figures(positions)
    result["by_kind"] = {
        kind: _figures(positions[:, [i for i, k in enumerate(kinds) if k == kind]])
        for kind in sorted(set(kinds))
    }
    return result


def _figures(positions: np.ndarray) -> dict[str, float]:
    logprob, stock_logprob, kl, agrees = np.moveaxis(positions, 2, 0)
    change = stock_logprob - logprob
    return {
        "positions": int(kl.size),
        "perplexity": math.exp(-logprob.mean()),
        "stock_perplexity": math.exp(-stock_logprob.mean()),
        "perplexity_change": math.exp(change.mean()) - 1,
        "perplexity_change_error": _standard_error(change),
        "kl": float(kl.mean()),
        "kl_error": _standard_error(kl),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "kl_max": float(kl.max()),
        "top1_agreement": float(agrees.mean()),
    }


def _standard_error(values: np.ndarray) -> float:
    """Of the mean of [steps, items], items taken as independent; NaN with one item."""
    means = values.mean(0)
    return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan


def selection_figures(
    parts: list[tuple[dict[str, Any], dict[str, Any]]], v_block_tokens: int
) -> dict[str, Any]:
    """What was selected between pairs of readings of `vllm_kcache.metrics`.

    Args:
        parts: readings before and after each part.
        v_block_tokens: tokens of a V block.

    Returns:
        `selected_tokens`: mean per request, KV head, layer and step, in whole V blocks.
        `dropped_mass`: least and most that the mean dropped mass can be, from the buckets it is
        counted in. `hot_cache_hit_rate`: on a GPU only; else None.
    """

    def change(name: str) -> float:
        return sum(after[name] - before[name] for before, after in parts)

    counts = np.array(
        [
            [
                b[1] - a[1]
                for a, b in zip(before["dropped_mass"], after["dropped_mass"], strict=True)
            ]
            for before, after in parts
        ]
    ).sum(0)
    bounds = np.array([0.0, *(bound for bound, _ in parts[0][1]["dropped_mass"])])
    total = max(counts.sum(), 1)
    hits = change("hot_cache_hits")
    looked_up = hits + change("hot_cache_misses") + change("direct_host_reads")
    return {
        "selected_tokens": change("selected_blocks")
        / max(change("selected_lists"), 1)
        * v_block_tokens,
        "dropped_mass": [float(counts @ ends / total) for ends in (bounds[:-1], bounds[1:])],
        "hot_cache_hit_rate": hits / looked_up if looked_up else None,
    }
