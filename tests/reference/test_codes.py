# SPDX-License-Identifier: Apache-2.0
"""K codes: the rotation, 4 bits, where they lie, and scores and attention from them and from rows,
against the definitions in float64."""

import pytest
import torch

from tests.conftest import TOLERANCES, assert_close
from tests.reference.coded import SHAPES, Coded, hadamard, slots_of, some_stats
from tests.reference.test_fetch import some_blocks
from tests.reference.test_full import assert_chunks, chunk_lengths
from tests.shapes import Shape, build_case
from vllm_kcache.cache.formats import RowFormat, code_bytes
from vllm_kcache.reference import codes
from vllm_kcache.reference.attend import attend_rows, estimate_errors
from vllm_kcache.reference.fetch import fetch_rows
from vllm_kcache.reference.full import attend_full_rows
from vllm_kcache.reference.paging import physical_v_blocks
from vllm_kcache.reference.score import score_codes
from vllm_kcache.reference.select import request_lse, select_blocks
from vllm_kcache.reference.sinks import refine_lse, share_of_tokens
from vllm_kcache.reference.write import write_codes_and_rows
from vllm_kcache.types import Fetched, KStats, Selected, Selection

HEAD_SIZES = [64, 80, 96, 128, 256]
HOST_DTYPES = ["model", "int8"]
CLIP = 0.01


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_rotation_is_the_matrix_and_its_own_inverse(head_size):
    x = torch.randn(5, 3, head_size, dtype=torch.float64)
    assert_close(codes.rotate(x), x @ hadamard(head_size))
    assert_close(codes.rotate(codes.rotate(x)), x)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_products_do_not_change(head_size):
    stats = some_stats(2, head_size)
    query = torch.randn(3, 6, head_size, dtype=torch.float64)
    key = 5 + torch.randn(7, 2, head_size, dtype=torch.float64)
    transformed, bias = codes.transform_query(query, stats)
    keys = codes.transform_keys(key, stats)
    for head in range(6):
        expected = query[:, head] @ key[:, head // 3].T
        assert_close(transformed[:, head] @ keys[:, head // 3].T + bias[:, head, None], expected)
    assert_close(codes.restore_keys(keys, stats), key)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_a_rounded_query_is_in_whole_steps(head_size):
    """Of its largest value / 127, which it keeps; half a step off at most; 0 stays 0."""
    query = torch.randn(5, 3, head_size, dtype=torch.float64)
    query[2, 1] = 0
    rounded = codes.round_query(query)
    step = query.abs().amax(-1, keepdim=True) / 127
    in_steps = (rounded / step).nan_to_num()
    assert_close(in_steps, in_steps.round())
    assert bool(((rounded - query).abs() <= 0.5 * step + 1e-12).all())
    assert_close(rounded.abs().amax(-1), query.abs().amax(-1))


def test_steps_of_a_query_are_rounded_once():
    """127 / most in one division, as kernels have it: this value is in the middle of two steps
    then, and its even one is lower. A reciprocal times 127 would take the upper."""
    query = torch.tensor([3.2040534019470215, 0.5171897411346436])
    steps = codes.round_query(query) / query[0] * 127
    assert steps.round().tolist() == [127, 20]


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_rounding_the_query_adds_little_to_what_codes_cost(head_size):
    """Estimates are off by the codes of K; by the 8 bits of q' in addition less than 1%."""
    query, key = torch.randn(64, 1, head_size), torch.randn(512, 1, head_size)
    stats = KStats(torch.zeros(1, head_size), torch.ones(1, head_size))
    transformed, _ = codes.transform_query(query, stats)
    coded = codes.decode(*codes.encode(codes.transform_keys(key, stats)))[:, 0]
    exact = query[:, 0] @ key[:, 0].T

    def error(queries: torch.Tensor) -> float:
        return float((queries[:, 0] @ coded.T - exact).square().mean().sqrt())

    assert error(transformed) < error(codes.round_query(transformed)) < 1.01 * error(transformed)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_a_code_is_off_by_at_most_half_a_step(head_size):
    generator = torch.Generator().manual_seed(head_size)
    sizes = torch.logspace(-3, 3, 40)[:, None]
    x = sizes * torch.randn((40, head_size), generator=generator) + sizes.flip(0)
    found, scale, zero = codes.encode(x)
    assert int(found.min()) == 0
    assert int(found.max()) == 15
    # Zero and scale are rounded to float16, 11 bits: 15 rounded steps may end short of the largest.
    span = x.abs().amax(-1, keepdim=True).clamp_min(2**-14)
    error = (codes.decode(found, scale, zero) - x).abs()
    assert bool((error <= scale.float()[:, None] / 2 + 3 * 2**-11 * span).all())


@pytest.mark.parametrize("value", [0.0, 3.0, -2e-5, 1e9, -1e9])
def test_a_head_of_one_value_has_a_code(value):
    found, scale, zero = codes.encode(torch.full((2, 64), value))
    assert float(scale[0]) == 2.0**-14
    assert bool(zero.isfinite().all())
    decoded = codes.decode(found, scale, zero)
    assert bool(decoded.isfinite().all())
    if abs(value) < 1e5:
        assert_close(decoded, torch.full((2, 64), value), torch.float16)


def test_extremes_stay_finite():
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 1] = 1e30, -1e30
    decoded = codes.decode(*codes.encode(x))
    assert bool(decoded.isfinite().all())
    values, scale = codes.quantise_int8(x)
    assert values[0, :2].tolist() == [127, -127]
    assert bool(scale.isfinite().all())


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_packing(head_size):
    x = torch.randint(16, (3, 4, head_size), dtype=torch.uint8)
    packed = codes.pack(x)
    assert packed.shape == (3, 4, code_bytes(head_size) - 4)
    assert torch.equal(codes.unpack(packed, head_size), x)


def test_bytes_of_pages_and_rows():
    assert [code_bytes(size) for size in HEAD_SIZES] == [36, 52, 52, 68, 132]
    assert RowFormat(8, 128, torch.bfloat16).bytes == 2048
    assert RowFormat(8, 128, torch.bfloat16, 4, "model").bytes == 4096
    assert RowFormat(8, 128, torch.bfloat16, 4, "int8").bytes == 2080
    assert RowFormat(1, 80, torch.float32, 4, "int8").bytes == 176


@pytest.mark.parametrize("size", [0, 1e-6, 1.0, 300.0])
def test_int8_is_off_by_at_most_half_a_step(size):
    x = size * torch.randn(20, 64)
    values, scale = codes.quantise_int8(x)
    # A scale that was rounded down cuts the largest value: by 127 times its rounding.
    slack = scale.float()[:, None] * (0.5 + 127 * 2**-11)
    assert bool(((values * scale.float()[:, None] - x).abs() <= slack).all())


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("host_dtype", HOST_DTYPES)
@pytest.mark.parametrize("shape", [s for s in SHAPES if sum(s.seq_lens)], ids=str)
def test_write(shape, host_dtype, strided):
    """Every token's code is close to its K, its row holds its K and V, and nothing else is
    written."""
    case = build_case(shape)
    coded = Coded.of(case, host_dtype, strided)
    for request, tokens in enumerate(shape.seq_lens):
        keys, values = coded.row_kv(request)
        expected = case.keys[request].double()
        if host_dtype == "int8":
            expected = torch.stack(
                [coded.transformed(expected[:, head], head) for head in range(shape.num_kv_heads)],
                1,
            )
            for found, true in ((keys, expected), (values, case.values[request].double())):
                step = true.abs().amax(-1, keepdim=True) / 127
                assert bool(((found - true).abs() <= 0.57 * step).all())
        else:
            assert torch.equal(keys, expected)
            assert torch.equal(values, case.values[request].double())
        for token in range(tokens):
            for head in range(shape.num_kv_heads):
                true = coded.transformed(case.keys[request][token, head], head)
                found, scale, zero = coded.code(request, token, head)
                error = (torch.tensor(found) * scale + zero - true).abs().max()
                assert float(error) <= scale / 2 + 3 * 2**-11 * float(true.abs().max())
    used = sum(shape.seq_lens) * shape.num_kv_heads
    padded = (shape.head_size + 31) // 32 * 32
    unwritten = coded.code_pages.shape[0] * shape.num_kv_heads * shape.page_tokens - used
    # A code of 15s may be poison by chance, so whole tokens are counted.
    parts = coded.code_pages[..., : shape.page_tokens * padded // 2]
    whole = (parts.unflatten(-1, (shape.page_tokens, -1)) == 0xFF).all(-1)
    assert int(whole.sum()) == unwritten


def test_padding_is_not_stored():
    stats, row = some_stats(2, 64), RowFormat(4, 64, torch.float32, 4)
    pages = torch.zeros(2, 2, 16 * 36, dtype=torch.uint8)
    rows = torch.zeros(2 * 2 * 4, row.bytes, dtype=torch.uint8)
    key = torch.randn(3, 2, 64)
    slots = torch.tensor([-1, 21, -1], dtype=torch.int32)
    write_codes_and_rows(key, key + 1, slots, pages, rows, row, stats)
    assert not pages[0].any()
    written = rows.view(2, 2, 4, -1)
    assert not written[0].any()
    assert not written[1, :, [0, 2, 3]].any()
    assert torch.equal(row.keys(written[1, :, 1])[:, 1], key[1])
    assert torch.equal(row.values(written[1, :, 1])[:, 1], key[1] + 1)
    write_codes_and_rows(key[:0], key[:0], slots[:0], pages, rows, row, stats)


def score(coded: Coded) -> torch.Tensor:
    case, shape = coded.case, coded.case.shape
    return score_codes(
        case.query, coded.code_pages, coded.stats, case.block_table, case.seq_lens, case.scale,
        shape.v_block_tokens, shape.max_blocks,
    )  # fmt: skip


def block_lse(scores: torch.Tensor, block_tokens: int) -> torch.Tensor:
    return torch.stack([x.logsumexp(1) for x in scores.split(block_tokens, 1)], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_score(shape, dtype):
    coded = Coded.of(build_case(shape, dtype), "model", strided=True)
    found = score(coded)
    assert found.dtype == torch.float32
    for request, tokens in enumerate(shape.seq_lens):
        blocks = -(-tokens // shape.v_block_tokens)
        assert bool((found[request, :, blocks:] == -torch.inf).all())
        if tokens:
            expected = block_lse(coded.estimates(request), shape.v_block_tokens)
            assert_close(found[request, :, :blocks], expected)


@pytest.mark.parametrize("combine", ["sum", "max"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropped_mass_of_each_query_head(shape, combine):
    lse = score(Coded.of(build_case(shape), "model"))
    seq_lens = torch.tensor(shape.seq_lens, dtype=torch.int32)
    rule = Selection(None, None, 0, 1, combine, 0.05)
    tokens = shape.v_block_tokens
    found = select_blocks(lse, seq_lens, shape.num_kv_heads, tokens, rule, estimated=True)
    exact = select_blocks(lse, seq_lens, shape.num_kv_heads, tokens, rule)
    assert exact.dropped is None
    assert torch.equal(found.blocks, exact.blocks)
    assert found.dropped.dtype == torch.float32
    assert found.dropped.shape == found.lse.shape == lse.shape[:2]
    for request, length in enumerate(shape.seq_lens):
        for head in range(shape.num_heads if length else 0):
            row = found.blocks[request, head // shape.group_size]
            masses = lse[request, head].double().softmax(0)
            expected = 1 - float(masses[row[row >= 0].long()].sum())
            assert float(found.dropped[request, head]) == pytest.approx(expected, abs=1e-6)


def selected_of(coded: Coded) -> tuple[Selected, torch.Tensor]:
    """Random lists, with what select would say of them, where a row pads poison; and the estimates
    of blocks."""
    shape, lse = coded.case.shape, score(coded)
    lists = some_blocks(shape)
    masses = lse.softmax(-1).nan_to_num()
    blocks = lists.blocks.repeat_interleave(shape.group_size, 1)
    kept = masses.gather(-1, blocks.clamp_min(0).long()).masked_fill(blocks < 0, 0.0).sum(-1)
    total = lse.logsumexp(-1)
    dropped = (1 - kept).clamp_min(0)
    padded = coded.case.seq_lens == 0
    total[padded] = dropped[padded] = torch.nan
    return Selected(lists.blocks, lists.counts, lists.mass, total, dropped), lse


def expected_attention(coded: Coded, selected: Selected, request: int, tail: str) -> torch.Tensor:
    """[Hq, D] float64, with every weight written out."""
    shape = coded.case.shape
    scores, (_, values) = coded.scores(request), coded.row_kv(request)
    estimates = block_lse(coded.estimates(request), shape.v_block_tokens)
    result = []
    for head in range(shape.num_heads):
        row = selected.blocks[request, head // shape.group_size]
        kept = row[row >= 0].tolist()
        tokens = [t for t in range(scores.shape[1]) if t // shape.v_block_tokens in kept]
        mine = values[tokens, head // shape.group_size]
        if tail == "renormalize":
            result.append(scores[head, tokens].softmax(0) @ mine)
            continue
        lse = estimates[head].logsumexp(0)
        weights = (scores[head, tokens] - lse).exp()
        dropped = max(0.0, 1 - float((estimates[head, kept] - lse).exp().sum()))
        claims = weights.clamp(max=CLIP)
        total = weights @ mine + dropped * (claims @ mine) / claims.sum()
        result.append(total / (weights.sum() + dropped))
    return torch.stack(result)


def attend(coded: Coded, selected: Selected, tail: str, fetched=None, **others) -> torch.Tensor:
    case, shape = coded.case, coded.case.shape
    blocks_per_page = shape.page_tokens // shape.v_block_tokens
    if fetched is None:
        fetched = fetch_rows(
            selected, case.block_table, coded.host_rows, shape.num_kv_heads, blocks_per_page
        )
    return attend_rows(
        case.query, coded.host_rows, coded.row, coded.stats, fetched, selected, case.seq_lens,
        case.scale, tail, clip=CLIP, **others,
    )  # fmt: skip


@pytest.mark.parametrize("host_dtype", HOST_DTYPES)
@pytest.mark.parametrize("tail", ["renormalize", "clip"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attend(shape, tail, host_dtype):
    coded = Coded.of(build_case(shape), host_dtype)
    selected, lse = selected_of(coded)
    out = torch.full_like(coded.case.query, torch.nan)
    refined = torch.full((*lse.shape[:2], selected.blocks.shape[2]), torch.nan)
    assert attend(coded, selected, tail, out=out, refined=refined) is out
    errors = estimate_errors(lse, refined, selected)
    assert errors.numel() == shape.group_size * int(selected.counts.sum())
    expected_errors = []
    for request, tokens in enumerate(shape.seq_lens):
        if not tokens:
            assert not out[request].any()
            continue
        assert_close(out[request], expected_attention(coded, selected, request, tail))
        true = block_lse(coded.scores(request), shape.v_block_tokens)
        estimates = block_lse(coded.estimates(request), shape.v_block_tokens)
        for head in range(shape.num_heads):
            row = selected.blocks[request, head // shape.group_size]
            kept = row[row >= 0].long()
            assert_close(refined[request, head, : len(kept)], true[head, kept])
            expected_errors += (true - estimates)[head, kept].abs().tolist()
    expected = torch.tensor(sorted(expected_errors), dtype=torch.float64)
    # A difference of scores of order 10 keeps fewer digits than they have.
    torch.testing.assert_close(errors.sort().values.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("host_dtype", HOST_DTYPES)
def test_attend_dtypes(dtype, host_dtype):
    assert dtype in TOLERANCES
    coded = Coded.of(build_case(Shape((40, 9, 0), 2, 3, 64, 32, 8), dtype), host_dtype)
    selected, _ = selected_of(coded)
    for tail in ("renormalize", "clip"):
        out = attend(coded, selected, tail)
        for request in range(2):
            assert_close(out[request], expected_attention(coded, selected, request, tail))


@pytest.mark.parametrize("host_dtype", HOST_DTYPES)
def test_a_sink_is_weighed_against_the_best_that_is_known(host_dtype):
    """The true scores of the selected tokens and the estimates of the others."""
    coded = Coded.of(build_case(Shape((70, 0, 9), 2, 3, 64, 32, 8)), host_dtype)
    selected, lse = selected_of(coded)
    refined = torch.full((*lse.shape[:2], selected.blocks.shape[2]), torch.nan)
    attend(coded, selected, "renormalize", refined=refined)
    sinks = torch.linspace(-5, 5, 6)
    found = request_lse(refine_lse(lse, refined, selected), coded.case.seq_lens, 8)
    shares = share_of_tokens(found, sinks)
    estimated = 0
    for request in (0, 2):
        scores, estimates = coded.scores(request), coded.estimates(request)
        for head in range(6):
            row = selected.blocks[request, head // 3]
            kept = torch.isin(torch.arange(scores.shape[1]) // 8, row[row >= 0])
            estimated += int((~kept).sum())
            known = torch.where(kept, scores[head], estimates[head]).exp().sum()
            share = known / (known + sinks[head].double().exp())
            assert_close(shares[request, head], share, torch.float32)
    assert estimated > 20


@pytest.mark.parametrize("host_dtype", HOST_DTYPES)
def test_rows_read_straight_from_the_host_pool(host_dtype):
    shape = Shape((100, 29, 0), 3, 3, 64, 32, 8)
    coded = Coded.of(build_case(shape), host_dtype)
    selected, _ = selected_of(coded)
    physical = physical_v_blocks(selected.blocks, coded.case.block_table, 3, 4)
    fetched = fetch_rows(selected, coded.case.block_table, coded.host_rows, 3, 4)
    every_other = (fetched.rows >= 0) & (fetched.rows % 2 == 0)
    rows = torch.where(every_other, -2 - physical.int(), fetched.rows)
    staged = fetched.v_rows.clone()
    staged[::2] = 0xFF
    out = attend(coded, selected, "clip", Fetched(rows, staged))
    assert torch.equal(out, attend(coded, selected, "clip"))


@pytest.mark.parametrize("shift", [-200.0, 0.0, 100.0])
@pytest.mark.parametrize("tail", ["renormalize", "clip"])
def test_with_everything_selected_the_codes_do_not_matter(tail, shift):
    """However wrong the estimates are, even by more than exp can say."""
    shape = Shape((70, 9), 2, 2, 64, 32, 8)
    coded = Coded.of(build_case(shape), "model")
    lse = score(coded) + shift
    seq_lens = coded.case.seq_lens
    rule = Selection(None, None, 0, 1, "max", 1e-9)
    selected = select_blocks(lse, seq_lens, 2, 8, rule, estimated=True)
    everything = Selection(None, None, 1, 32, "max")
    listed = select_blocks(lse, seq_lens, 2, 8, everything)
    selected = Selected(listed.blocks, listed.counts, listed.mass, selected.lse,
                        torch.zeros_like(selected.lse))  # fmt: skip
    out = attend(coded, selected, tail)
    for request in range(2):
        keys, values = coded.case.keys[request].double(), coded.case.values[request].double()
        query = coded.case.query[request].double()
        scores = torch.einsum("hd,thd->ht", query, keys.repeat_interleave(2, 1)) * coded.case.scale
        full = torch.einsum("ht,thd->hd", scores.softmax(-1), values.repeat_interleave(2, 1))
        assert_close(out[request], full)


@pytest.mark.parametrize("own", [True, False], ids=["chunk", "rows"])
@pytest.mark.parametrize("kind", ["whole", "last-token", "part", "every-other-empty"])
@pytest.mark.parametrize("shape", SHAPES[:6], ids=str)
def test_prefill_from_rows(shape, kind, own):
    case = build_case(shape)
    coded = Coded.of(case, "model")
    chunks = chunk_lengths(shape.seq_lens, kind)
    query, starts, chunk = some_chunks(case, chunks)
    result = prefill(coded, query, starts, chunk if own else None)
    assert_chunks(case, query, starts.tolist(), result)


def test_prefill_from_int8_rows():
    """The context as the rows say it, the chunk itself as it is."""
    shape = Shape((70, 33), 2, 2, 80, 32, 8)
    case = build_case(shape)
    coded = Coded.of(case, "int8")
    query, starts, chunk = some_chunks(case, [20, 33])
    result = prefill(coded, query, starts, chunk)
    keys, values = coded.row_kv(0)
    rotation = hadamard(80)
    restored = torch.stack(
        [
            keys[:, head] @ rotation * coded.stats.deviation[head].double()
            + coded.stats.mean[head].double()
            for head in range(2)
        ],
        1,
    )
    for source, true in ((restored, case.keys[0]), (values, case.values[0])):
        source[50:] = true[50:].double()
    scores = torch.einsum("nhd,thd->hnt", query[:20].double(), restored.repeat_interleave(2, 1))
    ahead = torch.arange(70) > torch.arange(50, 70)[:, None]
    weights = (scores * case.scale).masked_fill(ahead, -torch.inf).softmax(-1)
    expected = torch.einsum("hnt,thd->nhd", weights, values.repeat_interleave(2, 1))
    assert_close(result[:20], expected)


def some_chunks(case, lengths):
    """Queries of chunks, where they begin, and the K and V of their tokens."""
    shape = case.shape
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    generator = torch.Generator().manual_seed(7)
    query = torch.randn((int(starts[-1]), shape.num_heads, shape.head_size), generator=generator)
    own = [
        torch.cat([x[len(x) - n :] for x, n in zip(kept, lengths, strict=True)])
        for kept in (case.keys, case.values)
    ]
    return query, starts, (own[0], own[1])


def prefill(coded, query, starts, chunk):
    case = coded.case
    return attend_full_rows(
        query, coded.host_rows, coded.row, coded.stats, case.shape.page_tokens, chunk,
        case.block_table, starts, case.seq_lens, case.scale,
    )  # fmt: skip


def rotated(bias: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A bias of K under rotary embedding: [tokens, D]."""
    half = len(bias) // 2
    angles = positions[:, None] / 100_000.0 ** (torch.arange(half) / half)
    turned = torch.cat((-bias[half:], bias[:half]))
    return bias * angles.cos().repeat(1, 2) + turned * angles.sin().repeat(1, 2)


@pytest.mark.parametrize(
    "channels", [(), (1, 3), (30, 28), (1, 30)], ids=["none", "fast", "slow", "both"]
)
def test_outliers_that_move_with_position(channels):
    """Channels 50 times the rest. What the estimates select holds 95% of the mass of what exact K
    selects; constants come from the first 512 tokens, as from another text."""
    shape, outlier = Shape((2048,), 1, 3, 64, 32, 8), torch.zeros(64)
    outlier[list(channels)] = 50.0
    case = build_case(shape, sharpness=4.0)
    key = case.keys[0] + rotated(outlier, torch.arange(2048.0))[:, None]
    # A query that saw as much of these channels as of the others would see nothing else.
    seen = torch.ones(64)
    seen[[*channels, *(channel + 32 for channel in channels)]] = 0.02
    query = case.query * seen
    constants = KStats(key[:512].mean(0), key[:512].std(0))
    exact = (torch.einsum("hd,td->ht", query[0], key[:, 0]) * case.scale).softmax(-1)
    masses = exact.unflatten(-1, (-1, 8)).sum(-1)
    wanted = masses.amax(0) >= 0.001
    assert 20 < int(wanted.sum()) < 200

    def agreement(stats: KStats) -> float:
        row = RowFormat(8, 64, torch.float32, 4)
        pages = torch.full((case.k_pages.shape[0], 1, 32 * 36), 0xFF, dtype=torch.uint8)
        rows = torch.full((pages.shape[0] * 4, row.bytes), 0xFF, dtype=torch.uint8)
        write_codes_and_rows(key, key, slots_of(case), pages, rows, row, stats)
        lse = score_codes(
            query, pages, stats, case.block_table, case.seq_lens, case.scale, 8, shape.max_blocks
        )
        found = lse[0].softmax(-1).amax(0) >= 0.001
        kept = (masses * (wanted & found)).sum(-1) / (masses * wanted).sum(-1)
        return float(kept.mean())

    assert agreement(constants) >= 0.95
    if channels:
        # The case is one that the constants are needed for.
        assert agreement(KStats(torch.zeros(1, 64), torch.ones(1, 64))) < 0.95
