# SPDX-License-Identifier: Apache-2.0
"""Drafts that are not accepted leave nothing behind: through the attention of a layer, without an
engine. What each token is answered is what it is answered where no draft was ever written."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from tests.conftest import assert_close
from tests.integration.builders import builder_of
from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.config import KCacheConfig
from vllm_kcache.integration.backend import KCacheImpl
from vllm_kcache.integration.counters import Counters
from vllm_kcache.reference.codes import stats_of
from vllm_kcache.split_cache import CPUSplitCache

HEADS, KV_HEADS, SIZE, PAGE, BLOCK = 4, 2, 64, 16, 8
DRAFTS = 3
# Tokens before the first step; steps from there on, that every offset in a page may occur.
CONTEXT, STEPS = 40, PAGE
# Of each request.
PAGES = [[3, 9, 4, 7, 11], [8, 2, 10, 5, 6]]
# Rows of the model's dtype: test_speculation.py.
FORMATS = {"16": {"k_bits": 16}, "4": {"k_bits": 4, "host_dtype": "int8"}}


class Layer:
    """A layer and its cache, and requests that are told token by token, or with drafts.

    Args:
        settings: Of the cache.
    """

    def __init__(self, settings: dict[str, object]) -> None:
        config = KCacheConfig.from_user(
            {**settings, "top_n": 4, "sink_tokens": 8, "recent_tokens": 8}
        )
        dtype = torch.float32
        shape = CacheShape(
            1, HEADS, KV_HEADS, SIZE, PAGE, BLOCK, dtype, config.resolved_k_bits,
            config.resolved_host_dtype(dtype),
        )  # fmt: skip
        self.cache = CPUSplitCache(config, shape, Counters(), torch.device("cpu"))
        pages = 1 + max(map(max, PAGES))
        self.cache.allocate(pages)
        ones = torch.ones(KV_HEADS, SIZE, dtype=torch.float64)
        self.cache.k_stats = [stats_of(0 * ones, ones)]
        self.pages = torch.zeros(pages, KV_HEADS, PAGE, SIZE)
        if config.resolved_k_bits == 4:
            bytes_each = shape.k_token_bytes
            self.pages = torch.zeros(pages, KV_HEADS, PAGE, bytes_each, dtype=torch.uint8)
        self.impl = KCacheImpl(HEADS, SIZE, SIZE**-0.5, KV_HEADS)
        self.impl.bind(self.cache, 0)
        self.builder = builder_of(DRAFTS, PAGE)

    def step(self, runs: list[tuple[int, torch.Tensor]], prefills: bool = False) -> torch.Tensor:
        """One step: of each request its first new position, and [3, tokens, HEADS, SIZE].

        Returns:
            [tokens of all requests, HEADS * SIZE].
        """
        counts = [inputs.shape[1] for _, inputs in runs]
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32)
        lengths = torch.tensor(
            [first + count for (first, _), count in zip(runs, counts, strict=True)],
            dtype=torch.int32,
        )
        table = torch.tensor(PAGES, dtype=torch.int32)[: len(runs)]
        places = [
            torch.arange(first, first + n) for (first, _), n in zip(runs, counts, strict=True)
        ]
        slots = [
            table[row][place // PAGE].long() * PAGE + place % PAGE
            for row, place in enumerate(places)
        ]
        common = CommonAttentionMetadata(
            query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths, num_reqs=len(runs), num_actual_tokens=sum(counts),
            max_query_len=max(counts), max_seq_len=int(lengths.max()), block_table_tensor=table,
            slot_mapping=torch.cat(slots), is_prefilling=torch.tensor([prefills] * len(runs)),
        )  # fmt: skip
        query, key, value = torch.cat([inputs for _, inputs in runs], 1)
        out = torch.full((sum(counts), HEADS * SIZE), torch.nan)
        kv = (x[:, :KV_HEADS].flatten(1) for x in (key, value))
        self.impl.forward(
            None, query.flatten(1), *kv, self.pages, self.builder.build(0, common), out
        )
        return out

    def close(self) -> None:
        self.cache.close()


def texts() -> torch.Tensor:
    """[requests, 3, positions, HEADS, SIZE]: query, K and V of each token."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(PAGES), 3, PAGE * len(PAGES[0]), HEADS, SIZE, generator=generator)


def start(settings: dict[str, object], text: torch.Tensor) -> Layer:
    """A layer that has read the context of both requests, the second shorter by three tokens."""
    layer = Layer(settings)
    layer.step([(0, text[row][:, : CONTEXT - 3 * row]) for row in range(2)], prefills=True)
    return layer


@pytest.fixture(scope="module", params=FORMATS)
def told(request: pytest.FixtureRequest) -> tuple[dict[str, object], torch.Tensor, torch.Tensor]:
    """Settings, texts, and [requests, positions, HEADS * SIZE] what one token a step is answered;
    NaN where it was not asked."""
    settings, text = FORMATS[request.param], texts()
    answers = torch.full((2, text.shape[2], HEADS * SIZE), torch.nan)
    layer = start(settings, text)
    for number in range(STEPS + 2 * (1 + DRAFTS)):
        at = [CONTEXT + number, CONTEXT - 3 + number]
        out = layer.step([(at[row], text[row][:, at[row] : at[row] + 1]) for row in range(2)])
        for row in range(2):
            answers[row, at[row]] = out[row]
    layer.close()
    return settings, text, answers


@pytest.mark.parametrize("accepted", range(1 + DRAFTS))
def test_rejected_at_every_position(
    told: tuple[dict[str, object], torch.Tensor, torch.Tensor], accepted: int
) -> None:
    """So many drafts are right, at each offset in a page; the step after overwrites the others.

    The other request has as many right, and fewer drafts, so that the batch is ragged.
    """
    settings, text, answers = told
    generator = torch.Generator().manual_seed(1)
    layer = start(settings, text)
    for offset in range(STEPS):
        # The first token of the step before was right: all after it is written once more.
        at = [CONTEXT + offset, CONTEXT - 3 + offset]
        for counts in ((1 + DRAFTS, max(2, 1 + accepted)), (1 + DRAFTS, 1)):
            right = [min(1 + accepted, count) for count in counts]
            runs = []
            for row, count in enumerate(counts):
                inputs = text[row][:, at[row] : at[row] + count].clone()
                # Of large K, so that they would be selected.
                noise = torch.randn(inputs[:, right[row] :].shape, generator=generator)
                inputs[:, right[row] :] = 3 * noise
                runs.append((at[row], inputs))
            found = layer.step(runs).split(list(counts))
            for row in range(2):
                expected = answers[row, at[row] : at[row] + right[row]]
                assert_close(found[row][: right[row]], expected)
                at[row] += right[row]
    layer.close()


def test_what_a_draft_leaves_would_be_seen(
    told: tuple[dict[str, object], torch.Tensor, torch.Tensor],
) -> None:
    """Otherwise the test above would pass whatever is overwritten."""
    settings, text, answers = told
    layer = start(settings, text)
    wrong = 3 * torch.randn(3, 2, HEADS, SIZE, generator=torch.Generator().manual_seed(1))
    runs = [(CONTEXT - 3 * row, text[row][:, CONTEXT - 3 * row :][:, :1]) for row in range(2)]
    layer.step([(first, torch.cat([inputs, wrong], 1)) for first, inputs in runs])
    # The next step skips the place of the first draft: it is read as it is.
    runs = [(first + 2, text[row][:, first + 2 : first + 3]) for row, (first, _) in enumerate(runs)]
    out = layer.step(runs)
    for row, (first, _) in enumerate(runs):
        assert not torch.allclose(out[row], answers[row, first], atol=1e-2)
    layer.close()
