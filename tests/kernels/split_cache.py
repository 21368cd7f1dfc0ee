# SPDX-License-Identifier: Apache-2.0
"""The split cache of a GPU, all of a step, against the one of the CPU, under Triton's interpreter.

`TRITON_INTERPRET=1 python -m tests.csrc.interpreted LIBRARY tests.kernels.split_cache`

Requests come, prefill in chunks, decode and go; a later one reuses their pages, or shares those of
one that runs. Some runs verify drafts, of which any number is accepted. Streams are one after the
other here.
"""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
from triton.runtime.interpreter import interpreter_builder

from tests.conftest import assert_close
from vllm_kcache import memory, split_cache_gpu
from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.config import KCacheConfig
from vllm_kcache.integration.counters import Counters
from vllm_kcache.integration.prefill import attend_torch
from vllm_kcache.kernels import transfer
from vllm_kcache.kernels.score_plan import chunk_blocks
from vllm_kcache.memory import StepLimits
from vllm_kcache.reference.codes import stats_of
from vllm_kcache.split_cache import CPUSplitCache, LayerInputs, Step
from vllm_kcache.split_cache_gpu import Attended, GPUSplitCache, PrefillKernels

SHAPE = CacheShape(2, 2, 1, 64, 16, 8, torch.float32)
CODED = replace(SHAPE, k_bits=4, host_dtype="model")
HALF = replace(CODED, dtype=torch.float16, host_dtype="int8")
NUM_PAGES, MAX_PAGES = 40, 12
LIMITS = StepLimits(6, 96, MAX_PAGES * SHAPE.page_tokens)
DRAFTS = 9
FEW = {"top_n": 6, "sink_tokens": 8, "recent_tokens": 8, "v_block_tokens": 8}
ANOTHER = {**FEW, "top_n": 5, "head_combine": "max"}
EVERYTHING = {"top_n": "all", "k_bits": 4, "host_dtype": "model"}
EVERYTHING_HALF = {**EVERYTHING, "host_dtype": "int8"}
THRESHOLD = {"mass_threshold": 0.01, "sink_tokens": 8, "recent_tokens": 8, "v_block_tokens": 8}


class InOrder:
    """A stream or an event of a machine that does one thing after the other."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def synchronize(self) -> None:
        """All has ended."""

    def wait_stream(self, other: InOrder) -> None:
        """It has ended."""

    def wait_event(self, event: InOrder) -> None:
        """It has come."""

    def record(self, stream: InOrder | None = None) -> None:
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
        drafts: Most of a request that decodes.
        verified: Drafts of each request and step, the accepted ones, and the place in its page of
            the first token that was not.
        turn: Decides how many drafts are accepted next.
    """

    seed: int
    padded_rows: int = 0
    drafts: int = 0
    running: list[Request] = field(default_factory=list)
    verified: set[tuple[int, int, int]] = field(default_factory=set)
    turn: int = 0

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
        queries = []
        for request in decodes:
            room = 16 * len(request.pages) - request.cached
            drafts = self.random.choice((self.random.randrange(self.drafts + 1), self.drafts))
            queries.append(1 + min(drafts, room - 1))
        budget = LIMITS.max_tokens - sum(queries)
        for request in prefills:
            most = max(1, min(request.prompt - request.cached, budget // len(prefills)))
            queries.append(self.random.choice((1, most, most)))
        rows, slots, lengths, starts, spans = [], [], [], [0], []
        for request, query in zip(decodes + prefills, queries, strict=True):
            places = range(request.cached, request.cached + query)
            slots += [request.pages[at // 16] * 16 + at % 16 for at in places]
            prefilling = request.cached < request.prompt
            # Each token that decodes is a row (integration/metadata.py).
            own = [query] if prefilling else [1] * query
            rows += [request] * len(own)
            lengths += [places[-1] + 1] if prefilling else [at + 1 for at in places]
            starts += [starts[-1] + sum(own[: n + 1]) for n in range(len(own))]
            spans += [] if prefilling else [(at, query - 1 - at) for at in range(query)]
            accepted = query - 1
            if not prefilling:
                accepted, self.turn = min(self.turn % (self.drafts + 1), accepted), self.turn + 1
            request.cached += accepted + 1
            if not prefilling:
                self.verified.add((query - 1, accepted, request.cached % 16))
        table = torch.zeros((len(rows), MAX_PAGES), dtype=torch.int32)
        for row, request in enumerate(rows):
            table[row, : len(request.pages)] = torch.tensor(request.pages)
        padding = 0 if prefills else self.padded_rows
        all_starts = torch.tensor(starts + starts[-1:] * padding, dtype=torch.int32)
        seq_lens = torch.tensor(lengths + [0] * padding, dtype=torch.int32)
        return Step(
            num_decodes=len(rows) - len(prefills) + padding,
            num_prefills=len(prefills),
            max_seq_len=max(lengths),
            query_start_loc=all_starts,
            query_start_loc_cpu=all_starts,
            seq_lens=seq_lens,
            seq_lens_cpu=seq_lens,
            block_table=torch.nn.functional.pad(table, (0, 0, 0, padding)),
            slot_mapping=torch.tensor(slots + [-1] * padding),
            spans=torch.tensor([*spans, *[(0, 0)] * padding], dtype=torch.int32).view(-1, 2),
        )


def pages(shape: CacheShape, count: int) -> torch.Tensor:
    """Of K or of codes, empty."""
    coded = shape.k_bits == 4
    width = shape.k_token_bytes if coded else shape.head_size
    dtype = torch.uint8 if coded else torch.float32
    return torch.zeros(count, shape.num_kv_heads, shape.page_tokens, width, dtype=dtype)


def random_inputs(shape: CacheShape, layer: int, tokens: int) -> LayerInputs:
    """One of the layers has learned sinks, and the scores of another have a cap."""
    query = 3 * torch.randn(tokens, shape.num_query_heads, shape.head_size).to(shape.dtype)
    key, value = torch.randn(2, tokens, shape.num_kv_heads, shape.head_size).to(shape.dtype)
    sinks = 2 * torch.randn(shape.num_query_heads) if layer == 1 else None
    cap = 4.0 if layer == 0 else None
    return LayerInputs(query, key, value, shape.head_size**-0.5, sinks, cap)


def run(
    settings: dict[str, Any],
    scheduler: Scheduler,
    num_steps: int,
    hot_slots: int,
    shape: CacheShape = SHAPE,
) -> set[str]:
    """Steps through both caches; raises where they differ. Returns what kinds of steps came.

    It starts as an engine does: on a small cache, while memory is measured. From the sixth step on
    another rule is in force.
    """
    config = KCacheConfig.from_user(settings)
    ours = GPUSplitCache(
        config, shape, Counters(), torch.device("cpu"),
        replace(LIMITS, decode_tokens=1 + scheduler.drafts),
        PrefillKernels("torch", attend_torch, merge),
    )  # fmt: skip
    theirs = CPUSplitCache(config, shape, Counters(), torch.device("cpu"))
    coded = shape.k_bits == 4
    if coded:
        ones = torch.ones(shape.num_kv_heads, shape.head_size, dtype=torch.float64)
        ours.k_stats = theirs.k_stats = [stats_of(0 * ones, ones)] * shape.num_layers
    for small in (3, 3, 2):
        ours.view(1, pages(shape, small))
        assert ours.pool is not None
        assert ours.pool.num_rows == small * shape.rows_per_page
    ours.hot_slots, ours.is_final = hot_slots, True
    with pytest.raises(RuntimeError, match="the K pages need"):
        ours.view(1, pages(shape, NUM_PAGES))
    ours.allocate(NUM_PAGES)
    theirs.allocate(NUM_PAGES)
    k_pages = [[pages(shape, NUM_PAGES) for _ in range(shape.num_layers)] for _ in range(2)]
    assert ours.hot_cache is not None
    ours.hot_cache.slots.fill_(255)  # NaN
    torch.manual_seed(scheduler.seed)
    kinds = set[str]()
    for number in range(num_steps):
        step = scheduler.step()
        both = step.num_decodes and step.num_prefills
        kinds.add("both" if both else "decodes" if step.num_decodes else "prefills")
        ours.before_step()
        if number == 5 and not coded:
            for cache in (ours, theirs):
                cache.reconfigure({**ANOTHER, "v_block_tokens": shape.block_tokens})
        tokens = step.slot_mapping.shape[0]
        for layer in range(shape.num_layers):
            inputs = random_inputs(shape, layer, tokens)
            outs = [torch.full_like(inputs.query, torch.nan) for _ in range(2)]
            for cache, its_pages, out in zip((ours, theirs), k_pages, outs, strict=True):
                cache.attend(layer, its_pages[layer], inputs, step, out)
            where = f"step {number}, layer {layer}, {settings}, seed {scheduler.seed}"
            try:
                assert_close(outs[0], outs[1])
            except AssertionError as error:
                raise AssertionError(f"{where}: {error}") from error
            assert coded or torch.equal(k_pages[0][layer], k_pages[1][layer]), where
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


class LastFirst:
    """Programs of a kernel in the opposite order: any is allowed."""

    def __init__(self) -> None:
        self._set, self._sizes = interpreter_builder.set_grid_idx, (1, 1, 1)

    def __enter__(self) -> None:
        interpreter_builder.set_grid_idx = self._set_last_first

    def __exit__(self, *_: object) -> None:
        del interpreter_builder.set_grid_idx

    def _set_last_first(self, *place: int) -> None:
        sizes = interpreter_builder.grid_dim
        self._set(*(size - 1 - at for size, at in zip(sizes, place, strict=True)))


def check_drafts() -> int:
    """Runs with drafts, by how K is kept and with blocks of several sizes. Returns their number."""
    verified, cases = set[tuple[int, int, int]](), (
        (FEW, SHAPE),
        ({**FEW, "v_block_tokens": 16}, replace(SHAPE, block_tokens=16)),
        (EVERYTHING, CODED),
        # Longer than what a warp writes at once.
        ({**EVERYTHING, "v_block_tokens": 16}, replace(CODED, block_tokens=16)),
        # Tokens of a request have one list.
        (EVERYTHING_HALF, HALF),
        ({**EVERYTHING_HALF, "v_block_tokens": 16}, replace(HALF, block_tokens=16)),
    )  # fmt: skip
    for seed, (settings, shape) in enumerate(cases):
        scheduler = Scheduler(seed, padded_rows=seed % 2, drafts=DRAFTS)
        group, hot_slots = ((64, 400), (1, 40))[seed % 2]
        with mock.patch.object(memory, "GROUP_REQUESTS", group), LastFirst():
            run(settings, scheduler, 11, hot_slots, shape)
        verified |= scheduler.verified
    drafts, accepted, places = (set(x) for x in zip(*verified, strict=True))
    assert drafts == accepted == set(range(DRAFTS + 1)), verified
    assert places == set(range(16)), verified
    return len(cases)


def check_when_scoring_waits() -> None:
    """For a write that may reach behind the last two chunks of a row, and for no other."""
    chunk_tokens = chunk_blocks(SHAPE) * SHAPE.block_tokens
    pages = torch.zeros(3, SHAPE.num_kv_heads, SHAPE.page_tokens, SHAPE.head_size)
    one, starts = torch.ones(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    step = Step(1, 0, 1, starts, starts, one, None, one[None], torch.tensor([16]))
    inputs = LayerInputs(torch.zeros(1, 2, 64), *torch.zeros(2, 1, 1, 64), 1.0)
    for decode_tokens, waits in ((chunk_tokens - 1, False), (chunk_tokens, True)):
        cache = GPUSplitCache(
            KCacheConfig.from_user(FEW), SHAPE, Counters(), torch.device("cpu"),
            replace(LIMITS, decode_tokens=decode_tokens),
            PrefillKernels("torch", attend_torch, merge),
        )  # fmt: skip
        with mock.patch.object(split_cache_gpu, "decode_step") as decode_step:
            cache.attend(0, pages, inputs, step, torch.zeros(1, 2, 64))
        assert decode_step.call_args.kwargs["after_write"] is not waits
        cache.close()


def check_a_resumed_request() -> None:
    """It decodes over pages that a prompt of the same step fills, whose rows a stream takes to the
    host behind the computation."""
    store, late = transfer.PrefillTransfer.store, list[Any]()
    pages_of = torch.tensor([[1, 2, 3, 5], [1, 2, 3, 4]], dtype=torch.int32)
    starts, lengths = torch.tensor([0, 1, 65]), torch.tensor([50, 64], dtype=torch.int32)
    step = Step(
        1, 1, 64, starts.int(), starts.int(), lengths, lengths, pages_of,
        torch.tensor([5 * 16 + 1, *range(16, 80)]),
    )  # fmt: skip
    for shape in (SHAPE, CODED):
        settings = EVERYTHING if shape.k_bits == 4 else {**FEW, "top_n": "all"}
        for resumes in (True, False):
            outs = []
            torch.manual_seed(0)
            inputs = random_inputs(shape, 1, 65)
            for cache in (
                GPUSplitCache(
                    KCacheConfig.from_user(settings), shape, Counters(), torch.device("cpu"),
                    LIMITS, PrefillKernels("torch", attend_torch, merge),
                ),
                CPUSplitCache(
                    KCacheConfig.from_user(settings), shape, Counters(), torch.device("cpu")
                ),
            ):  # fmt: skip
                ones = torch.ones(shape.num_kv_heads, shape.head_size, dtype=torch.float64)
                cache.k_stats = [stats_of(0 * ones, ones)] * shape.num_layers
                out = torch.zeros_like(inputs.query)
                with (
                    mock.patch.object(split_cache_gpu, "SMALL_V_BYTES", 0),
                    mock.patch.object(
                        transfer.PrefillTransfer, "store", lambda *given: late.append(given)
                    ),
                ):
                    if isinstance(cache, GPUSplitCache):
                        cache.hot_slots, cache.is_final = 0, True
                        cache.allocate(6)
                        cache.before_step(resumes)
                    else:
                        cache.allocate(6)
                    cache.attend(1, pages(shape, 6), inputs, step, out)
                outs.append(out)
                for given in late:
                    store(*given)
                assert len(late) == (isinstance(cache, GPUSplitCache) and not resumes)
                late.clear()
                cache.close()
            # Without a word from the engine it reads what the pages held before.
            assert torch.allclose(outs[0][0], outs[1][0], atol=1e-5) is resumes, shape
            assert_close(outs[0][1:], outs[1][1:])


def main() -> None:
    ran, kinds = 0, set[str]()
    with without_cuda():
        small_pieces, large_pieces = (0, 2, 1), (1 << 20, 64, 64 << 20)
        for settings, seed, (small, group, piece) in (
            (FEW, 0, small_pieces), (FEW, 0, large_pieces), (THRESHOLD, 1, small_pieces),
            (FEW, 2, large_pieces),
        ):  # fmt: skip
            with (
                mock.patch.object(split_cache_gpu, "SMALL_V_BYTES", small),
                mock.patch.object(memory, "GROUP_REQUESTS", group),
                mock.patch.object(memory, "PIECE_BYTES", piece),
            ):
                kinds |= run(settings, Scheduler(seed, seed), 9, (40, 3, 0)[seed])
                ran += 1
        ran += check_drafts()
        check_when_scoring_waits()
        check_a_resumed_request()
    assert kinds == {"decodes", "prefills", "both"}, kinds
    print(f"{ran} runs equal the CPU's")


if __name__ == "__main__":
    main()
