# SPDX-License-Identifier: Apache-2.0
"""Slots that Triton's side of the hot cache claims.

TRITON_INTERPRET=1 python -m tests.csrc.claims
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_kcache.cache.hot_cache import EPOCH, HAND, HotCache
from vllm_kcache.kernels.residency import claim_slot

EPOCH_WORD = tl.constexpr(EPOCH)


@triton.jit
def claim_kernel(table, slot_word, state, out, num_slots):
    owner = tl.program_id(0).to(tl.int64) + 5
    epoch = tl.load(state + EPOCH_WORD) + 1
    tl.store(out, claim_slot(table, slot_word, state, owner, epoch, num_slots))


def main() -> None:
    """Of caches with no slot, and with one that is free."""
    for num_slots in (0, 3):
        cache = HotCache.make(num_slots, 1, 8, 16, "cpu")
        cache.slot_word[:2] = (1 << 32) + 1  # in use in this epoch
        out = torch.zeros(1, dtype=torch.int32)
        claim_kernel[(1,)](cache.table, cache.slot_word, cache.state, out, num_slots)
        print(f"{num_slots}:", int(out))
        assert bool(cache.state[HAND]) == (num_slots > 0)
        assert int(cache.table[0, 5]) == int(out)


if __name__ == "__main__":
    main()
