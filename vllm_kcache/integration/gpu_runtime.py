# SPDX-License-Identifier: Apache-2.0
"""The split cache on a GPU: captured decode steps, exact prefill, V moved by the GPU itself."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_kcache.cache.context import ContextPiece, PrefillTransfer, plan_pieces
from vllm_kcache.cache.hot_cache import HotCache
from vllm_kcache.config import KCacheConfig
from vllm_kcache.integration import prefill
from vllm_kcache.integration.counters import Counters
from vllm_kcache.integration.metadata import KCacheMetadata
from vllm_kcache.integration.runtime import LayerInputs, PageShape, Runtime
from vllm_kcache.kernels.decode import DecodeWorkspace, decode_step
from vllm_kcache.kernels.self_check import LayerShape
from vllm_kcache.kernels.write import WriteParts, write_kv
from vllm_kcache.types import Tail

logger = init_logger(__name__)

# Requests that share one set of decode buffers; more of them decode one group after the other.
# Fewer where contexts are so long that the buffers would pass WORKSPACE_BYTES.
GROUP_REQUESTS = 64
WORKSPACE_BYTES = 256 << 20
# Bytes of one gathered piece of V (and as many for K) while a prompt chunk attends to its context.
PIECE_BYTES = 64 << 20
# V of so small a prefill (a layer's, bytes) is stored by the kernel that stores K: that takes the
# link 20 us, and a copy behind the computation costs more than that to launch.
SMALL_V_BYTES = 1 << 20
# Share of the memory for K pages that the hot V cache takes when its size is "auto": where the
# planner finds the most throughput with the default selection (docs/plan.md).
HOT_CACHE_SHARE = 0.07


@dataclass(frozen=True)
class PrefillPlan:
    """What all layers of a step share.

    Attributes:
        first_token: Token of the step where the prefills begin.
        num_tokens: Tokens of the prefills.
        queries: Where each request's chunk begins.
        page_table: [R, MB] int32, GPU.
        pieces: The contexts, cut to fit the scratch.
        keys: Where each run of a piece begins, for the kernel.
    """

    first_token: int
    num_tokens: int
    queries: prefill.Ragged
    page_table: torch.Tensor
    pieces: tuple[ContextPiece, ...]
    keys: tuple[prefill.Ragged, ...]


@dataclass(frozen=True)
class GPULimits:
    """What the engine may ask of one step.

    Attributes:
        max_requests: Most requests of a step.
        max_tokens: Most tokens of a step.
        max_model_len: Longest request, tokens.
    """

    max_requests: int
    max_tokens: int
    max_model_len: int


class GPURuntime(Runtime):
    """Runs decode steps through the kernels and prefills through FlashAttention.

    Takes `fixed_bytes` of GPU memory when it is made: before vLLM profiles, which then counts them.

    Args:
        config, shape, counters, device: as for `Runtime`.
        num_query_heads: Hq of this rank.
        limits: What a step may hold.
    """

    def __init__(
        self,
        config: KCacheConfig,
        shape: PageShape,
        counters: Counters,
        device: torch.device,
        num_query_heads: int,
        limits: GPULimits,
    ) -> None:
        super().__init__(config, shape, counters, device)
        self.num_query_heads = num_query_heads
        self.limits = limits
        self.token_bytes = shape.num_kv_heads * shape.head_size * shape.dtype.itemsize
        # Every request of a step may prefill with context: each needs a page of the scratch.
        pages = max(PIECE_BYTES // self.token_bytes // shape.page_tokens, limits.max_requests)
        self.scratch_tokens = pages * shape.page_tokens
        self.kernel_name, self.kernel = prefill.choose(config.prefill, shape.head_size, shape.dtype)
        logger.info("KCache: prompts attend through %s.", self.kernel_name)
        self.hot_slots = 0
        self.is_final = False
        self.hot_cache: HotCache | None = None
        self.workspace = DecodeWorkspace.make(**self._workspace_arguments(), device=device)
        self.transfer = PrefillTransfer(*self._transfer_arguments(), device)
        # The GPU writes its counts where the API server reads them, so that they are there when a
        # step's tokens are, and no step has to come to fetch those of the step before.
        self._counter_words = counters.gpu_words(row_bytes=self.slot_bytes - 8)
        counters.lock(self, self._counter_words)

    def layer_shape(self) -> LayerShape:
        """What decides the kernels of a split layer."""
        shape = self.shape
        return LayerShape(
            self.num_query_heads, shape.num_kv_heads, shape.head_size, shape.page_tokens,
            self.v_block_tokens, shape.dtype, self.selection, self.config.resolved_tail,
        )  # fmt: skip

    def supported_tails(self) -> tuple[Tail, ...]:
        # The clipped tail needs twice the buffers.
        tails = super().supported_tails()
        return tails if self.workspace.attend.clipped else tuple(t for t in tails if t != "clip")

    # Memory ----------------------------------------------------------------------------------

    @property
    def max_blocks(self) -> int:
        """P of the longest request."""
        return -(-self.limits.max_model_len // self.v_block_tokens)

    @property
    def rows_per_page(self) -> int:
        """Physical V blocks of one page of one layer."""
        return self.shape.num_kv_heads * self.shape.page_tokens // self.v_block_tokens

    @property
    def slot_bytes(self) -> int:
        """GPU bytes of one hot V block: its values and its word."""
        return self.v_block_tokens * self.shape.head_size * self.shape.dtype.itemsize + 8

    def bytes_per_page(self) -> int:
        """GPU bytes that each page costs besides K: the residency table and the step's slots."""
        return 4 * (len(self.shape.layer_names) * self.rows_per_page + self.shape.page_tokens)

    def fixed_bytes(self) -> int:
        """GPU bytes that do not depend on the number of pages, without the hot V cache."""
        workspace = DecodeWorkspace.bytes(**self._workspace_arguments())
        return workspace + PrefillTransfer.bytes(*self._transfer_arguments())

    def _transfer_arguments(self) -> tuple[int, int, int, int, torch.dtype]:
        shape = self.shape
        sizes = (shape.num_kv_heads, shape.head_size, shape.dtype)
        return self.limits.max_tokens, self.scratch_tokens, *sizes

    def plan_hot_cache(self, available_bytes: int) -> int:
        """Decide the number of hot V blocks; returns the GPU bytes they take.

        Args:
            available_bytes: What K pages, tables and the hot cache share.
        """
        setting = self.config.hot_cache_gib
        if setting == "auto":
            wanted = int(available_bytes * HOT_CACHE_SHARE)
        else:
            wanted = int(float(setting) * 2**30)
        self.hot_slots = max(1, wanted // self.slot_bytes)
        return self.hot_slots * self.slot_bytes

    def _workspace_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "max_requests": 1,
            "num_query_heads": self.num_query_heads,
            "num_kv_heads": self.shape.num_kv_heads,
            "head_size": self.shape.head_size,
            "max_blocks": self.max_blocks,
            "selection": self.selection,
            "with_miss_list": True,
            "chunk_blocks": self.layer_shape().chunk_blocks,
        }
        # Part of the buffers does not depend on the number of requests.
        one = DecodeWorkspace.bytes(**arguments)
        each = DecodeWorkspace.bytes(**{**arguments, "max_requests": 2}) - one
        room = 1 + max(0, WORKSPACE_BYTES - one) // each
        arguments["max_requests"] = min(GROUP_REQUESTS, self.limits.max_requests, room)
        return arguments

    def allocate(self, num_pages: int) -> None:
        super().allocate(num_pages)
        shape = self.shape
        self.hot_cache = HotCache.make(
            max(1, self.hot_slots),
            len(shape.layer_names),
            num_pages * self.rows_per_page,
            self.v_block_tokens,
            shape.head_size,
            shape.dtype,
            self.device,
        )
        self.transfer.set_num_slots(num_pages * shape.page_tokens)

    def v_pool(self, layer_name: str, num_pages: int) -> torch.Tensor:
        # While vLLM measures the memory of graphs it runs on a tiny cache, before the real one.
        if not self.is_final and (self.pool is None or self.pool.layer_shape[0] != num_pages):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("The host V pool must exist before a graph is captured.")
            self.allocate(num_pages)
        return super().v_pool(layer_name, num_pages)

    def fill_host_pool(self, std: float) -> None:
        super().fill_host_pool(std)
        if self.hot_cache is not None:
            # V was stored around `write_kv`.
            self.hot_cache.flush()

    def close(self) -> None:
        if self.pool is not None:
            torch.cuda.synchronize(self.device)
        super().close()
        self.hot_cache = None

    # Figures ---------------------------------------------------------------------------------

    def publish_counters(self) -> None:
        """Have the GPU write the kernels' counters to the shared file, behind what is queued."""
        if self.hot_cache is not None:
            self._counter_words.copy_(self.hot_cache.counters, non_blocking=True)

    def reset_counters(self) -> None:
        """Forget what was counted so far."""
        if self.hot_cache is not None:
            self.hot_cache.counters.zero_()
        self.publish_counters()
        self.counters["eager_decode_steps"] = 0

    def before_step(self) -> None:
        """Order the coming step after V that is still on its way to the host."""
        self.transfer.fence()
        self.transfer.end_step()

    def run_layer(self, inputs: LayerInputs, step: KCacheMetadata, output: torch.Tensor) -> None:
        v_pool = self.v_pool(inputs.name, inputs.k_pages.shape[0])
        layer = self.layer_index[inputs.name]
        if step.num_prefills and step.plan is None:
            step.plan = self._plan(step)
        written = self._write(inputs, layer, v_pool, step)
        if step.num_decodes:
            if layer == 0 and not torch.cuda.is_current_stream_capturing():
                self.counters["eager_decode_steps"] += 1
            self._decode(inputs, layer, v_pool, step, output, written)
        if step.num_prefills:
            self._prefill(inputs, layer, v_pool, step.plan, output)

    def _write(
        self, inputs: LayerInputs, layer: int, v_pool: torch.Tensor, step: KCacheMetadata
    ) -> bool:
        """K and resident V now; V of long prefills to the host behind the computation.

        Returns:
            Whether the last launch wrote what the decodes need, and no more. A request of one new
            token may share pages that a prefill of the same step writes.
        """
        if inputs.key is None or inputs.value is None:
            return False
        slots = step.slot_mapping
        tokens, decodes = slots.shape[0], step.num_decodes
        key, value = inputs.key[:tokens], inputs.value[:tokens]
        if (tokens - decodes) * self.token_bytes <= SMALL_V_BYTES:
            write_kv(
                key, value, slots, inputs.k_pages, v_pool, self.hot_cache, layer,
                allocate_tokens=decodes, dependent=self.workspace.dependent,
            )  # fmt: skip
            return not step.num_prefills
        if decodes:
            write_kv(
                key[:decodes], value[:decodes], slots[:decodes], inputs.k_pages, v_pool,
                self.hot_cache, layer, allocate_tokens=decodes,
            )  # fmt: skip
        write_kv(
            key[decodes:], value[decodes:], slots[decodes:], inputs.k_pages, v_pool,
            self.hot_cache, layer, parts=WriteParts.K | WriteParts.V_SLOT,
        )  # fmt: skip
        self.transfer.store(value[decodes:], slots[decodes:], v_pool)
        return False

    def _decode(
        self,
        inputs: LayerInputs,
        layer: int,
        v_pool: torch.Tensor,
        step: KCacheMetadata,
        output: torch.Tensor,
        written: bool,
    ) -> None:
        """Score, select, fetch, attend, for a group of requests at a time."""
        assert self.hot_cache is not None
        max_blocks = min(self.max_blocks, -(-step.max_seq_len // self.v_block_tokens))
        group = self.workspace.max_requests
        for first in range(0, step.num_decodes, group):
            rows = slice(first, min(first + group, step.num_decodes))
            decode_step(
                self.workspace, inputs.query[rows], inputs.k_pages, v_pool,
                step.block_table[rows], step.seq_lens[rows], inputs.scale, self.v_block_tokens,
                max_blocks, self.selection, self.config.resolved_tail, self.hot_cache, layer,
                output[rows], after_write=written and first == 0,
            )  # fmt: skip

    def _plan(self, step: KCacheMetadata) -> PrefillPlan:
        """Work out once what all layers of a step with prefills need."""
        assert step.seq_lens_cpu is not None
        first, count = step.num_decodes, step.num_prefills
        starts = step.query_start_loc_cpu[first : first + count + 1].tolist()
        queries = [after - before for before, after in itertools.pairwise(starts)]
        totals = step.seq_lens_cpu[first : first + count].tolist()
        contexts = [total - query for total, query in zip(totals, queries, strict=True)]
        pieces = plan_pieces(contexts, self.scratch_tokens, self.shape.page_tokens, self.device)
        if pieces:
            self.transfer.begin_step(step.slot_mapping)
        run = self.scratch_tokens // max(1, sum(map(bool, contexts)))
        run = run // self.shape.page_tokens * self.shape.page_tokens
        keys = tuple(
            prefill.Ragged(
                piece.first_rows,
                piece.max_length,
                tuple(max(0, min(run, length - number * run)) for length in contexts),
            )
            for number, piece in enumerate(pieces)
        )
        first_rows = step.query_start_loc[first : first + count + 1] - starts[0]
        return PrefillPlan(
            starts[0],
            starts[-1] - starts[0],
            prefill.Ragged(first_rows.int(), max(queries), tuple(queries)),
            step.block_table[first : first + count],
            tuple(pieces),
            keys,
        )

    def _prefill(
        self,
        inputs: LayerInputs,
        layer: int,
        v_pool: torch.Tensor,
        plan: PrefillPlan,
        output: torch.Tensor,
    ) -> None:
        """Exact attention of the chunks to themselves and to everything before them."""
        assert inputs.key is not None  # layers that share a cache are refused (split_layers)
        assert inputs.value is not None
        rows = slice(plan.first_token, plan.first_token + plan.num_tokens)
        query = inputs.query[rows]
        if plan.pieces and not self.transfer.is_ahead((layer, 0)):
            self.transfer.gather_ahead((layer, 0), plan.pieces[0], v_pool, plan.page_table)
        result = self.kernel(
            query, inputs.key[rows], inputs.value[rows], plan.queries, plan.queries, True,
            inputs.scale,
        )  # fmt: skip
        for number, (piece, keys_at) in enumerate(zip(plan.pieces, plan.keys, strict=True)):
            keys, values = self.transfer.gather(
                (layer, number), piece, inputs.k_pages, v_pool, inputs.value, plan.page_table
            )
            self._gather_next(layer, number, plan)
            part = self.kernel(query, keys, values, plan.queries, keys_at, False, inputs.scale)
            self.transfer.release()
            result = prefill.merge(part, result)
        output[rows] = result[0]

    def _gather_next(self, layer: int, number: int, plan: PrefillPlan) -> None:
        """Start on the piece after this one: of this layer, or the first of the next layer."""
        assert self.pool is not None
        number += 1
        if number == len(plan.pieces):
            layer, number = layer + 1, 0
            if layer == self.pool.num_layers:
                return
        self.transfer.gather_ahead(
            (layer, number), plan.pieces[number], self.pool.layer(layer), plan.page_table
        )
