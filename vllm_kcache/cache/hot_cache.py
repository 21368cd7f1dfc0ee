# SPDX-License-Identifier: Apache-2.0
"""The hot V cache: copies of V blocks in GPU memory, one slot pool for all layers and heads.

Addressed by physical V block and updated by every write of V, so a copy is never older than the
host pool (docs/design.md, "Residency and coherence"). All state is in GPU memory and changes only
inside kernels; the kernels' side of the protocol is kernels/residency.py and csrc/residency.cuh.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

# Words of `HotCache.state`.
HAND, EPOCH, FIRST_MISS_COUNT = 0, 1, 2
MAX_WAVES = 16
ENDED = FIRST_MISS_COUNT + MAX_WAVES
WANTED = ENDED + 1
STATE_WORDS = WANTED + 3

# Words of `HotCache.counters`.
COUNTER_NAMES = ("lists", "selected", "hits", "misses", "direct")
DROPPED_MASS_BUCKETS = 16
FIRST_DROPPED_BUCKET = 8
COUNTER_WORDS = FIRST_DROPPED_BUCKET + DROPPED_MASS_BUCKETS
DROPPED_MASS_EDGES = tuple(10 ** (-4 + 4 * i / 15) for i in range(DROPPED_MASS_BUCKETS))

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
    """

    lists: int
    selected: int
    hits: int
    misses: int
    direct: int
    dropped_mass: tuple[int, ...]


@dataclass
class HotCache:
    """State of the hot V cache. Made once by `make`; every tensor stays at its address.

    Attributes:
        slots: [R, T, D] model dtype, GPU. Copies of V blocks.
        table: [layers, M * Hkv * S / T] int32, GPU. Slot of a physical V block, or -1.
        slot_word: [R] int64, GPU. Owner (upper 32 bits: flat index into `table`) and epoch of the
            last use (lower 32 bits); -1 when empty.
        state: [STATE_WORDS] int32, GPU. Clock hand, epoch, misses listed by each wave, thread
            blocks that have followed a step's scores to their end, and of those that will follow
            the next step's: how many are to work, from misses and V blocks of this one.
        counters: [COUNTER_WORDS] int64, GPU. See `CacheCounters`.
        write_update: tests set this to False to show that stale copies would be served without it.
    """

    slots: torch.Tensor
    table: torch.Tensor
    slot_word: torch.Tensor
    state: torch.Tensor
    counters: torch.Tensor
    write_update: bool = field(default=True)

    @classmethod
    def make(
        cls,
        num_slots: int,
        num_layers: int,
        rows_per_layer: int,
        v_block_tokens: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> HotCache:
        """Allocate an empty cache.

        Args:
            num_slots: R, at least 1.
            num_layers: layers whose V lives in the host pool.
            rows_per_layer: M * Hkv * S / T, physical V blocks of a layer.
        """
        for name, value in (("num_slots", num_slots), ("num_layers", num_layers)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if num_layers * rows_per_layer >= 2**31:
            raise ValueError(
                f"num_layers * rows_per_layer={num_layers * rows_per_layer}: must be below 2**31"
            )
        return cls(
            slots=torch.zeros((num_slots, v_block_tokens, head_size), dtype=dtype, device=device),
            table=torch.full((num_layers, rows_per_layer), -1, dtype=torch.int32, device=device),
            slot_word=torch.full((num_slots,), EMPTY_SLOT, dtype=torch.int64, device=device),
            state=torch.zeros(STATE_WORDS, dtype=torch.int32, device=device),
            counters=torch.zeros(COUNTER_WORDS, dtype=torch.int64, device=device),
        )

    @staticmethod
    def bytes(
        num_slots: int,
        num_layers: int,
        rows_per_layer: int,
        v_block_tokens: int,
        head_size: int,
        dtype: torch.dtype,
    ) -> int:
        """GPU memory that `make` takes."""
        slot = v_block_tokens * head_size * dtype.itemsize + 8
        return (
            num_slots * slot + num_layers * rows_per_layer * 4 + STATE_WORDS * 4 + COUNTER_WORDS * 8
        )

    @property
    def rows_per_layer(self) -> int:
        return self.table.shape[1]

    @property
    def num_slots(self) -> int:
        return self.slot_word.shape[0]

    def begin_epoch(self) -> None:
        """Begin a new epoch on the current stream. `decode_step` does this in its score kernel."""
        self.state[EPOCH] += 1
        self.state[FIRST_MISS_COUNT:ENDED] = 0

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
        return CacheCounters(**sums, dropped_mass=tuple(words[FIRST_DROPPED_BUCKET:]))
