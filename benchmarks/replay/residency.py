# SPDX-License-Identifier: Apache-2.0
"""Looks into a worker: are the resident copies of V what the host pool holds?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vllm_kcache.cache.hot_cache import HotCache


def compare_copies(cache: HotCache, v_layers: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Compare each resident V block with its row of the host pool.

    Only the first token: a V block that claimed its slot as it was being filled has it in both, and
    past the last token that was written the two may differ. So this finds copies that outlived
    their page; one that misses the latest tokens of its block shows in the text only.

    Args:
        cache: No kernel that uses it may be running.
        v_layers: [M, Hkv, S, D] model dtype, host, for each layer.

    Returns:
        Resident copies, and those of them that are stale.
    """
    resident = stale = 0
    words = cache.slot_word.cpu()
    for layer, v_pool in enumerate(v_layers):
        table = cache.table[layer].cpu()
        rows = (table >= 0).nonzero().flatten()
        slots = table[rows].long()
        # A slot that has gone to another block since says so in its word.
        held = (words[slots] >> 32) == layer * cache.rows_per_layer + rows
        rows, slots = rows[held], slots[held]
        copies = cache.slots[slots.to(cache.slots.device), 0].cpu()
        blocks = v_pool.view(-1, *cache.slots.shape[1:])
        resident += len(rows)
        stale += int((copies != blocks[rows, 0]).any(-1).sum())
    return resident, stale


class ResidencyProbe:
    """For `worker_extension_cls`: vLLM gives its methods to the worker. Call it when idle."""

    def kcache_compare_copies(self) -> dict[str, Any]:
        """Resident copies and stale ones (`compare_copies`), and the pages of both pools."""
        from vllm_kcache.integration import runtime

        active: Any = runtime.current()
        assert active.pool is not None
        cache = getattr(active, "hot_cache", None)
        resident = stale = 0
        if cache is not None:
            torch.cuda.synchronize()
            layers = [active.pool.layer(layer) for layer in range(active.pool.num_layers)]
            resident, stale = compare_copies(cache, layers)
        return {
            "has_hot_cache": cache is not None,
            "resident": resident,
            "stale": stale,
            "pool_pages": active.pool.layer_shape[0],
            "k_pages": self.cache_config.num_gpu_blocks,  # type: ignore[attr-defined]
        }
