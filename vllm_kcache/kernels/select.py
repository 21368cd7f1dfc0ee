# SPDX-License-Identifier: Apache-2.0
"""Choose the V blocks to attend, and fetch them (csrc/). Definition: reference/select.py.

All calls run on the current stream, allocate nothing and wait for nothing, but for `packed_view`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.kernels import extension
from vllm_kcache.types import Selected

# V blocks of a request, and where a list of several rows says who selected a block: the same in
# csrc/layer_view.h.
BLOCK_BITS = 20
MOST_BLOCKS = 1 << BLOCK_BITS
_MOST_INT32 = 2**31 - 1


def packed_view(view: LayerView) -> torch.Tensor:
    """A layer as the calls below take it, checked once. It points into the tensors of the view.

    Returns:
        uint8, CPU: bytes of a LayerView (csrc/layer_view.h).
    Raises:
        RuntimeError: a tensor or a number does not fit the others; or there is no extension.
    """
    extension.load()
    shape, cache, selection = view.shape, view.hot_cache, view.selection
    assert cache is not None
    stats = view.k_stats
    packed: torch.Tensor = torch.ops.kcache.layer_view(
        view.host_rows,
        cache.slots,
        cache.table,
        cache.slot_word,
        cache.state,
        cache.counters,
        view.index,
        shape.num_kv_heads,
        shape.group,
        shape.page_tokens,
        shape.block_tokens,
        -1 if selection.top_n is None else min(selection.top_n, _MOST_INT32),
        -1.0 if selection.coverage is None else selection.coverage,
        -1.0 if selection.mass_threshold is None else selection.mass_threshold,
        selection.threshold_length or 0,
        min(selection.sink_blocks, _MOST_INT32),
        min(selection.recent_tokens, _MOST_INT32),
        selection.combine == "max",
        None if stats is None else view.code_pages,
        None if stats is None else stats.mean,
        None if stats is None else stats.deviation,
        shape.head_size,
        shape.dtype.itemsize,
        shape.host_dtype == "int8",
    )
    return packed


@dataclass(frozen=True)
class Lists:
    """Scores of a step and the lists that come of them.

    Attributes:
        seq_lens: [B] int32, GPU.
        block_table: [B, MB] int32, GPU.
        block_lse: [B, Hq, P] float32, GPU. P is at most `MOST_BLOCKS`.
        chunk_lse: [B, Hq, C] float32, GPU. Log-sum-exp of each chunk, as scoring leaves it.
        chunk_blocks: V blocks of a chunk.
        selected: written, its lse too, which it must have, and its dropped where it has one. Past
            the end of a list is anything.
        rows: [B, Hkv, N] int32, GPU. Written, as `Fetched.rows`.
        signals: [B * Hkv] int32 or longer, GPU. 0 at the start of a step. Each program of the
            score kernel that has a chunk of a list adds 1, release, when its scores are there; the
            follower writes -1 when it is done with a list.
        chunk_max: [B, Hq, C] float32, GPU. Of each chunk what no block of it scores above; None
            where scoring does not leave it. Lists of several rows pass over chunks by it.
    """

    seq_lens: torch.Tensor
    block_table: torch.Tensor
    block_lse: torch.Tensor
    chunk_lse: torch.Tensor
    chunk_blocks: int
    selected: Selected
    rows: torch.Tensor
    signals: torch.Tensor
    chunk_max: torch.Tensor | None = None

    def arguments(self) -> tuple[object, ...]:
        """In the order of the operations' schemas."""
        selected = self.selected
        return (
            self.seq_lens,
            self.block_table,
            self.block_lse,
            self.chunk_lse,
            self.chunk_blocks,
            selected.blocks,
            selected.counts,
            selected.mass,
            selected.lse,
            selected.dropped,
            self.rows,
            self.signals,
        )


def select_and_fetch(
    view: torch.Tensor,
    lists: Lists,
    dependent: bool = False,
    followed: bool = True,
    spans: torch.Tensor | None = None,
    together: int = 1,
) -> None:
    """Select and fetch every list that is not done, and make all signals 0 for the next step.

    All scores are there. The V blocks fetched stay in their slots for the epoch after the one in
    `HotCache.state`.

    Args:
        view: of `packed_view`.
        dependent: begin before the launch before has ended (kernels/dependent.py).
        followed: `follow_scores` came before. Without, no list is done, and no signal is looked at.
        spans: [B, 2] int32, GPU. As `DecodeBatch.spans`.
        together: most rows of a request that have one list (`DecodeBatch.listed_together`). With
            more than 1, never `followed`, each row selects as if it were alone, and `mass`, `lse`
            and `dropped` are its own. The first of the rows has a list of all that any of them
            selected: each place holds a V block and, from bit `BLOCK_BITS` on, a bit of each row
            that selected it. The others' counts are 0. `own_lists` takes it apart.
    """
    arguments = lists.arguments() if followed else (*lists.arguments()[:-1], None)
    torch.ops.kcache.select_and_fetch(view, *arguments, lists.chunk_max, spans, together, dependent)


def own_lists(selected: Selected, spans: torch.Tensor | None, together: int) -> Selected:
    """The list of each row, where rows of a request have one: for checks, not for steps.

    Args:
        selected: written by `select_and_fetch` with these spans, [B, 2], and `together`.
    Returns:
        The same with lists as `select_blocks` writes them.
    """
    if spans is None or together == 1:
        return selected
    rows = torch.arange(len(spans), device=spans.device)
    later = torch.minimum(spans[:, 0], rows) % together
    entries, counts = selected.blocks[rows - later], selected.counts[rows - later]
    listed = torch.arange(entries.shape[2], device=spans.device) < counts[..., None]
    listed = listed & (entries >> (BLOCK_BITS + later[:, None, None]) & 1).bool()
    blocks = (entries % MOST_BLOCKS).masked_fill(~listed, MOST_BLOCKS).sort(-1).values
    return replace(
        selected,
        blocks=blocks.masked_fill(blocks == MOST_BLOCKS, -1).int(),
        counts=listed.sum(-1).int(),
    )


def follow_scores(
    view: torch.Tensor,
    lists: Lists,
    splits: int,
    most_thread_blocks: int,
    least_thread_blocks: int,
) -> None:
    """The same for each list as soon as it is scored, beside the kernel that scores.

    Gives up when scoring stands still; so `select_and_fetch` must come after both.

    Args:
        splits: programs that share a list in the score kernel.
        most_thread_blocks: 1 to 128.
        least_thread_blocks: that work where nothing was missing; 1 to `most_thread_blocks`.
    """
    torch.ops.kcache.follow_scores(
        view, *lists.arguments(), splits, most_thread_blocks, least_thread_blocks
    )


def select_blocks(
    view: torch.Tensor,
    seq_lens: torch.Tensor,
    block_lse: torch.Tensor,
    chunk_lse: torch.Tensor,
    chunk_blocks: int,
    out: Selected,
) -> None:
    """Select alone, all lists, padded with -1. Arguments as in `Lists`; `out` has an lse."""
    torch.ops.kcache.select_blocks(
        view,
        seq_lens,
        block_lse,
        chunk_lse,
        chunk_blocks,
        out.blocks,
        out.counts,
        out.mass,
        out.lse,
        out.dropped,
    )
