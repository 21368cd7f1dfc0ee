# SPDX-License-Identifier: Apache-2.0
"""Score every V block from K codes (csrc/score_codes.cu). Definition: reference/score.py."""

from __future__ import annotations

import torch

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels.score_plan import num_chunks
from vllm_kcache.kernels.select import Lists
from vllm_kcache.kernels.workspace import DecodeBatch

# Warps of a thread block, as in csrc/score_codes.cu.
WARPS = 4

# Thread blocks of a launch. Where the GPU cannot hold all at once, a warp takes two chunks: one is
# on its way while the other is added up. Many thread blocks end at different times and keep the GPU
# full; but a graph captured for longer requests launches as many with nothing to do.
_AT_ONCE, _BLOCKS_OF_LIST, _MOST_BLOCKS = 512, 16, 8192


def splits_of(shape: CacheShape, num_requests: int, max_blocks: int) -> int:
    """Thread blocks that share a list."""
    each = max(1, -(-num_chunks(shape, max_blocks) // WARPS))
    lists = max(1, num_requests * shape.num_kv_heads)
    blocks = min(max(_BLOCKS_OF_LIST * lists, _AT_ONCE), _MOST_BLOCKS)
    least = 2 if each * lists > _AT_ONCE else 1
    return -(-each // max(least, -(-each * lists // blocks)))


def score_codes(
    view: LayerView,
    batch: DecodeBatch,
    lists: Lists,
    transformed: torch.Tensor,
    bias: torch.Tensor,
    *,
    dependent: bool = False,
    after_write: bool = False,
    splits: int | None = None,
) -> None:
    """Write the estimated log-sum-exp of each V block and of each chunk; nothing past the lengths.

    Args:
        view: Of k_bits 4, with `packed`.
        batch: Its query may be strided over requests. All columns of its block table are read; what
            they hold past a row's length does not matter.
        lists: `block_lse` and `chunk_lse` are written, `chunk_max` too where it has one. Its
            `chunk_blocks` is that of `score_plan`.
        transformed: [B, Hq, D] float32, GPU. Written: q' of each request that has tokens.
        bias: [B, Hq] float32, GPU. Written: scale * (q . mean) of the same.
        dependent, after_write: as for `score.score_blocks`.
        splits: thread blocks of a list, chosen by `splits_of` unless given.

    Codes are read once for several tokens of a request (`DecodeBatch.spans`), of as many as have 16
    query heads a KV head together.
    Raises:
        RuntimeError: a tensor does not fit the view.
    """
    together = batch.scored_together(view.shape.group)
    if splits is None:
        splits = splits_of(view.shape, -(-batch.num_requests // together), batch.max_blocks)
    torch.ops.kcache.score_codes(
        view.packed,
        batch.query,
        batch.seq_lens,
        batch.block_table,
        lists.block_lse,
        lists.chunk_lse,
        lists.chunk_max,
        transformed,
        bias,
        batch.spans,
        batch.scale,
        batch.soft_cap,
        together,
        splits,
        dependent,
        after_write,
    )
