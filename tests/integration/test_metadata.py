# SPDX-License-Identifier: Apache-2.0
"""A step as vLLM describes it and as the split cache takes it: decodes first, and the output where
vLLM looks for it. Through the attention of a layer, without an engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from tests.integration.builders import builder_of
from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.config import KCacheConfig
from vllm_kcache.integration import gpu_worker
from vllm_kcache.integration.backend import KCacheBackend, KCacheImpl
from vllm_kcache.integration.counters import Counters
from vllm_kcache.integration.metadata import KCacheMetadata
from vllm_kcache.memory import GPUMemory, StepLimits
from vllm_kcache.split_cache import CPUSplitCache

SHAPE = CacheShape(1, 4, 2, 64, 16, 8, torch.float32)
PAGES_EACH = 20


@dataclass(frozen=True)
class Request:
    """Its place in the pages; tokens before this step, tokens of it, and whether they are a
    prompt's."""

    number: int
    context: int
    query: int
    prefilling: bool


DECODES = [Request(0, 200, 1, False), Request(1, 97, 1, False), Request(2, 16, 1, False)]
LAST_TOKENS = [Request(3, 150, 1, True), Request(4, 31, 1, True), Request(5, 0, 1, True)]
PROMPTS = [Request(6, 64, 5, True), Request(7, 0, 40, True)]
# One's drafts pass the end of a page.
VERIFICATIONS = [Request(8, 46, 4, False), Request(9, 21, 2, False)]
SHORT_PROMPT = Request(10, 64, 3, True)
REQUESTS = 11


class Batch:
    """Requests in vLLM's order, in pages of their own, with K and V of what came before.

    Args:
        requests: Of the step.
        padded_requests, padded_tokens: Rows and slots behind the real ones.
        drafts: Most of a request.
    """

    def __init__(
        self,
        requests: list[Request],
        padded_requests: int = 0,
        padded_tokens: int = 0,
        drafts: int = 0,
    ) -> None:
        self.requests = requests
        self.drafts = drafts
        count = len(requests)
        lengths = [r.context + r.query for r in requests] + [0] * padded_requests
        queries = [r.query for r in requests] + [0] * padded_requests
        starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
        tokens = int(starts[-1])
        table = torch.zeros((count + padded_requests, PAGES_EACH), dtype=torch.int32)
        slots = torch.full((tokens + padded_tokens,), -1, dtype=torch.int64)
        self.inputs = torch.zeros(3, tokens + padded_tokens, SHAPE.num_query_heads, 64)
        for row, request in enumerate(requests):
            # What a request holds depends on nothing but itself, wherever it stands.
            own = torch.Generator().manual_seed(request.number)
            first = 1 + PAGES_EACH * request.number
            table[row] = torch.arange(first, first + PAGES_EACH)
            span = slice(int(starts[row]), int(starts[row + 1]))
            places = torch.arange(request.context, request.context + request.query)
            slots[span] = first * SHAPE.page_tokens + places
            self.inputs[:, span] = torch.randn(self.inputs[:, span].shape, generator=own)
        self.starts = starts
        self.common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
            num_reqs=count + padded_requests,
            num_actual_tokens=tokens,
            max_query_len=max(queries),
            max_seq_len=max(lengths),
            block_table_tensor=table,
            slot_mapping=slots,
            is_prefilling=torch.tensor([r.prefilling for r in requests]),
        )

    def build(self) -> KCacheMetadata:
        return builder_of(self.drafts, SHAPE.page_tokens).build(0, self.common)

    def attend(self, shares: bool = False) -> dict[Request, torch.Tensor]:
        """The output of each request, through a layer and a fresh cache.

        Args:
            shares: The layer reads what another one has just written, and writes nothing.
        """
        cache = CPUSplitCache(
            KCacheConfig.from_user({"top_n": 5, "sink_tokens": 8, "recent_tokens": 8}),
            SHAPE,
            Counters(),
            torch.device("cpu"),
        )
        pages = 1 + PAGES_EACH * REQUESTS
        cache.allocate(pages)
        shape = (pages, SHAPE.num_kv_heads, SHAPE.page_tokens, SHAPE.head_size)
        before = torch.Generator().manual_seed(7)
        k_pages = torch.randn(shape, generator=before)
        cache.view(0, k_pages).v_pages.copy_(torch.randn(shape, generator=before))
        query, key, value = self.inputs
        kv = [tensor[:, : SHAPE.num_kv_heads].flatten(1) for tensor in (key, value)]
        step, out = self.build(), torch.full_like(query.flatten(1), torch.nan)
        layer = KCacheImpl(4, 64, 0.125, 2)
        layer.bind(cache, 0)
        if shares:
            layer.forward(None, -query.flatten(1), *kv, k_pages, step, torch.empty_like(out))
            layer = KCacheImpl(4, 64, 0.125, 2, kv_sharing_target_layer_name="the other")
            layer.bind(cache, 0)
            kv = [torch.full_like(tensor, torch.nan) for tensor in kv]
        layer.forward(None, query.flatten(1), *kv, k_pages, step, out)
        cache.close()
        spans = zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True)
        return {
            request: out[first:last]
            for request, (first, last) in zip(self.requests, spans, strict=False)
        }


def mixed(order: str) -> list[Request]:
    """By letters: a to c decode, v and w verify drafts, A to C have a prompt's last token, P, Q and
    the short S are prompts."""
    requests = [*DECODES, *LAST_TOKENS, *PROMPTS, *VERIFICATIONS, SHORT_PROMPT]
    named = dict(zip("abcABCPQvwS", requests, strict=True))
    return [named[letter] for letter in order]


@pytest.mark.parametrize(
    ("order", "decodes", "reordered"),
    [
        ("abc", 3, False),
        ("abcABC", 3, False),
        ("abcABCPQ", 3, False),
        ("ABC", 0, False),
        ("ABCP", 0, False),
        ("PQ", 0, False),
        ("Aabc", 3, True),
        ("aAbBcC", 3, True),
        ("ABCabcPQ", 3, True),
        ("BaAcP", 2, True),
    ],
)
@pytest.mark.parametrize("padding", [(0, 0), (0, 13)], ids=["", "longer slot mapping"])
def test_every_request_has_its_output(
    order: str, decodes: int, reordered: bool, padding: tuple[int, int]
) -> None:
    """Wherever a request stands: decodes are selected for, and all others attend exactly."""
    requests = mixed(order)
    batch = Batch(requests, *padding)
    step = batch.build()
    assert (step.num_decodes, step.num_prefills) == (decodes, len(requests) - decodes)
    assert (step.token_order is not None) == reordered
    found = batch.attend()
    assert len(found) == len(requests)
    for request, output in found.items():
        alone = Batch([request]).attend()[request]
        assert not alone.isnan().any()
        torch.testing.assert_close(
            output, alone, rtol=0, atol=1e-5, msg=lambda text, of=request: f"{of}: {text}"
        )


@pytest.mark.parametrize(
    ("order", "decodes", "reordered"),
    [
        ("avb", 6, False),
        ("vw", 6, False),
        ("wAPQ", 2, False),
        ("ab", 2, False),
        ("vaSPQ", 5, False),
        ("SA", 0, False),
        ("SAvPQ", 4, True),
        ("AvBSawcPQ", 8, True),
    ],
)
def test_drafts_are_rows_of_their_own(order: str, decodes: int, reordered: bool) -> None:
    """Each token of a request that verifies drafts decodes, as if it were a request's only one."""
    requests = mixed(order)
    batch = Batch(requests, drafts=3)
    step = batch.build()
    prompts = sum(request.prefilling for request in requests)
    assert (step.num_decodes, step.num_prefills) == (decodes, prompts)
    assert (step.token_order is not None) == reordered
    lengths = [
        request.context + 1 + number
        for request in requests
        if not request.prefilling
        for number in range(request.query)
    ]
    assert step.seq_lens[:decodes].tolist() == lengths
    spans = [
        [number, request.query - 1 - number]
        for request in requests
        if not request.prefilling
        for number in range(request.query)
    ]
    # Without any draft each row is a request of its own.
    drafted = any(after for _, after in spans)
    assert (step.spans is None) == (not drafted)
    assert step.spans is None or step.spans.tolist() == spans
    if prompts:
        assert step.seq_lens_cpu is not None
        assert torch.equal(step.seq_lens_cpu[decodes:], step.seq_lens[decodes:])
    assert torch.equal(step.query_start_loc, step.query_start_loc_cpu)
    assert step.query_start_loc_cpu[: decodes + 1].tolist() == list(range(decodes + 1))
    assert int(step.query_start_loc_cpu[-1]) == batch.common.num_actual_tokens
    for request, output in batch.attend().items():
        alone = Batch([request], drafts=3).attend()[request]
        assert not alone.isnan().any()
        torch.testing.assert_close(output, alone, rtol=0, atol=1e-5)


# What a captured graph reads, which holds decodes alone: tensors of the batch that was captured.

DRAFTS = 3


def rows_of(requests: list[Request], common: CommonAttentionMetadata) -> tuple[list, list]:
    """Of each token: length, its request's tokens before and after it, and block table."""
    lengths = [
        [r.context + 1 + number, number, r.query - 1 - number]
        for r in requests
        for number in range(r.query)
    ]
    tables = [row for row, request in enumerate(requests) for _ in range(request.query)]
    return lengths, common.block_table_tensor[tables].tolist()


def replayed(captured: KCacheMetadata, count: int) -> tuple[list, list]:
    """The same of the rows that a graph has, `count` of them real."""
    rows = captured.num_decodes
    assert captured.seq_lens.shape[0] == captured.block_table.shape[0] == rows
    assert captured.spans is not None
    lengths = torch.cat([captured.seq_lens[:, None], captured.spans], 1)
    assert not lengths[count:].any()
    return lengths[:count].tolist(), captured.block_table[:count].tolist()


@pytest.mark.parametrize(
    "requests",
    [
        [Request(8, 46, 4, False), Request(9, 21, 4, False)],
        [Request(8, 46, 4, False), Request(9, 21, 2, False), Request(10, 31, 1, False)],
        # As vLLM has it where a prompt's last token comes with drafts.
        [Request(8, 46, 4, False), Request(9, 21, 4, True), Request(10, 64, 4, False)],
        [Request(8, 46, 4, True), Request(9, 21, 4, True)],
        [],
    ],
    ids=["uniform", "ragged", "one prefills", "all prefill", "none"],
)
def test_a_graph_finds_every_token_of_a_batch(requests: list[Request]) -> None:
    """Wherever the batch's own metadata lies, and whatever was there before."""
    tokens = PAGES_EACH * SHAPE.page_tokens
    builder = builder_of(DRAFTS, SHAPE.page_tokens, max_requests=5, max_model_len=tokens)
    captured = {}
    for size in (5, 4, 3):
        dummy = [Request(number, 0, 1 + DRAFTS, False) for number in range(size)]
        captured[size] = builder.build_for_cudagraph_capture(Batch(dummy, drafts=DRAFTS).common)
        assert captured[size].num_decodes == size * (1 + DRAFTS)
        assert not captured[size].num_prefills
    for size in (5, 3, 4):
        padding = size * (1 + DRAFTS) - sum(request.query for request in requests)
        batch = Batch(requests, size - len(requests), padding, DRAFTS)
        batch.common.num_actual_tokens += padding
        step = builder.build(0, batch.common)
        lengths, tables = rows_of(requests, batch.common)
        assert replayed(captured[size], len(lengths)) == (lengths, tables)
        if not any(request.prefilling for request in requests):
            assert step.num_decodes == size * (1 + DRAFTS)
            assert step.seq_lens.data_ptr() == captured[size].seq_lens.data_ptr()
            assert step.block_table.data_ptr() == captured[size].block_table.data_ptr()


def test_rows_that_pad_a_graph_answer_nothing() -> None:
    """A batch in a graph's form is answered as without padding."""
    requests = [Request(8, 46, 4, False), Request(9, 21, 2, False)]
    plain = Batch(requests, drafts=DRAFTS).attend()
    padded = Batch(requests, padded_requests=2, padded_tokens=10, drafts=DRAFTS)
    padded.common.num_actual_tokens += 10
    for request, output in padded.attend().items():
        assert torch.equal(output, plain[request])


@pytest.mark.parametrize("columns", [PAGES_EACH - 7, PAGES_EACH, PAGES_EACH + 7])
def test_block_tables_of_any_width(columns: int) -> None:
    """As wide as the longest request needs, vLLM's own may be wider, or narrower."""
    requests = [*VERIFICATIONS, PROMPTS[1]]
    batch = Batch(requests, drafts=DRAFTS)
    table = torch.nn.functional.pad(batch.common.block_table_tensor, (0, columns - PAGES_EACH))
    batch.common.block_table_tensor = table
    tokens = PAGES_EACH * SHAPE.page_tokens
    for chosen in (requests, requests[:2]):
        batch = Batch(chosen, drafts=DRAFTS)
        batch.common.block_table_tensor = table[: len(chosen)]
        builder = builder_of(DRAFTS, SHAPE.page_tokens, max_model_len=tokens)
        step = builder.build(0, batch.common)
        needed = min(columns, PAGES_EACH)
        assert torch.equal(step.block_table[:4, :needed], table[:1, :needed].expand(4, -1))
        assert torch.equal(step.block_table[4:6, :needed], table[1:2, :needed].expand(2, -1))
        assert torch.equal(step.block_table[6:, :needed], table[2 : len(chosen), :needed])


def test_rows_take_what_is_planned() -> None:
    rule = KCacheConfig().selection(SHAPE.block_tokens)
    for drafts in (0, DRAFTS):
        builder = builder_of(drafts, SHAPE.page_tokens, max_requests=5, max_model_len=500)
        tensors = () if builder._rows is None else vars(builder._rows).values()
        memory = GPUMemory(SHAPE, rule, StepLimits(5, 128, 500, 1 + drafts))
        assert memory.row_table_bytes == sum(tensor.nbytes for tensor in tensors)


def test_graphs_may_have_several_tokens_of_a_request() -> None:
    builder = builder_of(DRAFTS, SHAPE.page_tokens)
    support = builder.get_cudagraph_support(builder.vllm_config, builder.kv_cache_spec)
    assert support == AttentionCGSupport.UNIFORM_BATCH
    assert builder.reorder_batch_threshold == 1 + DRAFTS
    assert not KCacheBackend.supports_device_cpu_query_lens_mismatch()


@pytest.mark.parametrize("order", ["abcABCPQ", "BaAcP"])
def test_a_layer_that_shares_pages_writes_nothing(order: str) -> None:
    batch = Batch(mixed(order))
    own = batch.attend()
    for request, output in batch.attend(shares=True).items():
        assert torch.equal(output, own[request])


def test_a_prompts_last_token_attends_exactly() -> None:
    """Otherwise the comparison above would see no difference between the two."""
    exact = Batch([LAST_TOKENS[0]]).attend()[LAST_TOKENS[0]]
    request = replace(LAST_TOKENS[0], prefilling=False)
    selected = Batch([request]).attend()[request]
    assert not torch.allclose(exact, selected, atol=1e-3)


@pytest.mark.parametrize("order", ["abc", "Aabc", "ABC"])
def test_rows_that_pad_a_graph(order: str) -> None:
    """They come behind the real ones, of which alone vLLM may say whether they prefill."""
    requests = mixed(order)
    batch = Batch(requests, padded_requests=5)
    step = batch.build()
    decodes = sum(not request.prefilling for request in requests)
    # They count with what stands before them, and have no tokens.
    expected = decodes if len(requests) > decodes else len(requests) + 5
    assert (step.num_decodes, step.num_decodes + step.num_prefills) == (
        expected,
        len(requests) + 5,
    )
    assert step.seq_lens[len(requests) :].tolist() == [0] * 5


def test_order_of_a_step() -> None:
    """All that belongs to a request moves with it."""
    batch = Batch(mixed("ABabP"))
    common, step = batch.common, batch.build()
    rows = torch.tensor([2, 3, 0, 1, 4])
    assert step.token_order is not None
    assert torch.equal(step.token_order[:5], rows)
    assert torch.equal(step.token_order[4:], torch.arange(4, common.num_actual_tokens))
    assert torch.equal(step.seq_lens, common.seq_lens[rows])
    assert step.seq_lens_cpu is not None
    assert torch.equal(step.seq_lens_cpu, step.seq_lens)
    assert torch.equal(step.block_table, common.block_table_tensor[rows])
    assert torch.equal(step.slot_mapping, common.slot_mapping[step.token_order])


def test_a_batch_that_is_not_causal() -> None:
    batch = Batch(DECODES)
    batch.common = batch.common.replace(causal=False)
    with pytest.raises(Exception, match="causal"):
        batch.build()


@pytest.mark.parametrize(
    ("is_hybrid", "resumed", "new", "decodes"),
    [
        (False, {"old"}, (0, 40), True),
        (False, set(), (64, 1), False),
        (True, set(), (64, 1), True),
        (True, set(), (64, 3), True),
        (True, set(), (64, 4), False),
        (True, set(), (0, 1), False),
    ],
)
def test_which_steps_begin_with_a_decode(
    is_hybrid: bool, resumed: set[str], new: tuple[int, int], decodes: bool
) -> None:
    """Over pages that a prompt of the step may fill. Beside states the last token of a prompt
    decodes (`prefill_runs_as_decode_np` of vLLM's second runner), with drafts of which there may be
    two here."""
    step = SimpleNamespace(
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=resumed),
        scheduled_new_reqs=[
            SimpleNamespace(req_id="long", num_computed_tokens=0),
            SimpleNamespace(req_id="new", num_computed_tokens=new[0]),
        ],
        num_scheduled_tokens={"long": 4096, "new": new[1]},
    )
    worker: Any = SimpleNamespace(
        vllm_config=SimpleNamespace(
            model_config=SimpleNamespace(is_hybrid=is_hybrid), num_speculative_tokens=2
        )
    )
    assert gpu_worker.KCacheGPUWorker._begins_with_a_decode(worker, step) is decodes
