# SPDX-License-Identifier: Apache-2.0
"""Whole decode steps with K codes in the pages, against their definition; the check at start, too.

`python -m tests.csrc.interpreted LIBRARY tests.kernels.code_steps` runs them without a GPU.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conftest import TOLERANCES, assert_close
from tests.csrc.coded_layer import as_rounded, in_digits
from tests.kernels.layers import Layer, code_layer_of
from tests.reference.coded import Coded, slots_of
from tests.shapes import Shape, build_case
from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.cache.hot_cache import EPOCH, ESTIMATE_ERROR_EDGES
from vllm_kcache.kernels import attend
from vllm_kcache.kernels.attend_plan import attend_config, on_tensor_cores
from vllm_kcache.kernels.decode import decode_step
from vllm_kcache.kernels.rows import write_rows
from vllm_kcache.kernels.self_check import check_kernels
from vllm_kcache.kernels.workspace import DecodeBatch, Followers
from vllm_kcache.reference.attend import attend_rows
from vllm_kcache.reference.codes import read_codes, rotate, transform_query
from vllm_kcache.reference.fetch import fetch_rows
from vllm_kcache.reference.score import score_transformed
from vllm_kcache.reference.select import select_blocks
from vllm_kcache.types import Selection

SHAPES = (
    Shape((37, 1, 0, 64), 2, 2, 64, 16, 8),
    Shape((50, 7), 1, 5, 80, 32, 16),
    Shape((90, 33), 2, 8, 128, 16, 8),
    Shape((21, 5), 2, 4, 256, 16, 4),
)
RULES = (
    Selection(None, None, 1, 1, "sum"),
    Selection(None, None, 1, 8, "max", 0.05),
    Selection(3, None, 1, 1, "sum"),
    Selection(None, None, 1, 8, "max", 0.05, 20),
    Selection(None, 0.7, 0, 1, "max"),
)
# A list of several chunks, an empty one and one of a single chunk; with the last rule two rows for
# each query head.
ESTIMATED = Shape((300, 0, 33), 1, 3, 64, 16, 8)
# Of the scores of a case it bends most.
SOFT_CAP = 4.0
_THRESHOLD = Selection(None, None, 1, 8, "max", 0.002)
ESTIMATE_CASES = (
    ("model", RULES[0], torch.float32, None),
    ("model", RULES[2], torch.float32, SOFT_CAP),
    ("int8", _THRESHOLD, torch.float32, None),
    ("int8", _THRESHOLD, torch.bfloat16, None),
    ("int8", _THRESHOLD, torch.bfloat16, SOFT_CAP),
)
# And a first epoch, near which as many numbers are drawn as usual.
HOW_OFTEN_CASES = (("model", torch.float32, 500), ("int8", torch.bfloat16, 700))
ESTIMATES_EVERY = attend.ESTIMATES_EVERY


def check_step(
    shape: Shape, host_dtype: str, rule: Selection, num_slots: int, device: str = "cpu",
    dtype: torch.dtype = torch.float32, soft_cap: float | None = None,
) -> None:  # fmt: skip
    """Twice over one hot cache: misses first, hits after, the same answer."""
    case = build_case(shape, dtype, sharpness=3.0)
    coded, tokens = Coded.of(case, host_dtype), shape.v_block_tokens
    tail = "renormalize" if rule.clip is None else "clip"
    queries, biases = transform_query(case.query.double(), coded.stats)
    relative, absolute = TOLERANCES[torch.float32]
    layer = code_layer_of(coded, rule, tail, num_slots, device)
    batch = replace(layer.batch, soft_cap=soft_cap)
    for number in (1, 2):
        out = torch.full_like(batch.query, torch.nan)
        decode_step(layer.view, layer.workspace, batch, out)
        lists = layer.workspace.views(layer.view, batch)
        transformed = layer.workspace.code_query[: queries.numel()].view_as(queries)
        assert_close(
            transformed.cpu()[case.seq_lens > 0], queries[case.seq_lens > 0], torch.float32
        )
        block_lse = score_transformed(
            as_rounded(transformed), biases, coded.code_pages, case.block_table, case.seq_lens,
            case.scale, tokens, shape.max_blocks, soft_cap=soft_cap,
        )  # fmt: skip
        slack = absolute + relative * block_lse.abs()
        exists = block_lse.isfinite()
        ours = lists.block_lse.cpu()
        assert bool(((ours - block_lse).abs() <= slack)[exists].all())
        # The lists of the estimates as the kernel has them: of two that are alike either may win.
        chosen = select_blocks(
            ours.masked_fill(~exists, -torch.inf), case.seq_lens, shape.num_kv_heads, tokens, rule,
            estimated=True,
        )  # fmt: skip
        counts = lists.selected.counts.cpu()
        assert torch.equal(counts, chosen.counts)
        fetched = fetch_rows(
            chosen, case.block_table, coded.host_rows, shape.num_kv_heads,
            shape.page_tokens // tokens,
        )  # fmt: skip
        expected = attend_rows(
            attended_query(coded, dtype), coded.host_rows, coded.row, coded.stats, fetched, chosen,
            case.seq_lens, case.scale, tail, clip=rule.clips(case.seq_lens), soft_cap=soft_cap,
        )  # fmt: skip
        assert_close(out.cpu(), expected)
        assert int(layer.cache.state[EPOCH]) == number
        assert not layer.workspace.signals.any()
    counted, total = layer.cache.read_counters(), int(chosen.counts.sum())
    assert counted.selected == counted.hits + counted.misses + counted.direct == 2 * total


def attended_query(coded: Coded, dtype: torch.dtype) -> torch.Tensor:
    """The query that attention over the rows has: on tensor cores q' has 15 bits."""
    query = coded.case.query
    if coded.row.host_dtype == "model" or dtype == torch.float32:
        return query
    transformed, _ = transform_query(query.double(), coded.stats)
    grouped = rotate(in_digits(transformed)).unflatten(1, (len(coded.stats.mean), -1))
    return (grouped / coded.stats.deviation.double()[:, None]).flatten(1, 2)


def check_write(shape: Shape, host_dtype: str, device: str = "cpu") -> None:
    """Tokens that go through the kernel are where the definition puts them; a copy follows."""
    coded = Coded.of(build_case(shape), host_dtype)
    case = coded.case
    layer = code_layer_of(coded, RULES[0], "renormalize", 256, device)
    out = torch.empty_like(layer.batch.query)
    decode_step(layer.view, layer.workspace, layer.batch, out)
    before = out.clone()
    if device != "cpu":
        torch.cuda.synchronize()  # rows that the host overwrites next have been read
    layer.view.k_pages.fill_(255)
    layer.view.host_rows.fill_(255)
    layer.cache.slots.fill_(255)
    keys, values = (torch.cat(x).to(device) for x in (case.keys, case.values))
    write_rows(layer.view, keys, values, slots_of(case).to(device))
    if device != "cpu":
        torch.cuda.synchronize()
    ours, expected = (
        read_codes(x.cpu(), shape.head_size) for x in (layer.view.code_pages, coded.code_pages)
    )
    there = expected.isfinite()
    assert torch.equal(there, ours.isfinite())
    off = (ours[there] - expected[there]).abs()
    assert float(off.gt(1e-3).float().mean()) < 0.01
    decode_step(layer.view, layer.workspace, layer.batch, out)
    assert torch.allclose(out, before, rtol=2e-2, atol=2e-2), "rows or copies are not as before"


def check_estimate_errors(
    shape: Shape, host_dtype: str, rule: Selection, dtype: torch.dtype, soft_cap: float | None,
    device: str = "cpu",
) -> None:  # fmt: skip
    """Where every step looks at its estimates, it counts one chunk of one list by their errors; in
    time each chunk of each list has its turn."""
    coded = Coded.of(build_case(shape, dtype, sharpness=3.0), host_dtype)
    case, tokens, group = coded.case, shape.v_block_tokens, shape.group_size
    tail = "renormalize" if rule.clip is None else "clip"
    layer = code_layer_of(coded, rule, tail, 64, device)
    batch = replace(layer.batch, soft_cap=soft_cap)
    out = torch.empty_like(batch.query)
    decode_step(layer.view, layer.workspace, batch, out)
    lists = layer.workspace.views(layer.view, batch)
    estimates = lists.block_lse.cpu()
    exists = torch.arange(shape.max_blocks) < -(-case.seq_lens[:, None] // tokens)
    chosen = select_blocks(
        estimates.masked_fill(~exists[:, None], -torch.inf), case.seq_lens, shape.num_kv_heads,
        tokens, rule, estimated=True,
    )  # fmt: skip
    fetched = fetch_rows(
        chosen, case.block_table, coded.host_rows, shape.num_kv_heads, shape.page_tokens // tokens
    )
    refined = torch.empty(*case.query.shape[:2], chosen.blocks.shape[2])
    attend_rows(
        case.query, coded.host_rows, coded.row, coded.stats, fetched, chosen, case.seq_lens,
        case.scale, tail, clip=rule.clips(case.seq_lens), refined=refined, soft_cap=soft_cap,
    )  # fmt: skip
    # How many errors are at most each edge: roundings decide about those within `slack` of it.
    slack = 1e-3 if host_dtype == "model" else 2e-2
    edges = torch.tensor(ESTIMATE_ERROR_EDGES)[:, None]
    step = attend_config(layer.view.shape, chosen.counts.numel(), lists.rows.shape[2]).chunk_blocks
    if on_tensor_cores(layer.view.shape):
        step = 32 // tokens
    expected = {}
    for request, head in itertools.product(range(len(shape.seq_lens)), range(shape.num_kv_heads)):
        count = int(chosen.counts[request, head])
        for first in range(0, max(1, count), step):
            part = slice(first, min(first + step, count))
            heads = slice(head * group, (head + 1) * group)
            blocks = chosen.blocks[request, head, part].long()
            errors = estimates[request, heads][:, blocks] - refined[request, heads, part]
            errors = errors.abs().flatten()
            least, most = ((errors <= edges + off).sum(1) for off in (-slack, slack))
            expected[request, head, first] = least, most
    check_counted(layer, batch, out, expected, 10 * len(expected))


def check_counted(
    layer: Layer, batch: DecodeBatch, out: torch.Tensor,
    expected: dict[Any, tuple[torch.Tensor, torch.Tensor]], steps: int,
) -> None:  # fmt: skip
    """What each of some steps counts of its estimates is between the least and the most of one of
    those expected, and each of those comes up."""
    seen, before = set(), torch.tensor(layer.cache.read_counters().estimate_errors)
    for _ in range(steps):
        decode_step(layer.view, layer.workspace, batch, out)
        after = torch.tensor(layer.cache.read_counters().estimate_errors)
        found = (after - before).cumsum(0)
        these = {
            key for key, (least, most) in expected.items()
            if bool(((least <= found) & (found <= most)).all())
        }  # fmt: skip
        assert these, (found, expected)
        seen |= these
        before = after
    assert seen == set(expected)


def check_how_often(host_dtype: str, dtype: torch.dtype, first: int, device: str = "cpu") -> None:
    """Few steps look at their estimates, and not the same ones of a layer and of its neighbour."""
    coded = Coded.of(build_case(Shape((9,), 1, 1, 64, 16, 8), dtype), host_dtype)
    layer = code_layer_of(coded, RULES[0], "renormalize", 4, device)
    out, looked = torch.empty_like(layer.batch.query), []
    layer.cache.state[EPOCH] = first
    for step in range(first, first + 2 * ESTIMATES_EVERY):
        before = sum(layer.cache.read_counters().estimate_errors)
        decode_step(layer.view, layer.workspace, layer.batch, out)
        counted = sum(layer.cache.read_counters().estimate_errors) - before
        assert counted in (0, 2)
        looked += [step] if counted else []
    assert 1 <= len(looked) <= 10
    assert len({step % 8 for step in looked}) > 1


def check_refused() -> None:
    """Followers wait for what the kernel that scores codes does not say."""
    layer = code_layer_of(Coded.of(build_case(SHAPES[0]), "model"), RULES[0], "renormalize", 64)
    out = torch.empty_like(layer.batch.query)
    with pytest.raises(ValueError, match="followers: scores from K codes have none"):
        decode_step(layer.view, layer.workspace, layer.batch, out, followers=Followers(3, 1))


def main() -> None:
    """Every combination; any difference raises."""
    cases = 0
    for shape, host_dtype in itertools.product(SHAPES, ("model", "int8")):
        for rule in RULES:
            check_step(shape, host_dtype, rule, 256)
            cases += 1
        check_step(shape, host_dtype, RULES[1], 0)
        for dtype in (torch.bfloat16, torch.float16) if host_dtype == "int8" else ():
            check_step(shape, host_dtype, RULES[3], 256, dtype=dtype)
            check_step(shape, host_dtype, RULES[3], 256, dtype=dtype, soft_cap=SOFT_CAP)
            cases += 2
        check_step(shape, host_dtype, RULES[0], 256, soft_cap=SOFT_CAP)
        check_step(shape, host_dtype, RULES[1], 3)
        check_write(shape, host_dtype)
        cases += 4
    for kernel in HOW_OFTEN_CASES:
        check_how_often(*kernel)
    check_refused()
    attend.ESTIMATES_EVERY = 1
    for case in ESTIMATE_CASES:
        check_estimate_errors(ESTIMATED, *case)
        cases += 1
    layers = (
        (CacheShape(1, 3, 1, 64, 16, 8, torch.float32, 4, "model"), RULES[0], "renormalize"),
        (CacheShape(1, 4, 2, 128, 16, 8, torch.float16, 4, "int8"), RULES[1], "clip"),
    )
    for layer in layers:
        for decode_tokens in (1, 3):
            # One of the layers has learned sinks, the other a cap on scores.
            special = layer[0].host_dtype == "model"
            check_kernels(
                *layer, "cpu", decode_tokens, has_sinks=special,
                soft_cap=None if special else SOFT_CAP,
            )  # fmt: skip
    print(f"{cases} steps with codes and {len(layers)} checks are as defined")


if __name__ == "__main__":
    main()
