# SPDX-License-Identifier: Apache-2.0
"""Each prefill kernel on ragged chunks with and without context, against dense attention."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.conftest import assert_close
from vllm_kcache.config import KCacheConfigError
from vllm_kcache.integration import prefill

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# Tokens of each request's chunk, and before it: none, more than a tile, one page.
CHUNKS = (5, 200, 1, 64)
CONTEXTS = (0, 333, 16, 0)
# The context comes in pieces of so many tokens of each request.
PIECE = 128


def ragged(lengths: tuple[int, ...]) -> prefill.Ragged:
    bounds = [0, *itertools.accumulate(lengths)]
    rows = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    return prefill.Ragged(rows, max(lengths), lengths)


def dense(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """One request in float64: the last tokens attend to all before them. [T, Hq, D]"""
    num_queries, num_keys, group = query.shape[0], keys.shape[0], query.shape[1] // keys.shape[1]
    keys, values = (tensor.double().repeat_interleave(group, 1) for tensor in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    ahead = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(num_keys - num_queries + 1)
    weights = scores.masked_fill(ahead, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def kernel_or_skip(name: str, head_size: int, dtype: torch.dtype) -> prefill.Attend:
    try:
        return prefill.choose(name, head_size, dtype).attend
    except KCacheConfigError as error:
        # xformers is an extra; vLLM's FlashAttention is there on every GPU that we test on.
        if name == "xformers":
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("name", ["flash_attn", "xformers", "torch"])
@pytest.mark.parametrize(("head_size", "heads", "group"), [(64, 3, 3), (128, 2, 4), (128, 4, 1)])
def test_chunks_with_context(name: str, head_size: int, heads: int, group: int) -> None:
    """A causal chunk and the pieces of its context, merged as the runtime merges them."""
    dtype = torch.bfloat16
    kernel = kernel_or_skip(name, head_size, dtype)
    torch.manual_seed(head_size + group)
    scale = head_size**-0.5
    queries = [torch.randn(n, heads * group, head_size, dtype=dtype) for n in CHUNKS]
    totals = [context + chunk for context, chunk in zip(CONTEXTS, CHUNKS, strict=True)]
    keys, values = (
        [torch.randn(n, heads, head_size, dtype=dtype) for n in totals] for _ in range(2)
    )
    expected = torch.cat(
        [dense(q, k, v, scale) for q, k, v in zip(queries, keys, values, strict=True)]
    )

    def own(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([t[n:] for t, n in zip(tensors, CONTEXTS, strict=True)]).to(DEVICE)

    query, chunks = torch.cat(queries).to(DEVICE), ragged(CHUNKS)
    result = kernel(query, own(keys), own(values), chunks, chunks, True, scale)
    for start in range(0, max(CONTEXTS), PIECE):
        lengths = tuple(max(0, min(PIECE, n - start)) for n in CONTEXTS)
        piece = [
            torch.cat([t[start : start + n] for t, n in zip(tensors, lengths, strict=True)])
            for tensors in (keys, values)
        ]
        there = (tensor.to(DEVICE) for tensor in piece)
        part = kernel(query, *there, chunks, ragged(lengths), False, scale)
        result = prefill.merge(part, result)
    assert_close(result[0].cpu(), expected)
