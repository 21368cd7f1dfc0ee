# SPDX-License-Identifier: Apache-2.0
"""Attention over rows of K and V, as the model's dtype and as int8, against its definition.

`python -m tests.csrc.interpreted LIBRARY tests.kernels.attend_rows` runs it without a GPU.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import torch

from tests.conftest import assert_close
from tests.kernels.layers import code_layer_of
from tests.reference.coded import Coded
from tests.reference.test_fetch import some_blocks
from tests.shapes import Case, Shape, build_case
from vllm_kcache.kernels.attend import attend_blocks
from vllm_kcache.kernels.attend_plan import AttendConfig, RowsConfig, on_tensor_cores
from vllm_kcache.reference.attend import attend_rows
from vllm_kcache.reference.codes import transform_query
from vllm_kcache.reference.fetch import fetch_rows
from vllm_kcache.reference.paging import physical_v_blocks
from vllm_kcache.reference.score import score_codes
from vllm_kcache.reference.select import request_lse
from vllm_kcache.reference.sinks import refine_lse, share_of_tokens
from vllm_kcache.types import Selected, Selection

SHAPES = (
    Shape((33, 0, 20), 3, 3, 64, 32, 8),
    Shape((65, 31, 7), 2, 2, 80, 32, 4),
    Shape((70, 5), 2, 8, 128, 16, 8),
)
# For tensor cores also all sizes of a head and of a block, and a group of more heads than a tile.
TILED_SHAPES = (
    *SHAPES,
    Shape((50, 64), 1, 4, 96, 32, 32),
    Shape((0, 17, 70), 2, 12, 128, 32, 16),
    Shape((21, 5), 2, 4, 256, 16, 2),
    Shape((65, 31), 2, 2, 80, 32, 1),
    # Lists of several parts beside some of one.
    Shape((1500, 0, 33, 900), 1, 4, 64, 16, 8),
)
EVERY, CLIPPED = Selection(None, None, 1, 8, "sum"), Selection(None, None, 1, 8, "max", 0.02)


def dropped_by(block_lse: torch.Tensor, lse: torch.Tensor, chosen: Selected) -> torch.Tensor:
    """[B, Hq]: estimated mass of the blocks that are not in the lists."""
    group = block_lse.shape[1] // chosen.blocks.shape[1]
    masses = (block_lse - lse[..., None]).exp().nan_to_num()
    blocks = chosen.blocks.repeat_interleave(group, 1)
    taken = masses.gather(-1, blocks.clamp_min(0).long()).masked_fill(blocks < 0, 0.0)
    return (1 - taken.sum(-1)).clamp_min(0)


def check(
    shape: Shape, host_dtype: str, rule: Selection, splits: int, device: str = "cpu",
    case: Case | None = None, off: torch.Tensor | None = None, sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Half of the rows in slots in random order, the others read straight from the host.

    Args:
        off: [Hq], how far the estimates are off.
        sinks: [Hq].
    Returns:
        The output, and what it should be.
    """
    if case is None:
        case = build_case(shape, torch.float32)
    coded = Coded.of(case, host_dtype)
    tokens, chosen = shape.v_block_tokens, some_blocks(shape)
    block_lse = score_codes(
        case.query, coded.code_pages, coded.stats, case.block_table, case.seq_lens, case.scale,
        tokens, shape.max_blocks, soft_cap=soft_cap,
    )  # fmt: skip
    if off is not None:
        block_lse = block_lse + off[:, None]
    lse = block_lse.logsumexp(-1)
    dropped = dropped_by(block_lse, lse, chosen)
    chosen = replace(chosen, lse=lse, dropped=dropped)
    tail = "renormalize" if rule.clip is None else "clip"
    per_page = shape.page_tokens // tokens
    fetched = fetch_rows(chosen, case.block_table, coded.host_rows, shape.num_kv_heads, per_page)
    refined = torch.empty(*case.query.shape[:2], chosen.blocks.shape[2])
    expected = attend_rows(
        case.query, coded.host_rows, coded.row, coded.stats, fetched, chosen, case.seq_lens,
        case.scale, tail, clip=rule.clip, refined=refined, soft_cap=soft_cap,
    )  # fmt: skip
    if sinks is not None:
        known = refine_lse(block_lse, refined, chosen)
        share = share_of_tokens(request_lse(known, case.seq_lens, tokens), sinks)
        expected = (expected * share[..., None]).to(expected.dtype)
    there = len(fetched.v_rows)
    layer = code_layer_of(coded, rule, tail, max(1, there), device)
    order = torch.randperm(max(1, there))
    layer.cache.slots.fill_(255)
    layer.cache.slots[order[:there].to(device)] = fetched.v_rows.to(device)
    physical = physical_v_blocks(chosen.blocks, case.block_table, shape.num_kv_heads, per_page)
    rows = order[fetched.rows.clamp_min(0).long()].int()
    rows = torch.where(fetched.rows % 2 == 1, -2 - physical.int(), rows)
    rows = rows.masked_fill(fetched.rows < 0, -1)
    query, bias = transform_query(case.query.float(), coded.stats)
    layer.workspace.code_query[: query.numel()] = query.flatten().to(device)
    layer.workspace.code_bias[: bias.numel()] = (bias * case.scale).flatten().to(device)
    selected = Selected(
        *(part.to(device) for part in (chosen.blocks, chosen.counts, chosen.mass)),
        lse=lse.masked_fill(case.seq_lens[:, None] == 0, torch.nan).to(device),
        dropped=dropped.to(device),
    )
    out = torch.full_like(layer.batch.query, torch.nan)
    config: AttendConfig | RowsConfig = AttendConfig(max(1, 16 // tokens), splits, 4, 2)
    if on_tensor_cores(layer.view.shape):
        config = RowsConfig(splits, least_tiles=1 if splits == 5 else 3)
    at = None if sinks is None else sinks.to(device)
    batch = replace(layer.batch, sinks=at, soft_cap=soft_cap)
    attend_blocks(layer.view, batch, selected, rows.to(device), layer.workspace, out, config=config)
    assert not layer.workspace.arrivals.any()
    return out.cpu(), expected


def check_small_values(device: str = "cpu") -> None:
    """A token has nine tenths of the mass and no V; the many others have little V, which float16
    must not lose."""
    shape, tokens = Shape((1000,), 1, 4, 64, 16, 8), 1000
    case = build_case(shape, torch.float16)
    keys = torch.zeros_like(case.keys[0])
    heavy = int(some_blocks(shape).blocks[0, 0, 0]) * shape.v_block_tokens
    keys[heavy] = math.log(9 * tokens) / (64 * case.scale)
    values = torch.rand_like(case.values[0]) * 0.005 + 0.005
    values[heavy] = 0.0
    case = replace(case, query=torch.ones_like(case.query), keys=(keys,), values=(values,))
    out, expected = check(shape, "int8", EVERY, 1, device, case)
    assert float(expected.min()) > 0
    assert float((out - expected).abs().max()) < 0.03 * float(expected.max())


def check_tiles(shape: Shape, device: str = "cpu") -> None:
    """Rows of int8 on tensor cores, of both dtypes of a model."""
    for dtype, rule, splits in itertools.product(
        (torch.bfloat16, torch.float16), (EVERY, CLIPPED), (2, 5, 90)
    ):
        case = build_case(shape, dtype)
        assert_close(*check(shape, "int8", rule, splits, device, case))
        # From nearly nothing to nearly all of the mass, in each dtype that a model may have.
        sinks = torch.linspace(-6, 14, shape.num_heads).to(dtype if splits == 5 else torch.float32)
        assert_close(*check(shape, "int8", rule, splits, device, case, sinks=sinks, soft_cap=2.0))


def check_ranges(factor: float, device: str = "cpu") -> None:
    """V so small, or so large, that its scale times a weight is not a float16."""
    shape = Shape((70, 5), 2, 8, 128, 16, 8)
    case = build_case(shape, torch.bfloat16)
    # Each token's V is another power of ten.
    values = tuple(
        value * factor * 10.0 ** -(torch.arange(len(value)) % 4)[:, None, None].to(value.dtype)
        for value in case.values
    )
    for rule, splits in itertools.product((EVERY, CLIPPED), (1, 3)):
        out, expected = check(shape, "int8", rule, splits, device, replace(case, values=values))
        assert float(expected.abs().max()) > 0.1 * factor
        assert_close(out / factor, expected / factor)


def check_far_estimates(device: str = "cpu") -> None:
    """The estimates of some query heads are far below the scores, and their weights many times
    those of the heads beside them, which float16 must not lose."""
    shape = Shape((70, 5), 1, 16, 128, 16, 8)
    off = torch.zeros(16)
    off[::3] = torch.tensor([-8.0, -20.0, -30.0, -40.0, -50.0, 12.0])
    case = build_case(shape, torch.bfloat16)
    for splits in (1, 3):
        assert_close(*check(shape, "int8", CLIPPED, splits, device, case, off))
        for rule in (EVERY, CLIPPED):
            sinks = torch.linspace(-6, 14, 16)
            assert_close(*check(shape, "int8", rule, splits, device, case, off, sinks))


def check_nan(host_dtype: str, rule: Selection, device: str = "cpu") -> None:
    """A query head that holds NaN answers NaN; the others what they answer without it."""
    shape = Shape((70, 33), 2, 4, 64, 16, 8)
    case = build_case(shape, torch.float16)
    query = case.query.clone()
    query[0, 1, 5] = torch.nan
    sound, _ = check(shape, host_dtype, rule, 1, device, case)
    out, _ = check(shape, host_dtype, rule, 1, device, replace(case, query=query))
    is_other = torch.ones(out.shape[:2], dtype=torch.bool)
    is_other[0, 1] = False
    assert bool(out[~is_other].isnan().all())
    assert torch.equal(out[is_other], sound[is_other])


def main() -> None:
    """Every combination; any difference raises."""
    cases = list(itertools.product(SHAPES, ("model", "int8"), (EVERY, CLIPPED), (1, 3)))
    for case in cases:
        assert_close(*check(*case))
    for shape in TILED_SHAPES:
        check_tiles(shape)
    for factor in (1e-3, 1e4):
        check_ranges(factor)
    check_small_values()
    check_far_estimates()
    for host_dtype, rule in itertools.product(("model", "int8"), (EVERY, CLIPPED)):
        check_nan(host_dtype, rule)
    print(f"{len(cases) + 24 * len(TILED_SHAPES)} lists of rows attend as defined")


if __name__ == "__main__":
    main()
