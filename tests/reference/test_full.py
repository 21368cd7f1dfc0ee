# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.conftest import TOLERANCES, assert_close
from tests.shapes import ODD_SHAPES, Case, Shape, build_case
from vllm_kcache.reference import full
from vllm_kcache.reference.full import attend_full

PADDING_QUERIES = 3


def chunk_lengths(seq_lens: tuple[int, ...], kind: str) -> list[int]:
    """Tokens of each chunk: a whole prompt, its last token, or a part that ends it."""
    lengths = {
        "whole": lambda request, tokens: tokens,
        "last-token": lambda request, tokens: min(tokens, 1),
        "part": lambda request, tokens: tokens - tokens * (request + 1) // (request + 3),
        "every-other-empty": lambda request, tokens: tokens // 2 if request % 2 else 0,
    }[kind]
    return [lengths(request, tokens) for request, tokens in enumerate(seq_lens)]


def run(case: Case, chunks: list[int], out: torch.Tensor | None = None):
    shape = case.shape
    starts = torch.tensor([0, *chunks]).cumsum(0).to(torch.int32)
    generator = torch.Generator().manual_seed(7)
    size = (int(starts[-1]) + PADDING_QUERIES, shape.num_heads, shape.head_size)
    query = torch.randn(size, generator=generator).to(case.query.dtype)
    result = attend_full(
        query, case.k_pages, case.v_pool, case.block_table, starts, case.seq_lens, case.scale, out
    )
    return query, starts.tolist(), result


def expected_chunk(case: Case, request: int, query: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last tokens of a request, with every weight written out."""
    values = case.values[request].double().repeat_interleave(case.shape.group_size, 1)
    return torch.einsum("hnt,thd->nhd", chunk_scores(case, request, query).softmax(-1), values)


def chunk_scores(case: Case, request: int, query: torch.Tensor) -> torch.Tensor:
    """Scaled scores of the last tokens of a request, -inf ahead of each: [Hq, n, tokens]."""
    tokens, group = case.shape.seq_lens[request], case.shape.group_size
    keys = case.keys[request].double().repeat_interleave(group, 1)
    scores = torch.einsum("nhd,thd->hnt", query.double(), keys) * case.scale
    positions = torch.arange(tokens - query.shape[0], tokens)
    ahead = torch.arange(tokens) > positions[:, None]
    return scores.masked_fill(ahead, -torch.inf)


def assert_chunks(case: Case, query, starts, result):
    assert result.dtype == case.query.dtype
    for request in range(len(case.shape.seq_lens)):
        chunk = slice(starts[request], starts[request + 1])
        if chunk.stop > chunk.start:
            assert_close(result[chunk], expected_chunk(case, request, query[chunk]))


@pytest.mark.parametrize("kind", ["whole", "last-token", "part", "every-other-empty"])
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_ragged_batches(shape, kind):
    case = build_case(shape)
    query, starts, result = run(case, chunk_lengths(shape.seq_lens, kind))
    assert_chunks(case, query, starts, result)
    assert not result[starts[-1] :].any()


@pytest.mark.parametrize("piece_tokens", [32, 4096])
@pytest.mark.parametrize("kind", ["whole", "part"])
def test_sinks_are_a_term_of_the_softmax(monkeypatch, kind, piece_tokens):
    shape = Shape((150, 9, 33), 2, 3, 64, 16, 8)
    monkeypatch.setattr(full, "CONTEXT_PIECE_TOKENS", piece_tokens)
    case, sinks = build_case(shape), torch.linspace(-3, 6, 6)
    query, starts, _ = run(case, chunk_lengths(shape.seq_lens, kind))
    result = attend_full(
        query, case.k_pages, case.v_pool, case.block_table,
        torch.tensor(starts, dtype=torch.int32), case.seq_lens, case.scale, sinks=sinks,
    )  # fmt: skip
    for request, tokens in enumerate(shape.seq_lens):
        chunk = slice(starts[request], starts[request + 1])
        scores = chunk_scores(case, request, query[chunk])
        term = sinks.double()[:, None, None].expand(-1, scores.shape[1], 1)
        weights = torch.cat([scores, term], -1).softmax(-1)[..., :tokens]
        values = case.values[request].double().repeat_interleave(shape.group_size, 1)
        assert_close(result[chunk], torch.einsum("hnt,thd->nhd", weights, values))


@pytest.mark.parametrize("piece_tokens", [1, 32, 64])
@pytest.mark.parametrize("kind", ["last-token", "part"])
def test_context_in_pieces(monkeypatch, kind, piece_tokens):
    shape = Shape((300, 129, 33, 64), 2, 3, 64, 32, 8)
    monkeypatch.setattr(full, "CONTEXT_PIECE_TOKENS", piece_tokens)
    case = build_case(shape, strided=True)
    assert_chunks(case, *run(case, chunk_lengths(shape.seq_lens, kind)))


@pytest.mark.parametrize("kind", ["whole", "part"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_dtypes(monkeypatch, dtype, kind):
    monkeypatch.setattr(full, "CONTEXT_PIECE_TOKENS", 32)
    shape = Shape((150, 9), 2, 3, 80, 16, 8)
    case = build_case(shape, dtype)
    assert_chunks(case, *run(case, chunk_lengths(shape.seq_lens, kind)))


def test_out_keeps_what_no_chunk_writes():
    shape = Shape((40, 17), 2, 2, 64, 16, 8)
    case = build_case(shape)
    out = torch.full((57 + PADDING_QUERIES, 4, 64), torch.nan)
    query, starts, result = run(case, [40, 17], out)
    assert result is out
    assert_chunks(case, query, starts, result)
    assert bool(out[57:].isnan().all())


def test_chunk_longer_than_its_request():
    case = build_case(Shape((40,), 1, 1, 64, 16, 8))
    with pytest.raises(ValueError, match="request 0 has 41 query tokens; must be at most its seq"):
        run(case, [41])


def test_scratch_does_not_grow_with_the_context(monkeypatch):
    largest = {}
    for tokens in (600, 2400):
        gathered = []
        gather = full._gather_tokens

        def recording(*args, gather=gather, gathered=gathered):
            gathered.append(gather(*args))
            return gathered[-1]

        with monkeypatch.context() as patch:
            patch.setattr(full, "CONTEXT_PIECE_TOKENS", 128)
            patch.setattr(full, "_gather_tokens", recording)
            case = build_case(Shape((tokens,), 1, 1, 64, 16, 8))
            assert_chunks(case, *run(case, [50]))
        assert len(gathered) == 1 + -(-(tokens - 50) // 128)
        largest[tokens] = max(x.numel() for piece in gathered for x in piece)
    assert largest[600] == largest[2400] == 128 * 64
