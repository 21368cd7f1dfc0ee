# SPDX-License-Identifier: Apache-2.0
"""Looks into a worker: are the resident copies of V what the host pool holds?"""

from __future__ import annotations

from typing import Any

import torch


class ResidencyProbe:
    """For `worker_extension_cls`: vLLM gives its methods to the worker. Call it when idle."""

    def kcache_compare_copies(self) -> dict[str, Any]:
        """Compare each resident V block with its row of the host pool, in every layer.

        Only the first token: a V block that claimed its slot as it was being filled has it in both,
        and past the last token that was written the two may differ.

        Returns:
            The number of resident copies and of stale ones, and the pages of both pools.
        """
        from vllm_kcache.integration import runtime

        active: Any = runtime.current()
        assert active.pool is not None
        cache = getattr(active, "hot_cache", None)
        result = {
            "has_hot_cache": cache is not None,
            "resident": 0,
            "stale": 0,
            "pool_pages": active.pool.layer_shape[0],
            "k_pages": self.cache_config.num_gpu_blocks,  # type: ignore[attr-defined]
        }
        if cache is None:
            return result
        torch.cuda.synchronize()
        words = cache.slot_word.cpu()
        for layer in range(active.pool.num_layers):
            table = cache.table[layer].cpu()
            rows = (table >= 0).nonzero().flatten()
            slots = table[rows].long()
            # A slot that has gone to another block since says so in its word.
            held = (words[slots] >> 32) == layer * cache.rows_per_layer + rows
            rows, slots = rows[held], slots[held]
            copies = cache.slots[slots.to(cache.slots.device), 0].cpu()
            blocks = active.pool.layer(layer).view(-1, *cache.slots.shape[1:])
            result["resident"] += len(rows)
            result["stale"] += int((copies != blocks[rows, 0]).any(-1).sum())
        return result
