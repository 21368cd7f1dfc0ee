# SPDX-License-Identifier: Apache-2.0
"""The hot V cache: copies of V blocks in GPU memory, one slot pool for all layers and heads.

Addressed by physical V block and updated by every write of V, so a copy is never older than the
host pool (docs/design.md, "Residency and coherence"). All state is in GPU memory and changes only
inside kernels; the kernels' side of the protocol is kernels/residency.py and csrc/residency.cuh.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Words of `HotCache.state`, the same in csrc/layer_view.h.
HAND, EPOCH, SCORED, ENDED, WANTED, MISSED, EXISTING, REST_UNTIL = range(8)
STATE_WORDS = 8

# Words of `HotCache.counters`.
COUNTER_NAMES = ("lists", "selected", "hits", "misses", "direct")
DROPPED_MASS_BUCKETS = 16
FIRST_DROPPED_BUCKET = 8
DROPPED_MASS_EDGES = tuple(10 ** (-4 + 4 * i / 15) for i in range(DROPPED_MASS_BUCKETS))
FIRST_ESTIMATE_BUCKET = FIRST_DROPPED_BUCKET + DROPPED_MASS_BUCKETS
# Of |estimate - refined|, of the log-sum-exp of a block's scores.
ESTIMATE_ERROR_EDGES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, float("inf"))
COUNTER_WORDS = FIRST_ESTIMATE_BUCKET + len(ESTIMATE_ERROR_EDGES)

EMPTY_SLOT = -1  # `slot_word` of a slot that holds nothing


@dataclass(frozen=True)
class CacheCounters:
    """Sums over all decode steps since the last reset.

    Attributes:
        lists: lists of V blocks selected, one for each request, KV head, layer and step.
        selected: V blocks in those lists.
        hits, misses, direct: of those, found in the hot cache, copied into it, and read straight
            from the host because no slot could be had.
        dropped_mass: lists by dropped mass; entry i counts those at most `DROPPED_MASS_EDGES[i]`
            and above the edge before.
        estimate_errors: selected blocks and query heads of the lists that attention looks at, by
            the error of their estimate; entries as above, of `ESTIMATE_ERROR_EDGES`.
    """

    lists: int
    selected: int
    hits: int
    misses: int
    direct: int
    dropped_mass: tuple[int, ...]
    estimate_errors: tuple[int, ...]


@dataclass
class HotCache:
    """State of the hot V cache. Made once by `make`; every tensor stays at its address.

    Attributes:
        slots: [R, row_bytes] uint8, GPU. Copies of V blocks: bytes, whatever they hold. R may be
            0; every V block is then read from the host.
        table: [layers, M * Hkv * S / T] int32, GPU. Slot of a physical V block, or -1.
        slot_word: [R] int64, GPU. Owner (upper 32 bits: flat index into `table`) and epoch of the
            last use (lower 32 bits); -1 when empty.
        state: [STATE_WORDS] int32, GPU.
            HAND: slot at which the next claim starts to look. Written by claims.
            EPOCH: epochs (steps of one layer) that have ended. By the last kernel of a step.
            SCORED: lists scored, ever. By the score kernel.
            ENDED: followers that have ended in this epoch.
            WANTED: followers that are to work in the next epoch; 0 for all.
            MISSED, EXISTING: of the lists that followers took in this epoch, the V blocks that
            were not found, and all V blocks of their requests: what WANTED comes from.
            REST_UNTIL: no follower works before this epoch, since one gave up waiting.
            The last five are written by followers (csrc/follow.cu).
        counters: [COUNTER_WORDS] int64, GPU. See `CacheCounters`.
    """

    slots: torch.Tensor
    table: torch.Tensor
    slot_word: torch.Tensor
    state: torch.Tensor
    counters: torch.Tensor

    @classmethod
    def make(
        cls,
        num_slots: int,
        num_layers: int,
        rows_per_layer: int,
        row_bytes: int,
        device: torch.device | str,
    ) -> HotCache:
        """Allocate an empty cache.

        Args:
            num_slots: R, at least 0.
            num_layers: layers whose V lives in the host pool.
            rows_per_layer: M * Hkv * S / T, physical V blocks of a layer.
            row_bytes: of a V block, a multiple of 16.
        """
        for name, value, least in (("num_slots", num_slots, 0), ("num_layers", num_layers, 1)):
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        if row_bytes < 16 or row_bytes % 16:
            raise ValueError(f"row_bytes={row_bytes}: must be a multiple of 16")
        if num_layers * rows_per_layer >= 2**31:
            raise ValueError(
                f"num_layers * rows_per_layer={num_layers * rows_per_layer}: must be below 2**31"
            )
        return cls(
            slots=torch.zeros((num_slots, row_bytes), dtype=torch.uint8, device=device),
            table=torch.full((num_layers, rows_per_layer), -1, dtype=torch.int32, device=device),
            slot_word=torch.full((num_slots,), EMPTY_SLOT, dtype=torch.int64, device=device),
            state=torch.zeros(STATE_WORDS, dtype=torch.int32, device=device),
            counters=torch.zeros(COUNTER_WORDS, dtype=torch.int64, device=device),
        )

    @staticmethod
    def bytes(num_slots: int, num_layers: int, rows_per_layer: int, row_bytes: int) -> int:
        """GPU memory that `make` takes."""
        words = STATE_WORDS * 4 + COUNTER_WORDS * 8
        return num_slots * (row_bytes + 8) + num_layers * rows_per_layer * 4 + words

    @property
    def rows_per_layer(self) -> int:
        return self.table.shape[1]

    @property
    def num_slots(self) -> int:
        return self.slot_word.shape[0]

    def advance_epoch(self) -> None:
        """End a step on the current stream, as the last kernel of `decode_step` does.

        Within a step all kernels use the epoch after the one in `state`.
        """
        self.state[EPOCH] += 1

    def invalidate(self, rows: torch.Tensor) -> None:
        """Forget the copies of some V blocks, on the current stream; their slots age away.

        Args:
            rows: [n] int64, GPU. Flat indices into `table`. Any n; repeated ones do no harm.
        """
        self.table.view(-1).index_fill_(0, rows, -1)

    def flush(self) -> None:
        """Forget every copy, on the current stream. Needed after V was stored around `write_kv`."""
        self.table.fill_(-1)
        self.slot_word.fill_(EMPTY_SLOT)

    def read_counters(self, reset: bool = False) -> CacheCounters:
        """Copy the counters to the host. Waits for the GPU: not for use inside a step."""
        words = self.counters.tolist()
        if reset:
            self.counters.zero_()
        sums = dict(zip(COUNTER_NAMES, words[: len(COUNTER_NAMES)], strict=True))
        return CacheCounters(
            **sums,
            dropped_mass=tuple(words[FIRST_DROPPED_BUCKET:FIRST_ESTIMATE_BUCKET]),
            estimate_errors=tuple(words[FIRST_ESTIMATE_BUCKET:]),
        )
