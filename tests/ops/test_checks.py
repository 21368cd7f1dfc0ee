# SPDX-License-Identifier: Apache-2.0
"""Every refusal of the ops, by its message. Each starts from arguments that are accepted."""

import re
from dataclasses import replace

import pytest
import torch

from tests.shapes import Shape, build_case
from vllm_kcache import ops
from vllm_kcache.types import Fetched, Selected, Selection

SHAPE = Shape((70, 9), 2, 3, 64, 32, 8)
CASE = build_case(SHAPE)
RULE = Selection(None, 0.9, 1, 8, "sum")
LSE = ops.score_blocks(
    CASE.query, CASE.k_pages, CASE.block_table, CASE.seq_lens, CASE.scale, 8, SHAPE.max_blocks
)
SELECTED = ops.select_blocks(LSE, CASE.seq_lens, 2, 8, RULE)
FETCHED = ops.fetch_blocks(SELECTED, CASE.block_table, CASE.v_pool, 8)
COLUMNS = SELECTED.blocks.shape[2]


def accepted(op: str) -> dict:
    paged = {"block_table": CASE.block_table, "seq_lens": CASE.seq_lens}
    score = {"query": CASE.query, "k_pages": CASE.k_pages, **paged, "scale": CASE.scale}
    return {
        "write_kv": {
            "key": torch.zeros(3, 2, 64),
            "value": torch.zeros(3, 2, 64),
            "slot_mapping": torch.tensor([0, -1, 5]),
            "k_pages": CASE.k_pages.clone(),
            "v_pool": CASE.v_pool.clone(),
        },
        "update_page_means": {
            "v_pool": CASE.v_pool,
            "slot_mapping": torch.tensor([0, -1, 5]),
            "v_page_means": torch.zeros(CASE.v_pool.shape[0], 2, 64),
        },
        "score_blocks": {**score, "v_block_tokens": 8, "max_blocks": 9},
        "select_blocks": {
            "block_lse": LSE,
            "seq_lens": CASE.seq_lens,
            "num_kv_heads": 2,
            "v_block_tokens": 8,
            "selection": RULE,
        },
        "fetch_blocks": {
            "selected": SELECTED,
            "block_table": CASE.block_table,
            "v_pool": CASE.v_pool,
            "v_block_tokens": 8,
        },
        "attend_blocks": {
            **score,
            "v_pool": CASE.v_pool,
            "fetched": FETCHED,
            "selected": SELECTED,
            "v_block_tokens": 8,
            "tail": "renormalize",
            "block_lse": LSE,
        },
    }[op]


def selected_of(columns: int, requests: int = 2, **changes) -> Selected:
    made = Selected(
        torch.zeros(requests, 2, columns, dtype=torch.int32),
        torch.zeros(requests, 2, dtype=torch.int32),
        torch.zeros(requests, 2),
    )
    return replace(made, **changes)


def fetched_of(rows=(2, 2, COLUMNS), v_rows=(50, 8, 64), **changes) -> Fetched:
    return replace(Fetched(torch.zeros(rows, dtype=torch.int32), torch.zeros(v_rows)), **changes)


PAGES = list(CASE.k_pages.shape)
TRANSPOSED = CASE.k_pages.transpose(1, 2).contiguous().transpose(1, 2)
STRIDED = torch.zeros(PAGES[0], 2, *PAGES[1:])[:, 0]
META = torch.device("meta")

REFUSED = {
    "score_blocks": [
        ({"k_pages": CASE.k_pages[0]}, "k_pages: has shape [2, 32, 64]; must be [M, Hkv"),
        ({"k_pages": CASE.k_pages.int()}, "k_pages: has dtype int32; must be bfloat16"),
        ({"k_pages": TRANSPOSED}, "(only the first dimension may be strided)"),
        ({"k_pages": CASE.k_pages[:, :0]}, "Hkv, S and D must be at least 1"),
        ({"k_pages": [1]}, "k_pages: is list; must be a torch.Tensor"),
        ({"query": CASE.query[..., :32]}, "query: has shape [2, 6, 32]; must be [B, Hq"),
        ({"query": CASE.query.half()}, "query: has dtype float16; must be float32"),
        ({"query": CASE.query[:, :5]}, "query: has 5 query heads; must be a multiple of 2"),
        ({"query": CASE.query[:, :0]}, "query: has 0 query heads; must be a multiple of 2"),
        ({"block_table": CASE.block_table[:1]}, "block_table: has shape [1, 5]; must be"),
        ({"block_table": CASE.block_table.long()}, "block_table: has dtype int64; must"),
        ({"seq_lens": CASE.seq_lens[:1]}, "seq_lens: has shape [1]; must be [B=2]"),
        ({"seq_lens": CASE.seq_lens.long()}, "seq_lens: has dtype int64; must be int32"),
        ({"v_block_tokens": 12}, "v_block_tokens=12: must be a power of two"),
        ({"v_block_tokens": 0}, "v_block_tokens=0: must be a power of two"),
        ({"v_block_tokens": 64}, "v_block_tokens=64: must divide the 32 tokens of a K"),
        ({"max_blocks": -1}, "max_blocks=-1: must be at least 0"),
        ({"out": torch.zeros(2, 6, 8)}, "out: has shape [2, 6, 8]; must be [B=2, Hq=6, P=9]"),
        ({"out": torch.zeros(2, 6, 9).double()}, "out: has dtype float64; must be float32"),
    ],
    "write_kv": [
        ({"v_pool": CASE.v_pool[1:]}, f"must be that of k_pages, {PAGES}"),
        ({"v_pool": CASE.v_pool.double()}, "v_pool: has dtype torch.float64; must be that"),
        ({"v_pool": STRIDED}, "v_pool: has strides [8192, 2048, 64, 1]; must be contiguous"),
        ({"v_pool": CASE.v_pool.to(META)}, "v_pool: lies on meta; must be on cpu"),
        ({"key": torch.zeros(4, 2, 64)}, "key: has shape [4, 2, 64]; must be [Tk=3, Hkv=2"),
        ({"value": torch.zeros(3, 2, 80)}, "value: has shape [3, 2, 80]; must be [Tk=3"),
        ({"value": torch.zeros(3, 2, 64).half()}, "value: has dtype float16; must be float32"),
        ({"slot_mapping": torch.zeros(3)}, "slot_mapping: has dtype float32; must be int64"),
        ({"slot_mapping": torch.zeros(3, device=META).int()}, "slot_mapping: lies on meta"),
    ],
    "fetch_blocks": [
        ({"v_pool": STRIDED}, "v_pool: has strides"),
        ({"selected": selected_of(3, 1)}, "selected.blocks: has shape [1, 2, 3]; must be"),
        ({"block_table": CASE.block_table.long()}, "block_table: has dtype int64; must be"),
        ({"v_block_tokens": 64}, "v_block_tokens=64: must divide the 32 tokens"),
        ({"out": fetched_of(rows=(2, 2, 1))}, "out.rows: has shape [2, 2, 1]; must be"),
        ({"out": fetched_of(v_rows=(50, 4, 64))}, "out.v_rows: has shape [50, 4, 64]; must"),
        ({"out": fetched_of(v_rows=(50, 8, 32))}, "out.v_rows: has shape [50, 8, 32]; must"),
    ],
    "update_page_means": [
        ({"v_page_means": torch.zeros(1, 2, 64)}, "v_page_means: has shape [1, 2"),
        ({"v_page_means": torch.zeros(PAGES[0], 2, 64).half()}, "must be float32"),
        ({"v_pool": STRIDED}, "v_pool: has strides"),
    ],
    "select_blocks": [
        ({"block_lse": LSE[0]}, "block_lse: has shape [6, 9]; must be [B=2, Hq, P]"),
        ({"block_lse": LSE.half()}, "block_lse: has dtype float16; must be float32"),
        ({"num_kv_heads": 0}, "num_kv_heads=0: must be at least 1"),
        ({"num_kv_heads": 4}, "block_lse: has 6 query heads; must be a multiple of 4"),
        ({"seq_lens": CASE.seq_lens.float()}, "seq_lens: has dtype float32; must be int"),
        ({"v_block_tokens": 6}, "v_block_tokens=6: must be a power of two"),
        ({"selection": replace(RULE, combine="mean")}, "selection.combine='mean': must"),
        ({"selection": replace(RULE, coverage=0.0)}, "selection.coverage=0.0: must be gr"),
        ({"selection": replace(RULE, coverage=1.1)}, "selection.coverage=1.1: must be gr"),
        ({"selection": replace(RULE, coverage=None, mass_threshold=0.0)}, "mass_threshold=0.0: "),
        ({"selection": replace(RULE, coverage=0.5, mass_threshold=0.1)}, "0.1: not together with"),
        ({"selection": replace(RULE, sink_blocks=-1)}, "selection.sink_blocks=-1: must"),
        ({"selection": replace(RULE, recent_tokens=0)}, "selection.recent_tokens=0: must"),
        ({"selection": replace(RULE, top_n=2)}, "selection.top_n=2: must be at least 3"),
        ({"out": selected_of(8)}, "out.blocks: has N=8 columns; must have at least 9"),
        ({"selection": replace(RULE, top_n=4), "out": selected_of(3)}, "at least 4, or a"),
        ({"out": selected_of(9, 1)}, "out.blocks: has shape [1, 2, 9]; must be [B=2, Hkv"),
        ({"out": selected_of(9, counts=torch.zeros(2, 2))}, "out.counts: has dtype float"),
        ({"out": selected_of(9, mass=torch.zeros(2, 2).double())}, "out.mass: has dtype"),
    ],
    "attend_blocks": [
        ({"query": CASE.query[:, :4]}, "block_lse: has shape [2, 6, 9]; must be [B=2, Hq=4"),
        ({"v_pool": CASE.v_pool[1:]}, "v_pool: has shape"),
        ({"block_lse": LSE.double()}, "block_lse: has dtype float64; must be float32"),
        ({"selected": selected_of(COLUMNS, 1)}, "selected.blocks: has shape [1, 2"),
        ({"fetched": fetched_of(rows=(2, 2, 1))}, "fetched.rows: has shape [2, 2, 1]"),
        ({"fetched": fetched_of(v_rows=(5, 8, 32))}, "fetched.v_rows: has shape [5, 8, 32"),
        ({"v_block_tokens": 16}, "fetched.v_rows: has shape"),
        ({"tail": "none"}, "tail='none': must be \"renormalize\", \"clip\", \"drop\" or"),
        ({"tail": "clip"}, 'clip=None: must be above 0 and at most 1 for the tail "clip"'),
        ({"tail": "clip", "clip": 0.0}, "clip=0.0: must be above 0"),
        ({"tail": "clip", "clip": 0.1}, 'selected.lse=None: must be given for the tail "clip"'),
        ({"tail": "mean"}, 'v_page_means=None: must be given for the tail "mean"'),
        ({"tail": "mean", "v_page_means": torch.zeros(1, 2, 64)}, "v_page_means: has shape"),
        ({"out": torch.zeros(2, 6, 32)}, "out: has shape [2, 6, 32]; must be [B=2, Hq=6, D"),
        ({"out": torch.zeros(2, 6, 64).half()}, "out: has dtype float16; must be float32"),
        ({"out": torch.zeros(2, 6, 64, device=META)}, "out: lies on meta; must be on cpu"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [(op, *refused) for op, all_refused in REFUSED.items() for refused in all_refused],
)
def test_refusals(op, changes, message):
    arguments = accepted(op)
    getattr(ops, op)(**arguments)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        getattr(ops, op)(**{**arguments, **changes})
