# SPDX-License-Identifier: Apache-2.0
"""The split cache of a GPU, all of a step, against the one of the CPU, under Triton's interpreter.

`TRITON_INTERPRET=1 python -m tests.csrc.interpreted LIBRARY tests.kernels.split_cache`

Requests come, prefill in chunks, decode and go; a later one reuses their pages, or shares those of
one that runs. Streams are one after the other here.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch

from tests.conftest import assert_close
from vllm_kcache import memory, split_cache_gpu
from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.config import KCacheConfig
from vllm_kcache.integration.counters import Counters
from vllm_kcache.integration.prefill import attend_torch
from vllm_kcache.memory import StepLimits
from vllm_kcache.split_cache import CPUSplitCache, LayerInputs, Step
from vllm_kcache.split_cache_gpu import Attended, GPUSplitCache, PrefillKernels

SHAPE = CacheShape(2, 2, 1, 64, 16, 8, torch.float32)
NUM_PAGES, MAX_PAGES = 40, 12
LIMITS = StepLimits(6, 96, MAX_PAGES * SHAPE.page_tokens)
FEW = {"top_n": 6, "sink_tokens": 8, "recent_tokens": 8, "v_block_tokens": 8}
ANOTHER = {**FEW, "top_n": 5, "head_combine": "max"}
THRESHOLD = {"mass_threshold": 0.01, "sink_tokens": 8, "recent_tokens": 8, "v_block_tokens": 8}


class InOrder:
    """A stream or an event of a machine that does one thing after the other."""

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: InOrder) -> None:
        """It has ended."""

    def wait_event(self, event: InOrder) -> None:
        """It has come."""

    def record(self) -> None:
        """Now."""


def merge(first: Attended, second: Attended) -> Attended:
    """Attention to the union of two sets of keys."""
    lse = torch.logaddexp(first[1], second[1])
    parts = [out * (own - lse).exp().T[..., None] for out, own in (first, second)]
    return parts[0] + parts[1], lse


@dataclass
class Request:
    """Pages, tokens that are cached, and tokens of the prompt."""

    pages: list[int]
    prompt: int
    cached: int = 0


@dataclass
class Scheduler:
    """Random steps over a few pages.

    Attributes:
        seed: Of everything.
        padded_rows: Rows of no tokens behind a step of decodes alone, as a graph has them.
    """

    seed: int
    padded_rows: int = 0
    running: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        # Page 0 is vLLM's own.
        self.free = list(range(1, NUM_PAGES))
        self.random.shuffle(self.free)
        self.owners: dict[int, int] = {}

    def _start(self, budget: int) -> None:
        prompt = self.random.randrange(1, 150)
        shared: list[int] = []
        donors = [r for r in self.running if r.cached >= 16]
        if donors and self.random.random() < 0.6:
            donor = self.random.choice(donors)
            count = self.random.randrange(1, donor.cached // 16 + 1)
            shared, prompt = donor.pages[:count], count * 16 + self.random.randrange(1, 40)
        count = min(MAX_PAGES, -(-(prompt + 12) // 16)) - len(shared)
        if len(self.free) < count or budget < 1:
            return
        pages = shared + [self.free.pop() for _ in range(count)]
        for page in pages:
            self.owners[page] = self.owners.get(page, 0) + 1
        self.running.append(Request(pages, prompt, 16 * len(shared)))

    def _end(self, request: Request) -> None:
        self.running.remove(request)
        for page in request.pages:
            self.owners[page] -= 1
            if not self.owners[page]:
                self.free.insert(0, page)

    def step(self) -> Step:
        """Schedule: what decodes first, then what prefills, some by one token."""
        for request in list(self.running):
            if request.cached + 1 >= 16 * len(request.pages):
                self._end(request)
        if len(self.running) < LIMITS.max_requests and self.random.random() < 0.6:
            self._start(LIMITS.max_tokens - len(self.running))
        if not self.running:
            self._start(LIMITS.max_tokens)
        decodes = [r for r in self.running if r.cached >= r.prompt]
        prefills = [r for r in self.running if r.cached < r.prompt]
        budget, queries = LIMITS.max_tokens - len(decodes), [1] * len(decodes)
        for request in prefills:
            most = min(request.prompt - request.cached, budget // len(prefills))
            queries.append(self.random.choice((1, most, most)))
        rows = decodes + prefills
        lengths = [r.cached + query for r, query in zip(rows, queries, strict=True)]
        slots = [
            r.pages[at // 16] * 16 + at % 16
            for r, query in zip(rows, queries, strict=True)
            for at in range(r.cached, r.cached + query)
        ]
        table = torch.zeros((len(rows), MAX_PAGES), dtype=torch.int32)
        for row, request in enumerate(rows):
            table[row, : len(request.pages)] = torch.tensor(request.pages)
            request.cached += queries[row]
        padding = 0 if prefills else self.padded_rows
        lengths, queries = lengths + [0] * padding, queries + [0] * padding
        starts = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32)
        return Step(
            num_decodes=len(decodes) + padding,
            num_prefills=len(prefills),
            max_seq_len=max(lengths),
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            seq_lens_cpu=torch.tensor(lengths, dtype=torch.int32),
            block_table=torch.nn.functional.pad(table, (0, 0, 0, padding)),
            slot_mapping=torch.tensor(slots + [-1] * padding),
        )


def run(
    settings: dict[str, Any], seed: int, num_steps: int, hot_slots: int, padded_rows: int
) -> set[str]:
    """Steps through both caches; raises where they differ. Returns what kinds of steps came.

    It starts as an engine does: on a small cache, while memory is measured. From the sixth step on
    another rule is in force.
    """
    config = KCacheConfig.from_user(settings)
    ours = GPUSplitCache(
        config, SHAPE, Counters(), torch.device("cpu"), LIMITS,
        PrefillKernels("torch", attend_torch, merge),
    )  # fmt: skip
    theirs = CPUSplitCache(config, SHAPE, Counters(), torch.device("cpu"))
    page = (SHAPE.num_kv_heads, SHAPE.page_tokens, SHAPE.head_size)
    for small in (3, 3, 2):
        ours.view(1, torch.zeros(small, *page))
        assert ours.pool is not None
        assert ours.pool.num_rows == small * SHAPE.rows_per_page
    ours.hot_slots, ours.is_final = hot_slots, True
    with pytest.raises(RuntimeError, match="the K pages need"):
        ours.view(1, torch.zeros(NUM_PAGES, *page))
    ours.allocate(NUM_PAGES)
    theirs.allocate(NUM_PAGES)
    k_pages = [[torch.zeros(NUM_PAGES, *page) for _ in range(SHAPE.num_layers)] for _ in range(2)]
    scheduler = Scheduler(seed, padded_rows)
    torch.manual_seed(seed)
    kinds = set[str]()
    for number in range(num_steps):
        step = scheduler.step()
        both = step.num_decodes and step.num_prefills
        kinds.add("both" if both else "decodes" if step.num_decodes else "prefills")
        ours.before_step()
        if number == 5:
            for cache in (ours, theirs):
                cache.reconfigure(ANOTHER)
        tokens = step.slot_mapping.shape[0]
        for layer in range(SHAPE.num_layers):
            query = 3 * torch.randn(tokens, SHAPE.num_query_heads, SHAPE.head_size)
            key, value = torch.randn(2, tokens, SHAPE.num_kv_heads, SHAPE.head_size)
            # One of the layers has learned sinks.
            sinks = 2 * torch.randn(SHAPE.num_query_heads) if layer == 1 else None
            # The scores of the other have a cap, among them.
            cap = 4.0 if layer == 0 else None
            inputs = LayerInputs(query, key, value, SHAPE.head_size**-0.5, sinks, cap)
            outs = [torch.full_like(query, torch.nan) for _ in range(2)]
            for cache, its_pages, out in zip((ours, theirs), k_pages, outs, strict=True):
                cache.attend(layer, its_pages[layer], inputs, step, out)
            where = f"step {number}, layer {layer}, {settings}, seed {seed}"
            try:
                assert_close(outs[0], outs[1])
            except AssertionError as error:
                raise AssertionError(f"{where}: {error}") from error
            assert torch.equal(k_pages[0][layer], k_pages[1][layer]), where
            rows = [
                cache.view(layer, its_pages[layer]).host_rows
                for cache, its_pages in zip((ours, theirs), k_pages, strict=True)
            ]
            assert torch.equal(*rows), where
    assert not ours.workspace.signals.any()
    assert ours.hot_cache is not None
    assert ours.hot_cache.num_slots == hot_slots
    ours.close()
    ours.close()
    with pytest.raises(RuntimeError, match="The host pool has None"):
        ours.view(0, k_pages[0][0])
    return kinds


def without_cuda() -> contextlib.ExitStack:
    """What a step asks of CUDA, on a machine that has none."""
    stack = contextlib.ExitStack()
    for name, value in (
        ("Stream", InOrder), ("Event", InOrder), ("current_stream", InOrder),
        ("stream", lambda stream: contextlib.nullcontext()),
        ("is_current_stream_capturing", lambda: False), ("synchronize", lambda device: None),
    ):  # fmt: skip
        stack.enter_context(mock.patch.object(torch.cuda, name, value))
    return stack


def main() -> None:
    ran, kinds = 0, set[str]()
    with without_cuda():
        for settings, seed in ((FEW, 0), (THRESHOLD, 1), (FEW, 2)):
            for small, group, piece in ((0, 2, 1), (1 << 20, 64, 64 << 20)):
                with (
                    mock.patch.object(split_cache_gpu, "SMALL_V_BYTES", small),
                    mock.patch.object(memory, "GROUP_REQUESTS", group),
                    mock.patch.object(memory, "PIECE_BYTES", piece),
                ):
                    kinds |= run(settings, seed, 9, (40, 3, 0)[seed], padded_rows=seed)
                    ran += 1
    assert kinds == {"decodes", "prefills", "both"}, kinds
    print(f"{ran} runs equal the CPU's")


if __name__ == "__main__":
    main()
