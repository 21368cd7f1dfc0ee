# SPDX-License-Identifier: Apache-2.0
"""How the memory of the split cache is planned. The engine allocates by this and the planner
predicts by it; nothing else decides a size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.kernels.workspace import workspace_buffers
from vllm_kcache.types import Selection

# Requests that share one set of decode buffers; more of them decode one group after the other.
# Fewer where contexts are so long, or drafts so many, that the buffers would pass WORKSPACE_BYTES.
GROUP_REQUESTS = 64
WORKSPACE_BYTES = 256 << 20
# Bytes of one gathered piece of V (and as many for K) while a prompt chunk attends to its context.
PIECE_BYTES = 64 << 20
# Least share of the memory for K pages that the hot cache takes when its size is "auto", by k_bits:
# some twice what a step selects (docs/plan.md). Codes are a quarter of K, and rows hold K as well.
HOT_CACHE_SHARE = {16: 0.07, 4: 0.2}


@dataclass(frozen=True)
class StepLimits:
    """What an engine may ask of one step.

    Attributes:
        max_requests: Most requests of a step.
        max_tokens: Most tokens of a step.
        max_model_len: Longest request, tokens.
        decode_tokens: Most tokens of a request that decodes: one, and its drafts.
    """

    max_requests: int
    max_tokens: int
    max_model_len: int
    decode_tokens: int = 1

    @property
    def max_rows(self) -> int:
        """Most rows of a decode batch: each token is one."""
        return self.max_requests * self.decode_tokens

    def useful_pages(self, page_tokens: int) -> int:
        """Pages of the most requests of the greatest length, and one that vLLM keeps for itself."""
        return self.max_requests * -(-self.max_model_len // page_tokens) + 1


@dataclass(frozen=True)
class WindowPool:
    """Device memory of layers with a sliding window, beside the pages of the full layers.

    They keep K and V of the window there, in a pool of blocks of their own, and neither pool can
    lend to the other. So both are made for the same number of requests of one length; but blocks
    for no more requests than there may be, and pages of all that is left then.

    Attributes:
        block_bytes: One block, in all window layers of a rank.
        page_bytes: One page, in all full layers of a rank.
        request_blocks: Most blocks that a request holds while it decodes.
        step_blocks: Blocks that the prompts of running steps hold besides, and vLLM's own one.
        request_pages: Pages of a request of that length.
        longest_pages: Pages of the longest request.
        max_requests: Most requests at once.
    """

    block_bytes: int
    page_bytes: int
    request_blocks: int
    step_blocks: int
    request_pages: int
    longest_pages: int
    max_requests: int

    @classmethod
    def plan(
        cls,
        windows: Iterable[tuple[int, int]],
        block_bytes: int,
        page_bytes: int,
        page_tokens: int,
        limits: StepLimits,
        steps_at_once: int,
    ) -> WindowPool:
        """The pool of some groups of layers, each with a window and tokens of a block of its own.

        Both pools could be used up by requests of one length only. It is chosen such that of the
        requests that one elastic pool would hold, the same share fits of those as short as a window
        and of the longest; of no length between them a smaller one.

        Args:
            windows: Of each group: tokens of the window, and of a block.
            block_bytes, page_bytes: As the attributes.
            page_tokens: S of the full layers.
            limits: What a step may hold.
            steps_at_once: Steps that vLLM may have begun and not ended.
        """
        max_model_len = limits.max_model_len
        in_flight_tokens = steps_at_once * limits.max_tokens
        request_blocks = step_blocks = shortest = 0
        longest = -(-max_model_len // page_tokens)
        for window, tokens in windows:
            # One block more, where a window begins within one.
            held = -(-min(window + tokens, max_model_len) // tokens)
            # What vLLM wants to be free before it lets the first request in.
            most = -(-min(window - 1 + in_flight_tokens, max_model_len) // tokens) + 1
            request_blocks += held
            step_blocks += max(0, most - held)
            shortest = max(shortest, -(-min(window, max_model_len) // page_tokens))
        beside = request_blocks * block_bytes
        pages = longest * (beside + shortest * page_bytes) // (beside + longest * page_bytes)
        return cls(
            block_bytes, page_bytes, request_blocks, step_blocks + 1, max(pages, shortest, 1),
            longest, limits.max_requests,
        )  # fmt: skip

    @property
    def fixed_bytes(self) -> int:
        """Bytes of blocks that do not depend on the number of requests."""
        return self.step_blocks * self.block_bytes

    @property
    def most_bytes(self) -> int:
        """Bytes of blocks for the most requests."""
        return (self.step_blocks + self.max_requests * self.request_blocks) * self.block_bytes

    @property
    def bytes_beside_page(self) -> int:
        """Bytes of blocks that go with each page, until there are those of the most requests."""
        return -(-self.request_blocks * self.block_bytes // self.request_pages)

    def holds_most(self, pages: int) -> bool:
        """Whether blocks for the most requests go with so many pages."""
        return pages - 1 >= self.max_requests * self.request_pages

    def blocks_for(self, pages: int) -> int:
        """Blocks that go with so many pages, one of which vLLM keeps for itself: at least those of
        one request."""
        return self._blocks(max(0, pages - 1) * self.request_blocks // self.request_pages)

    def bytes_for(self, pages: int) -> int:
        """Bytes of so many pages and the blocks that go with them."""
        return pages * self.page_bytes + self.blocks_for(pages) * self.block_bytes

    def divide(self, available_bytes: int) -> tuple[int, int]:
        """Blocks and pages that take so many bytes: of `bytes_for(n)` n pages and their blocks. Of
        both at least those of the longest request, for which a cache is refused if it has none."""
        request = self.request_blocks * self.block_bytes + self.request_pages * self.page_bytes
        free = max(0, available_bytes - self.fixed_bytes - self.page_bytes)
        blocks = self._blocks(free * self.request_blocks // request)
        pages = (available_bytes - blocks * self.block_bytes) // self.page_bytes
        return blocks, max(pages, self.longest_pages + 1)

    def pages_for(self, blocks: int) -> int:
        """Pages that go with so many blocks, where those are given: of the longest request at
        least."""
        free = max(0, blocks - self.step_blocks)
        return 1 + max(free * self.request_pages // self.request_blocks, self.longest_pages)

    def requests(self, pages: int, request_pages: int, blocks: int | None = None) -> float:
        """Requests of so many pages that fit in so many, and in so many blocks, or those that go
        with the pages."""
        free = (self.blocks_for(pages) if blocks is None else blocks) - self.step_blocks
        return min((pages - 1) / request_pages, free / self.request_blocks)

    def _blocks(self, free: int) -> int:
        most = self.max_requests * self.request_blocks
        return self.step_blocks + min(max(free, self.request_blocks), most)


def what_limits(
    pages: int, host_pages: int, useful_pages: int, shape: CacheShape, device: str = "GPU"
) -> tuple[str, str]:
    """What keeps the pages from being more, and a sentence on what would change that.

    Args:
        pages: As planned.
        host_pages: Pages whose rows the host can hold.
        useful_pages: Of `StepLimits`.
        shape: Says which settings are left to change.
        device: Whose memory the pages are in.
    """
    if pages >= useful_pages:
        return "max_num_seqs", (
            "That many requests of max_model_len fit. Only a larger --max-num-seqs lets more in."
        )
    if pages >= host_pages:
        smaller = shape.k_bits == 4 and shape.host_dtype == "model"
        also = ", or kcache_config.host_dtype int8" if smaller else ""
        return "host memory", (
            f"More host memory, or a larger kcache_config.host_memory_gib{also}, lets more "
            "requests in."
        )
    # Of a model in float32 rows of K and V take more than codes save.
    smaller = shape.k_bits == 16 and shape.dtype.itemsize == 2
    also = ", or kcache_config.k_bits 4," if smaller else ""
    return f"{device} memory", (
        f"A larger --gpu-memory-utilization (or --kv-cache-memory-bytes, where that is given){also}"
        " lets more requests in."
    )


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
        return self.shape.score_columns(self.limits.max_model_len)

    @property
    def group_requests(self) -> int:
        """Rows that decode together: requests, each draft of theirs counted as one more."""
        # Part of the buffers does not depend on the number of requests.
        one, two = self._workspace_bytes(1), self._workspace_bytes(2)
        room = 1 + max(0, WORKSPACE_BYTES - one) // (two - one)
        tokens = self.limits.decode_tokens
        rows = max(1, min(GROUP_REQUESTS * tokens, self.limits.max_rows, room))
        # Tokens of a request are best together.
        return rows if rows < tokens else rows - rows % tokens

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
        # K goes with V where rows hold both, and two pieces of K are on their way then.
        both = self.shape.row.has_keys
        tokens = self.limits.max_tokens * (1 + both) + (3 + both) * self.scratch_tokens
        transfer = tokens * self.shape.token_bytes
        return self._workspace_bytes(self.group_requests) + transfer

    @property
    def page_bytes(self) -> int:
        """Bytes that each page costs besides K: its rows in the hot cache's table, and the tokens
        of a step that writes its slots."""
        shape = self.shape
        return 4 * (shape.num_layers * shape.rows_per_page + shape.page_tokens)

    @property
    def row_table_bytes(self) -> int:
        """Bytes of what says where each row of a decode batch lies (`TokenRows`), where there may
        be more rows than requests. Made when vLLM has measured what is left."""
        if self.limits.decode_tokens == 1:
            return 0
        pages = -(-self.limits.max_model_len // self.shape.page_tokens)
        return 4 * (self.limits.max_rows * (pages + 4) + 1)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one hot slot: its row and its word."""
        return self.shape.row.bytes + 8

    def plan(
        self,
        available_bytes: int,
        k_page_bytes: int,
        host_pages: int,
        hot_cache_gib: float | Literal["auto"],
        bytes_beside_page: int = 0,
    ) -> tuple[int, int]:
        """Pages and slots of the hot cache.

        Pages are as many as the host pool, the most requests of the greatest length, and the GPU
        can hold. With "auto" all that is left is hot cache, and at least a share of the whole: a
        row that is there need not come over the link, and dropping one costs nothing.

        Args:
            available_bytes: GPU memory that K pages, tables and the hot cache share.
            k_page_bytes: Bytes of a page of K of all layers (and of V of those that are not split).
            host_pages: Pages whose rows the host can hold.
            hot_cache_gib: The setting; 0 switches the cache off.
            bytes_beside_page: Of `WindowPool`; no part of the whole that the share is of.
        """
        available = max(0, available_bytes - self.row_table_bytes)
        useful = self.limits.useful_pages(self.shape.page_tokens)
        most, page = min(host_pages, useful), k_page_bytes + self.page_bytes
        share = HOT_CACHE_SHARE[self.shape.k_bits]
        whole = page / (1 - share)
        share *= whole / (whole + bytes_beside_page)
        page += bytes_beside_page
        hot = available * share if hot_cache_gib == "auto" else float(hot_cache_gib) * 2**30
        slots = int(hot) // self.slot_bytes
        pages = max(0, min(most, (available - slots * self.slot_bytes) // page))
        if hot_cache_gib == "auto":
            slots = min((available - pages * page) // self.slot_bytes, pages * self._rows_of_page)
        return pages, slots

    def least_slots(
        self, k_page_bytes: int, pages: int, hot_cache_gib: float | Literal["auto"]
    ) -> int:
        """Slots of the hot cache where the number of pages is given: those of GPU memory that is
        just enough for as many. Arguments as those of `plan`."""
        available = pages * k_page_bytes + self.row_table_bytes
        return self.plan(available, k_page_bytes, pages, hot_cache_gib)[1]

    @property
    def _rows_of_page(self) -> int:
        """Rows of one page in all layers: more slots than there are rows hold nothing."""
        return self.shape.num_layers * self.shape.rows_per_page

    def _workspace_bytes(self, max_requests: int) -> int:
        buffers = workspace_buffers(
            self.shape, self.selection, max_requests, self.max_blocks, self.limits.decode_tokens
        )
        return sum(size * dtype.itemsize for size, dtype in buffers.values())
