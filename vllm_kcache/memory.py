# SPDX-License-Identifier: Apache-2.0
"""How the memory of the split cache is planned. The engine allocates by this and the planner
predicts by it; nothing else decides a size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.kernels.workspace import workspace_buffers
from vllm_kcache.types import Selection

# Requests that share one set of decode buffers; more of them decode one group after the other.
# Fewer where contexts are so long that the buffers would pass WORKSPACE_BYTES.
GROUP_REQUESTS = 64
WORKSPACE_BYTES = 256 << 20
# Bytes of one gathered piece of V (and as many for K) while a prompt chunk attends to its context.
PIECE_BYTES = 64 << 20
# Share of the memory for K pages that the hot cache takes when its size is "auto": where the
# planner finds the most throughput with the default selection (docs/plan.md).
HOT_CACHE_SHARE = 0.07


@dataclass(frozen=True)
class StepLimits:
    """What an engine may ask of one step.

    Attributes:
        max_requests: Most requests of a step.
        max_tokens: Most tokens of a step.
        max_model_len: Longest request, tokens.
    """

    max_requests: int
    max_tokens: int
    max_model_len: int


@dataclass(frozen=True)
class GPUMemory:
    """GPU memory of the split layers of one worker, besides their K pages.

    Attributes:
        shape: Geometry of the split layers.
        selection: The rule; lists and sums are as long as it needs.
        limits: What a step may hold.
    """

    shape: CacheShape
    selection: Selection
    limits: StepLimits

    @property
    def max_blocks(self) -> int:
        """P of the longest request."""
        return self.shape.max_blocks(self.limits.max_model_len)

    @property
    def group_requests(self) -> int:
        """Requests that decode together."""
        # Part of the buffers does not depend on the number of requests.
        one, two = self._workspace_bytes(1), self._workspace_bytes(2)
        room = 1 + max(0, WORKSPACE_BYTES - one) // (two - one)
        return max(1, min(GROUP_REQUESTS, self.limits.max_requests, room))

    @property
    def scratch_tokens(self) -> int:
        """Tokens of one gathered piece of context."""
        # Every request of a step may prefill with context: each needs a page of the scratch.
        page_bytes = self.shape.token_bytes * self.shape.page_tokens
        pages = max(PIECE_BYTES // page_bytes, self.limits.max_requests)
        return pages * self.shape.page_tokens

    @property
    def fixed_bytes(self) -> int:
        """Bytes that do not depend on the number of pages: decode buffers, V of a prefill's step
        on its way out, two pieces of V and one of K on their way in."""
        transfer = (self.limits.max_tokens + 3 * self.scratch_tokens) * self.shape.token_bytes
        return self._workspace_bytes(self.group_requests) + transfer

    @property
    def page_bytes(self) -> int:
        """Bytes that each page costs besides K: its rows in the hot cache's table, and the tokens
        of a step that writes its slots."""
        shape = self.shape
        return 4 * (shape.num_layers * shape.rows_per_page + shape.page_tokens)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one hot slot: its row and its word."""
        return self.shape.row.bytes + 8

    def hot_slots(self, available_bytes: int, hot_cache_gib: float | Literal["auto"]) -> int:
        """Slots of the hot cache.

        Args:
            available_bytes: What K pages, tables and the hot cache share.
            hot_cache_gib: The setting; 0 switches the cache off.
        """
        wanted = (
            available_bytes * HOT_CACHE_SHARE
            if hot_cache_gib == "auto"
            else float(hot_cache_gib) * 2**30
        )
        return int(wanted) // self.slot_bytes

    def pages(self, available_bytes: int, k_page_bytes: int, hot_slots: int) -> int:
        """Pages that fit beside so many hot slots.

        Args:
            k_page_bytes: Bytes of a page of K of all layers (and of V of those that are not split).
        """
        left = available_bytes - hot_slots * self.slot_bytes
        return left // (k_page_bytes + self.page_bytes)

    def _workspace_bytes(self, max_requests: int) -> int:
        buffers = workspace_buffers(self.shape, self.selection, max_requests, self.max_blocks)
        return sum(size * dtype.itemsize for size, dtype in buffers.values())
