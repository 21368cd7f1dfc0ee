# SPDX-License-Identifier: Apache-2.0
"""What the steps of a decode hand to each other. Shapes and words: docs/design.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

HeadCombine = Literal["sum", "max"]
Tail = Literal["renormalize", "clip"]

# Query heads of a KV head that the GPU kernels take: the least rows of a product on tensor cores.
MOST_QUERY_HEADS_GPU = 16
# Tokens of a request that have one list there, kMostTogether of csrc/layer_view.h.
MOST_LISTED_TOGETHER = 8

# Values of `Fetched.rows` that are not a row of `v_rows`.
PADDING_ROW = -1
FIRST_HOST_ROW = -2


@dataclass(frozen=True)
class Selection:
    """The rule by which V blocks are chosen, in the units of one model.

    Attributes:
        top_n: most V blocks kept per (request, KV head); None for no cap.
        coverage: softmax mass to reach, in (0, 1]; None keeps `top_n` blocks whatever they cover.
        mass_threshold: every V block of at least this mass is kept, in (0, 1]; None for no such
            rule. Not together with a coverage.
        threshold_length: tokens of a request beyond which the threshold, and the clip with it,
            falls with the square root of the length; None for one threshold at any length.
        sink_blocks: first V blocks of a request that are always kept.
        recent_tokens: every V block that overlaps the last so many tokens is always kept. At
            least 1.
        combine: how the query heads of a KV head speak as one. "sum": the mean of their masses;
            "max": the largest mass ranks a block, and coverage must hold for every head.

    With `top_n`, `coverage` and `mass_threshold` all None, everything is selected.
    """

    top_n: int | None
    coverage: float | None
    sink_blocks: int
    recent_tokens: int
    combine: HeadCombine
    mass_threshold: float | None = None
    threshold_length: int | None = None

    @property
    def selects_everything(self) -> bool:
        """True when the rule keeps every V block of every request, whatever the scores are."""
        return self.top_n is None and self.coverage is None and self.mass_threshold is None

    @property
    def clip(self) -> float | None:
        """Probability at which the tail "clip" cuts a token's claim on the dropped mass.

        Half of the mass threshold: the tokens left out are like the weakest of those kept
        (docs/selection.md). None without a mass threshold.
        """
        return None if self.mass_threshold is None else self.mass_threshold / 2

    def threshold_share(self, seq_lens: torch.Tensor) -> torch.Tensor:
        """[B] float32: what of the threshold and of the clip holds for requests of these lengths
        ([B] int32)."""
        if self.threshold_length is None:
            return torch.ones_like(seq_lens, dtype=torch.float32)
        return (self.threshold_length / seq_lens.clamp_min(1).float()).clamp_max(1).sqrt()

    def clips(self, seq_lens: torch.Tensor) -> torch.Tensor | None:
        """[B] float32: `clip` of requests of these lengths; None without a mass threshold."""
        return None if self.clip is None else self.clip * self.threshold_share(seq_lens)

    def most_recent_blocks(self, v_block_tokens: int) -> int:
        """Most V blocks that the last `recent_tokens` tokens can overlap.

        One more than their whole blocks when the newest block is only partly filled.
        """
        return (self.recent_tokens + v_block_tokens - 2) // v_block_tokens + 1

    def most_forced_blocks(self, v_block_tokens: int) -> int:
        """Most V blocks that sink and recent can force into one list."""
        return self.sink_blocks + self.most_recent_blocks(v_block_tokens)


@dataclass(frozen=True)
class KStats:
    """What K of one layer is like, measured once at start; constants of its codes.

    Attributes:
        mean: [Hkv, D] float32. Of each channel, after rotary embedding.
        deviation: [Hkv, D] float32, above 0.
    """

    mean: torch.Tensor
    deviation: torch.Tensor


@dataclass(frozen=True)
class Selected:
    """The V blocks chosen for each request and KV head.

    Attributes:
        blocks: [B, Hkv, N] int32. Logical V blocks, ascending, padded with -1.
        counts: [B, Hkv] int32. Blocks of each list.
        mass: [B, Hkv] float32. Covered mass: mean over the group's query heads (combine "sum") or
            least (combine "max"). 1 for a padded row.
        lse: [B, Hq] float32. Log-sum-exp of each query head's scores over the whole request; any
            value for a padded row. None where nobody asked: only the tail "clip" needs it.
        dropped: [B, Hq] float32. Estimated mass of what is not selected, at least 0; any value for
            a padded row. Beside `lse` where scores are estimates; None where they are exact, and
            what the selected tokens lack is the dropped mass.

    All lie on the device of the query.
    """

    blocks: torch.Tensor
    counts: torch.Tensor
    mass: torch.Tensor
    lse: torch.Tensor | None = None
    dropped: torch.Tensor | None = None


@dataclass(frozen=True)
class Fetched:
    """Where the row of each selected block lies.

    Attributes:
        rows: [B, Hkv, N] int32, beside `Selected.blocks`. `r >= 0`: row r of `v_rows`. -1: padding.
            `r <= -2`: row `-2 - r` of the layer's host pool.
        v_rows: [R, T, D] model dtype, or [R, row bytes] uint8 where rows hold K and V. Staging
            rows, or the slots of the hot cache.
    """

    rows: torch.Tensor
    v_rows: torch.Tensor
