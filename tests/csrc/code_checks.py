# SPDX-License-Identifier: Apache-2.0
"""Cases of codes and rows for csrc/, on a GPU or emulated, against their definitions."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace

import pytest
import torch

from tests.conftest import TOLERANCES, assert_close
from tests.csrc.coded_layer import RULE, CodedLayer, flat_kv, in_steps
from tests.reference.coded import POISON, SHAPES, Coded, slots_of
from tests.shapes import Shape, build_case
from vllm_kcache.cache.hot_cache import EPOCH
from vllm_kcache.kernels import score_codes
from vllm_kcache.kernels.fetch import fetch_blocks
from vllm_kcache.kernels.rows import gather_rows, write_rows
from vllm_kcache.kernels.select import packed_view, select_and_fetch
from vllm_kcache.kernels.write import WriteParts
from vllm_kcache.reference import codes
from vllm_kcache.reference.select import select_blocks
from vllm_kcache.types import Selected

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HOST_DTYPES = ["model", "int8"]
# Pages of tokens that are no power of two, beside the others' sizes.
WRITTEN = (*SHAPES, Shape((100, 33), 1, 2, 64, 48, 8), Shape((113, 9), 2, 2, 128, 112, 16))
# Every head size, group and block size; lengths around runs of 64 and chunks of 256 tokens, pages
# that divide neither, a padded row, an empty batch.
SCORED = (
    Shape((700, 257, 64, 0, 1, 9), 2, 4, 128, 16, 8),
    Shape((530, 63, 512), 1, 3, 128, 48, 8),
    Shape((1030,), 2, 1, 64, 16, 1),
    Shape((300, 65, 255), 2, 5, 80, 64, 2),
    Shape((130, 256), 1, 7, 96, 32, 4),
    Shape((257, 5), 2, 8, 128, 16, 16),
    Shape((400, 128, 0), 1, 16, 128, 128, 32),
    Shape((77, 16, 520), 1, 12, 64, 112, 16),
    Shape((77, 300), 2, 2, 256, 16, 8),
    Shape((270,), 1, 6, 256, 32, 32),
    Shape((65,), 1, 16, 256, 16, 8),
    Shape((0, 0), 2, 2, 64, 16, 8),
    Shape((), 2, 2, 64, 16, 8),
)
SOME_SCORED = SCORED[:-2]
# Bends all scores; leaves nothing of them but their signs.
SOFT_CAPS = 2.0, 1e-3


def check_scores(
    shape: Shape,
    splits: int | None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    dependent: bool = False,
    soft_cap: float | None = None,
) -> None:
    """Scores, sums of chunks, and q'; pages with a gap after each in some."""
    coded = Coded.of(build_case(shape, dtype), "model", strided=shape.head_size == 80)
    layer = CodedLayer.of(coded, device)
    layer = replace(layer, batch=replace(layer.batch, soft_cap=soft_cap))
    layer.check_scores(splits, dependent)


def check_joint_scores(
    shape: Shape, splits: int | None, first: int, device: str = "cpu", dependent: bool = False,
    soft_cap: float | None = None,
) -> None:  # fmt: skip
    """Of several tokens of a request: as where each row is scored alone.

    Args:
        first: Rows before it belong to another batch.
    """
    most = 7
    layer = CodedLayer.of(Coded.of(build_case(shape, torch.bfloat16), "model"), device)
    lengths, tables, spans = [], [], []
    for request, length in enumerate(shape.seq_lens):
        # Ragged: all numbers of tokens from 1 on.
        tokens = min(1 + (request + 4) % most, max(length, 1))
        lengths += range(length - tokens + 1, length + 1)
        tables += [request] * tokens
        spans += [(at, tokens - 1 - at) for at in range(tokens)]
    query = torch.randn(len(lengths), *layer.batch.query.shape[1:]).to(layer.batch.query)
    alone = replace(
        layer.batch,
        query=query[first:],
        block_table=layer.batch.block_table[tables][first:],
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device)[first:],
        soft_cap=soft_cap,
    )
    of_rows = torch.tensor(spans, dtype=torch.int32, device=device)[first:]
    found = []
    for batch in (alone, replace(alone, spans=of_rows, most_tokens=most)):
        these = replace(layer, batch=batch)
        lists, heads = these.lists(), alone.query.shape[:2]
        outputs = [
            torch.full(sizes, torch.nan, device=device) for sizes in (alone.query.shape, heads)
        ]
        score_codes.score_codes(
            these.view, batch, lists, *outputs, splits=splits or 2, dependent=dependent
        )
        assert lists.chunk_max is not None
        found.append([*outputs, lists.block_lse, lists.chunk_lse, lists.chunk_max])
    # A compiler may fuse the sums of two kernels in two ways. Then a value of q' near the middle of
    # two steps may go to either, and scores of that query head are two.
    relative, absolute = TOLERANCES[torch.float32] if device != "cpu" else (0, 0)
    alike = torch.eq(*(in_steps(outputs[0])[0] for outputs in found)).all(-1)
    assert alike.all() if device == "cpu" else alike.float().mean() > 0.9
    for number, (one, other) in enumerate(zip(*found, strict=True)):
        assert not one.isnan().all()
        if number > 1:
            one, other = one[alike], other[alike]
        torch.testing.assert_close(other, one, rtol=relative, atol=absolute, equal_nan=True)


def _inputs(
    layer: CodedLayer, value: float | None = None, order: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Key and value strided over tokens as in one product of a layer, and slots with padding."""
    case = layer.coded.case
    if not case.keys:
        size = case.shape
        empty = case.query.new_zeros((0, size.num_kv_heads, size.head_size))
        keys = values = empty
    else:
        keys, values = flat_kv(case)
    if value is not None:
        keys = torch.full_like(keys, value)
        keys[..., 1] = -value
    together = torch.cat((keys, keys, values), 1)
    padding = together.new_full((1, *together.shape[1:]), torch.nan)
    together = torch.cat((together[:3], padding, together[3:], padding))
    slots = slots_of(case).long()
    slots = torch.cat((slots[:3], torch.tensor([-1]), slots[3:], torch.tensor([-1])))
    if order is not None:
        together, slots = together[order], slots[order]
    together, heads = together.to(layer.device), keys.shape[1]
    return together[:, heads : 2 * heads], together[:, 2 * heads :], slots.to(layer.device)


def check_write(
    shape: Shape, dtype: torch.dtype, host_dtype: str, value: float | None = None,
    device: str = "cpu",
) -> None:  # fmt: skip
    """Pages and rows byte by byte, and poison where nothing was written: as prompts write them,
    with many thread blocks and few, and as decodes do."""
    case = build_case(shape, dtype)
    if value is not None:
        keys = tuple(torch.full_like(key, value) for key in case.keys)
        for key in keys:
            key[..., 1] = -value
        case = replace(case, keys=keys)
    coded = Coded.of(case, host_dtype, strided=shape.head_size == 80)
    in_order = torch.arange(sum(shape.seq_lens) + 2)
    shuffled = torch.randperm(len(in_order), generator=torch.Generator().manual_seed(1))
    # Whole rows, rows that begin elsewhere in a warp's window, and rows in parts.
    orders = in_order, in_order.roll(5), shuffled
    no_slots = WriteParts.K | WriteParts.ROW_HOST
    for (blocks, decodes), order in itertools.product(((0, 0), (2, 0), (0, 1 << 20)), orders):
        layer = CodedLayer.of(coded, device, pages=False)
        write_rows(
            layer.view, *_inputs(layer, value, order), most_thread_blocks=blocks,
            parts=no_slots if decodes else WriteParts.ALL, allocate_tokens=decodes,
        )  # fmt: skip
        assert torch.equal(layer.view.code_pages.cpu(), coded.code_pages)
        assert torch.equal(_used(layer, layer.view.host_rows), _used(layer, coded.host_rows))
        # Nothing was resident, and no slot was to be taken.
        assert bool((layer.cache.slots == 0).all())
        assert bool((layer.cache.table == -1).all())


def _used(layer: CodedLayer, rows: torch.Tensor) -> torch.Tensor:
    """Rows without what fills them up to 16 bytes."""
    row = layer.view.shape.row
    scales = 4 * row.block_tokens if row.host_dtype == "int8" else 0
    return rows[:, : 2 * row.values_at + scales].cpu()


def check_parts(host_dtype: str, device: str = "cpu") -> None:
    """Each part alone, of decodes and beside prompts."""
    coded = Coded.of(build_case(SHAPES[4], torch.float16), host_dtype)
    parts = WriteParts.K, WriteParts.ROW_HOST, WriteParts.ROW_SLOT
    for part, beside in itertools.product(parts, (0, 1)):
        layer = CodedLayer.of(coded, device, pages=False)
        inputs = _inputs(layer)
        decodes = inputs[-1].shape[0] - beside
        write_rows(layer.view, *inputs, parts=part, allocate_tokens=decodes)
        pages = layer.view.code_pages.cpu()
        rows = _used(layer, layer.view.host_rows)
        wrote_rows = torch.equal(rows, _used(layer, coded.host_rows))
        assert torch.equal(pages, coded.code_pages) == (part == WriteParts.K)
        assert wrote_rows == (part == WriteParts.ROW_HOST)
        assert bool((pages == 0xFF).all()) == (part != WriteParts.K)
        assert bool((rows == 0xFF).all()) == (part != WriteParts.ROW_HOST)
        assert bool((layer.cache.table >= 0).any()) == (part == WriteParts.ROW_SLOT)


def check_slots(host_dtype: str, device: str = "cpu") -> None:
    """Token by token, as a decode writes: a slot for each row that begins, and every later token in
    it; none for tokens that may not take one; what is resident is written in any case."""
    coded = Coded.of(build_case(SHAPES[1], torch.bfloat16), host_dtype)
    for allocated, num_slots in ((1, 64), (0, 64), (1, 0)):
        layer = CodedLayer.of(coded, device, num_slots, pages=False)
        key, value, slots = _inputs(layer)
        for token in range(len(slots)):
            one = slice(token, token + 1)
            write_rows(
                layer.view, key[one], value[one], slots[one], allocate_tokens=allocated,
                dependent=False,
            )  # fmt: skip
            layer.cache.advance_epoch()
        table = layer.cache.table.cpu()  # and waits for what the host reads below
        assert torch.equal(_used(layer, layer.view.host_rows), _used(layer, coded.host_rows))
        assert bool((table[0] == -1).all())
        resident = (table[1] >= 0).nonzero().flatten()
        written = (coded.host_rows != 0xFF).any(1)
        if not allocated or not num_slots:
            assert not len(resident)
            continue
        assert torch.equal(resident, written.nonzero().flatten())
        in_slots = _used(layer, layer.cache.slots.cpu()[table[1][resident].long()])
        expected = _used(layer, coded.host_rows[resident])
        is_written = expected != 0xFF
        assert torch.equal(in_slots[is_written], expected[is_written])
        assert int(layer.cache.state[EPOCH]) == len(slots)


def check_drafts(
    shape: Shape, host_dtype: str, device: str = "cpu", dependent: bool = False
) -> None:
    """Several tokens of a request at once, and of the next: each row gets a slot with its first
    token, and every token goes there, too. What ends the epoch is the launch just before."""
    coded = Coded.of(build_case(shape, torch.bfloat16), host_dtype)
    tokens = sum(shape.seq_lens)
    # Without the padding among them, which would part the tokens of a row.
    order = torch.tensor([*range(3), *range(4, tokens + 1), tokens + 1])
    for together in (2, 7):
        layer = CodedLayer.of(coded, device, 256, pages=False)
        key, value, slots = _inputs(layer, order=order)
        for first in range(0, len(slots), together):
            some = slice(first, first + together)
            write_rows(
                layer.view, key[some], value[some], slots[some], allocate_tokens=together,
                fills=True, dependent=dependent,
            )  # fmt: skip
            layer.cache.advance_epoch()
        table = layer.cache.table.cpu()  # and waits for what the host reads below
        assert torch.equal(layer.view.code_pages.cpu(), coded.code_pages)
        assert torch.equal(_used(layer, layer.view.host_rows), _used(layer, coded.host_rows))
        resident = (table[1] >= 0).nonzero().flatten()
        assert torch.equal(resident, (coded.host_rows != POISON).any(1).nonzero().flatten())
        in_slots = _used(layer, layer.cache.slots.cpu()[table[1][resident].long()])
        expected = _used(layer, coded.host_rows[resident])
        is_written = expected != POISON
        assert torch.equal(in_slots[is_written], expected[is_written])


def check_gather(shape: Shape, dtype: torch.dtype, host_dtype: str, device: str = "cpu") -> None:
    """K and V of each token, exactly with rows of the model's dtype; nothing outside the runs."""
    layer = CodedLayer.of(Coded.of(build_case(shape, dtype), host_dtype), device)
    for skip_pages, blocks in ((0, 3), (1, 1)):
        check_gathered(layer, skip_pages, blocks)


def check_gathered(layer: CodedLayer, skip_pages: int = 0, blocks: int = 3) -> None:
    """What is gathered is what was written, wherever it lies."""
    coded, shape = layer.coded, layer.coded.case.shape
    dtype, host_dtype = coded.row.dtype, coded.row.host_dtype
    keys, values, first_rows = layer.gathered(skip_pages, blocks)
    start, outside = skip_pages * shape.page_tokens, torch.ones(len(keys), dtype=torch.bool)
    for request, tokens in enumerate(shape.seq_lens):
        length = max(0, tokens - start)
        run = slice(int(first_rows[request]), int(first_rows[request]) + length)
        outside[run] = False
        found = keys[run], values[run]
        if host_dtype == "model":
            expected = coded.case.keys[request][start:], coded.case.values[request][start:]
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
        else:
            row_keys, row_values = coded.row_kv(request)
            restored = codes.restore_keys(row_keys, coded.stats)
            assert_close(found[0], restored[start:].to(dtype))
            assert_close(found[1], row_values[start:].to(dtype))
    assert bool(keys[outside].isnan().all())
    assert bool(values[outside].isnan().all())


def check_fills(host_dtype: str, device: str = "cpu") -> None:
    """Prompts take slots that hold nothing for their whole rows, and no others; those are gathered
    from there, and where another row has the slot, from the host. Padding parts the first row."""
    coded = Coded.of(build_case(SHAPES[1], torch.bfloat16), host_dtype)
    whole = torch.zeros(len(coded.host_rows), dtype=torch.bool)
    shape, per_page = SHAPES[1], SHAPES[1].page_tokens // SHAPES[1].v_block_tokens
    for request, tokens in enumerate(shape.seq_lens):
        for block in range(0 if request else 1, tokens // shape.v_block_tokens):
            page, at = coded.place(request, block * shape.v_block_tokens)
            for head in range(shape.num_kv_heads):
                row = (page * shape.num_kv_heads + head) * per_page + at // shape.v_block_tokens
                whole[row] = True
    parts = WriteParts.K | WriteParts.ROW_SLOT
    for num_slots in (64, 3):
        layer = CodedLayer.of(coded, device, num_slots, pages=False)
        write_rows(layer.view, *_inputs(layer), parts=parts, fills=True)
        table = layer.cache.table.cpu()
        resident = (table[1] >= 0).nonzero().flatten()
        assert bool(whole[resident].all())
        assert len(resident) == (int(whole.sum()) if num_slots == 64 else 3)
        layer.cache.advance_epoch()
        write_rows(layer.view, *_inputs(layer), parts=parts, fills=True)
        assert torch.equal(layer.cache.table.cpu(), table)
    layer = CodedLayer.of(coded, device, 64, pages=False)
    write_rows(layer.view, *_inputs(layer), parts=parts, fills=True)
    layer.view.host_rows[~whole] = coded.host_rows[~whole]
    with pytest.raises(AssertionError):
        check_gathered(layer)  # nothing says yet that the slots are written
    layer.cache.advance_epoch()
    check_gathered(layer)
    lost = (layer.cache.table[1] >= 0).nonzero().flatten()[1]
    slot = layer.cache.table[1, lost].long()
    layer.cache.slots[slot] = 0xFF
    layer.cache.slot_word[slot] += 1 << 32
    with pytest.raises(AssertionError):
        check_gathered(layer)  # the host has nothing
    layer.view.host_rows[int(lost)] = coded.host_rows[int(lost)]
    check_gathered(layer)


def check_gathers_beside_fetches(gathers: int = 400) -> None:
    """Slots go to other rows while they are read: those rows come from the host."""
    shape, listed = Shape((128,), 2, 1, 64, 16, 8), 2
    layer = CodedLayer.of(Coded.of(build_case(shape, torch.bfloat16), "model"), num_slots=6)
    packed, done = layer.view.packed, threading.Event()
    assert packed is not None

    def fetch() -> None:
        while not done.is_set():
            lists = [torch.randperm(shape.max_blocks)[:listed].sort().values for _ in range(2)]
            blocks = torch.stack(lists).int()[None]
            selected = Selected(blocks, torch.full((1, 2), listed).int(), torch.ones(1, 2))
            rows = torch.empty_like(blocks)
            fetch_blocks(packed, selected, layer.batch.block_table, rows)
            layer.cache.advance_epoch()

    beside = threading.Thread(target=fetch)
    beside.start()
    try:
        for _ in range(gathers):
            check_gathered(layer)
    finally:
        done.set()
        beside.join()
    counted = layer.cache.read_counters()
    assert counted.misses > gathers // 10


def check_no_fills(device: str = "cpu") -> None:
    """Rows of several pieces are written by several warps: none takes a slot for the others."""
    layer = CodedLayer.of(
        Coded.of(build_case(SHAPES[0], torch.bfloat16), "int8"), device, 64, pages=False
    )
    write_rows(layer.view, *_inputs(layer), fills=True)
    assert bool((layer.cache.table == -1).all())


def check_step(device: str = "cpu") -> None:
    """Scores from codes, then lists, rows and the mass that each query head drops."""
    shape = Shape((700, 257, 0, 1), 2, 4, 128, 16, 8)
    coded = Coded.of(build_case(shape, torch.bfloat16, sharpness=0.1), "int8")
    layer = CodedLayer.of(coded, device, 1 << 10)
    lists = layer.check_scores()
    assert layer.view.packed is not None
    select_and_fetch(layer.view.packed, lists)
    block_lse = lists.block_lse.cpu().nan_to_num(nan=-torch.inf)
    expected = select_blocks(
        block_lse, coded.case.seq_lens, shape.num_kv_heads, shape.v_block_tokens, RULE,
        estimated=True,
    )  # fmt: skip
    selected = lists.selected
    assert torch.equal(selected.counts.cpu(), expected.counts)
    width = expected.blocks.shape[2]
    listed = torch.arange(width) < expected.counts[..., None]
    assert torch.equal(selected.blocks.cpu()[..., :width][listed], expected.blocks[listed])
    real = coded.case.seq_lens > 0
    assert selected.lse is not None
    assert selected.dropped is not None
    assert expected.lse is not None
    assert expected.dropped is not None
    assert_close(selected.lse.cpu()[real], expected.lse[real])
    assert_close(selected.dropped.cpu()[real], expected.dropped[real])
    assert float(expected.dropped[0].min()) > 0.01
    rows = lists.rows.cpu()[..., :width][listed].long()
    assert bool((rows >= 0).all())
    table = layer.cache.table.cpu()[1]
    owners = {int(slot): row for row, slot in enumerate(table.tolist()) if slot >= 0}
    physical = torch.tensor([owners[int(row)] for row in rows])
    assert torch.equal(layer.cache.slots.cpu()[rows], coded.host_rows[physical])


def check_errors(layer: CodedLayer) -> None:
    """Errors name what does not fit."""
    view, batch, stats = layer.view, layer.batch, layer.view.k_stats
    assert stats is not None
    for wrong, text in (
        (replace(view, k_stats=replace(stats, mean=stats.mean.half())), "mean: has the wrong"),
        (replace(view, k_pages=view.k_pages[:-1]), "codes: must be uint8"),
        (replace(view, shape=replace(view.shape, host_dtype="int8")), "K and V take"),
        (replace(view, shape=replace(view.shape, head_size=32)), "head_size=32: K codes are for"),
    ):
        with pytest.raises(RuntimeError, match=text):
            packed_view(wrong)
    key, value, slots = _inputs(layer)
    for arguments, text in (
        ((key.double(), value, slots), "key: has the wrong dtype"),
        ((key, value[..., :8], slots), "value: must be"),
        ((key[:1], value, slots), "key: must be"),
        ((key, value, slots.int()), "slot_mapping: has the wrong dtype"),
    ):
        with pytest.raises(RuntimeError, match=text):
            write_rows(view, *arguments)
    lists, heads = layer.lists(), (batch.num_requests, view.shape.num_query_heads)
    transformed = torch.zeros((*heads, view.shape.head_size), device=layer.device)
    outputs = transformed, torch.zeros(heads, device=layer.device)
    for changed, text in (
        (replace(batch, scale=0.0), "scale=0: must be above 0"),
        (replace(batch, soft_cap=0.0), "soft_cap=0: must be above 0"),
        (replace(batch, query=batch.query.double()), "query: has the wrong dtype"),
        (replace(batch, query=batch.query[:, :1]), "query: must be"),
        (replace(batch, spans=batch.block_table[:1, :1]), "spans: has size"),
    ):
        with pytest.raises(RuntimeError, match=text):
            score_codes.score_codes(view, changed, lists, *outputs)
    short = replace(lists, chunk_lse=lists.chunk_lse[..., :0].contiguous())
    with pytest.raises(RuntimeError, match="chunk_lse: has C=0 chunks"):
        score_codes.score_codes(view, batch, short, *outputs)
    numbers = torch.zeros(batch.num_requests, dtype=torch.int32, device=layer.device)
    with pytest.raises(RuntimeError, match="lengths: has size"):
        gather_rows(view, batch.block_table, numbers, numbers[:1], numbers, 1, key, value)
