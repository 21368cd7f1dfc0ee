# SPDX-License-Identifier: Apache-2.0
"""Looks into a worker: are the resident copies of V what the host pool holds?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vllm_kcache.cache.hot_cache import HotCache

# Bytes of a row that are compared: the beginning of its first token, which no head is shorter than.
FIRST_BYTES = 16


def compare_copies(cache: HotCache, host_layers: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Compare each resident row with that of the host pool.

    Only the first token: a row that claimed its slot as it was being filled has it in both, and
    past the last token that was written the two may differ. So this finds copies that outlived
    their page; one that misses the latest tokens of its block shows in the text only.

    Args:
        cache: No kernel that uses it may be running.
        host_layers: [rows, row bytes] uint8, host, for each layer.

    Returns:
        Resident copies, and those of them that are stale.
    """
    resident = stale = 0
    words, slots_there = cache.slot_word.cpu(), cache.slots[:, :FIRST_BYTES].cpu()
    for layer, host_rows in enumerate(host_layers):
        table = cache.table[layer].cpu()
        rows = (table >= 0).nonzero().flatten()
        slots = table[rows].long()
        # A slot that has gone to another block since says so in its word.
        held = (words[slots] >> 32) == layer * cache.rows_per_layer + rows
        rows, slots = rows[held], slots[held]
        resident += len(rows)
        stale += int((slots_there[slots] != host_rows[rows, :FIRST_BYTES]).any(-1).sum())
    return resident, stale


class ResidencyProbe:
    """For `worker_extension_cls`: vLLM gives its methods to the worker. Call it when idle."""

    def kcache_compare_copies(self) -> dict[str, Any]:
        """Resident copies and stale ones (`compare_copies`), and the pages of both pools."""
        split_cache: Any = self.split_cache  # type: ignore[attr-defined]
        pool = split_cache.pool
        cache = getattr(split_cache, "hot_cache", None)  # the CPU has none
        resident = stale = 0
        if cache is not None:
            torch.cuda.synchronize()
            resident, stale = compare_copies(cache, [pool.layer(i) for i in range(pool.num_layers)])
        return {
            "has_hot_cache": cache is not None,
            "resident": resident,
            "stale": stale,
            "pool_pages": pool.num_rows // split_cache.shape.rows_per_page,
            "k_pages": self.cache_config.num_gpu_blocks,  # type: ignore[attr-defined]
        }
