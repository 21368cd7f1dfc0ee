# SPDX-License-Identifier: Apache-2.0
"""The hot V cache's protocol as device functions (Triton). In CUDA C++: csrc/residency.cuh.

A slot's word holds its owner (flat index into the table, upper 32 bits) and the epoch of its last
use (lower 32 bits), and changes by 64-bit compare-and-swap only. So of two programs that want one
slot, for reuse and for eviction, exactly one wins; and a slot stamped with the running epoch stays
put in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kcache.cache.hot_cache import HAND

# Slots looked at by one try to claim, and tries before a claim gives up. The oldest of a window
# goes: sampled least-recently-used.
WINDOW = tl.constexpr(8)
ATTEMPTS = tl.constexpr(8)
_HAND = tl.constexpr(HAND)
_STAMP_MASK = tl.constexpr(0xFFFFFFFF)


@triton.jit
def word_of(owner, epoch):
    """Word of a slot that `owner` uses in `epoch`."""
    return (owner.to(tl.int64) << 32) | (epoch.to(tl.int64) & _STAMP_MASK)


@triton.jit
def find_slot(table, slot_word, owner, epoch):
    """Slot that holds `owner`, stamped with `epoch`; -1 when it is not resident.

    table: the whole table, flat. owner: int64 flat index.
    """
    found = tl.full((), -1, tl.int32)
    slot = tl.load(table + owner, volatile=True)
    if slot >= 0:
        word = tl.load(slot_word + slot, volatile=True)
        mine = word_of(owner, epoch)
        if word == mine:
            found = slot
        elif (word >> 32) == owner:
            seen = tl.atomic_cas(slot_word + slot, word, mine)
            # Stamped by us, or by someone else in this epoch. Otherwise it has just been evicted.
            if (seen == word) | (seen == mine):
                found = slot
    return found


@triton.jit
def claim_slot(table, slot_word, state, owner, epoch, num_slots):
    """Take the oldest slot of a window for `owner`; -1 when all the slots tried are in use, or
    there are none.

    The caller must fill the slot in this epoch. Two programs may claim a slot each for one owner:
    the table names the last, the other is used in this epoch only and ages away.
    """
    mine = word_of(owner, epoch)
    found = tl.full((), -1, tl.int32)
    attempt = 0
    while (found < 0) & (attempt < ATTEMPTS) & (num_slots > 0):
        attempt += 1
        hand = tl.atomic_add(state + _HAND, WINDOW).to(tl.int64) & _STAMP_MASK
        slots = ((hand + tl.arange(0, WINDOW)) % num_slots).to(tl.int32)
        words = tl.load(slot_word + slots, volatile=True)
        # Epochs wrap around, their differences stay right. Empty is older than everything.
        ages = (epoch.to(tl.int64) - words) & _STAMP_MASK
        ages = tl.where(words == -1, _STAMP_MASK + 1, ages)
        oldest = tl.max(ages, 0)
        if oldest > 0:
            which = tl.argmax(ages, 0)
            slot = tl.sum(tl.where(tl.arange(0, WINDOW) == which, slots, 0), 0)
            word = tl.sum(tl.where(tl.arange(0, WINDOW) == which, words, 0), 0)
            if tl.atomic_cas(slot_word + slot, word, mine) == word:
                previous = word >> 32
                if previous >= 0:
                    # Only if the table still sends the evicted block here.
                    tl.atomic_cas(table + previous, slot, -1)
                tl.atomic_xchg(table + owner, slot)
                found = slot
    return found
