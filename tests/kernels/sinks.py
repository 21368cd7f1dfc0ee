# SPDX-License-Identifier: Apache-2.0
"""Decode steps with K codes in the pages and learned sinks, against their definition.

`python -m tests.csrc.interpreted LIBRARY tests.kernels.sinks` runs them without a GPU. Steps with K
itself are in split_cache.py.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from tests.conftest import assert_close
from tests.kernels.attend_rows import dropped_by
from tests.kernels.layers import code_layer_of
from tests.reference.coded import Coded
from tests.shapes import Shape, build_case
from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.kernels.decode import decode_step
from vllm_kcache.kernels.self_check import check_kernels
from vllm_kcache.reference.attend import attend_rows
from vllm_kcache.reference.fetch import fetch_rows
from vllm_kcache.reference.select import request_lse
from vllm_kcache.reference.sinks import refine_lse, share_of_tokens
from vllm_kcache.types import Selected, Selection

# A group of gpt-oss; lists of several parts, an empty one and one of a single chunk.
SHAPES = (Shape((300, 0, 33), 2, 8, 64, 16, 8), Shape((37, 1, 0, 64), 2, 2, 64, 16, 8))
RULES = (
    Selection(None, None, 1, 1, "sum"),
    Selection(3, None, 1, 1, "sum"),
    Selection(None, None, 1, 8, "max", 0.02),
    Selection(None, 0.7, 0, 1, "max"),
)
# What rows hold, the model's dtype, and how sharp attention is. At 60 the mass of a head may lie in
# blocks that others of its group did not want; the weights of estimates that are so far off leave
# float16.
KINDS = (
    ("model", torch.float32, 3.0),
    ("model", torch.float32, 60.0),
    ("int8", torch.float32, 3.0),
    ("int8", torch.float16, 3.0),
    ("int8", torch.bfloat16, 3.0),
)
GPU_KINDS = (KINDS[0], *KINDS[2:])
SOFT_CAPS = (None, 4.0)


def check(
    shape: Shape, rule: Selection, host_dtype: str, dtype: torch.dtype, sharpness: float,
    soft_cap: float | None, device: str = "cpu",
) -> None:  # fmt: skip
    """A step: the sinks have from nearly nothing to nearly all of the mass."""
    case = build_case(shape, dtype, sharpness=sharpness)
    coded, tokens = Coded.of(case, host_dtype), shape.v_block_tokens
    tail = "renormalize" if rule.clip is None else "clip"
    layer = code_layer_of(coded, rule, tail, 64, device)
    sinks = torch.linspace(-6, 3 * sharpness, shape.num_heads).to(dtype)
    batch = replace(layer.batch, sinks=sinks.to(device), soft_cap=soft_cap)
    out = torch.full_like(batch.query, torch.nan)
    decode_step(layer.view, layer.workspace, batch, out)
    # By the estimates and the lists of the kernels, which have tests of their own.
    lists = layer.workspace.views(layer.view, batch)
    exists = torch.arange(shape.max_blocks) * tokens < case.seq_lens[:, None]
    block_lse = lists.block_lse.cpu().masked_fill(~exists[:, None], -torch.inf)
    counts, mass = lists.selected.counts.cpu(), lists.selected.mass.cpu()
    beyond = torch.arange(lists.rows.shape[2]) >= counts[..., None]
    blocks = lists.selected.blocks.cpu().masked_fill(beyond, -1)
    lse = request_lse(block_lse, case.seq_lens, tokens)
    chosen = Selected(blocks, counts, mass, lse)
    chosen = replace(chosen, dropped=dropped_by(block_lse, lse, chosen))
    fetched = fetch_rows(
        chosen, case.block_table, coded.host_rows, shape.num_kv_heads, shape.page_tokens // tokens
    )
    refined = torch.empty(*case.query.shape[:2], chosen.blocks.shape[2])
    expected = attend_rows(
        case.query.float(), coded.host_rows, coded.row, coded.stats, fetched, chosen,
        case.seq_lens, case.scale, tail, clip=rule.clips(case.seq_lens), refined=refined,
        soft_cap=soft_cap,
    )  # fmt: skip
    lse = request_lse(refine_lse(block_lse, refined, chosen), case.seq_lens, tokens)
    expected = expected * share_of_tokens(lse, sinks)[..., None]
    assert_close(out.cpu().float(), expected, dtype)
    assert not layer.workspace.arrivals.any()


def main() -> None:
    """Any difference raises."""
    cases = [*itertools.product(SHAPES[:1], RULES, KINDS, SOFT_CAPS[:1])]
    cases += itertools.product(SHAPES[1:], RULES[:1], KINDS, SOFT_CAPS)
    for shape, rule, kind, soft_cap in cases:
        check(shape, rule, *kind, soft_cap)
    row = CacheShape(1, 4, 2, 64, 16, 8, torch.float16, 4, "int8")
    for soft_cap in SOFT_CAPS:
        check_kernels(row, RULES[2], "clip", "cpu", has_sinks=True, soft_cap=soft_cap)
    print(f"{len(cases)} steps and {len(SOFT_CAPS)} checks with sinks are as defined")


if __name__ == "__main__":
    main()
