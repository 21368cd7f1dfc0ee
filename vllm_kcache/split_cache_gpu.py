# SPDX-License-Identifier: Apache-2.0
"""The split cache on a GPU: captured decode steps, exact prefill, V moved by the GPU itself."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.cache.hot_cache import HotCache
from vllm_kcache.cache.layer_view import LayerView
from vllm_kcache.config import KCacheConfig, KCacheConfigError
from vllm_kcache.kernels.decode import decode_step, plan_followers
from vllm_kcache.kernels.rows import write_rows
from vllm_kcache.kernels.score_plan import chunk_blocks
from vllm_kcache.kernels.select import packed_view
from vllm_kcache.kernels.transfer import ContextPiece, PrefillTransfer, plan_pieces
from vllm_kcache.kernels.workspace import DecodeBatch, DecodeWorkspace
from vllm_kcache.kernels.write import WriteParts, write_kv
from vllm_kcache.memory import GPUMemory, StepLimits
from vllm_kcache.reference.sinks import share_of_tokens
from vllm_kcache.split_cache import Figures, LayerInputs, SplitCache, Step

# V of so small a prefill (a layer's, bytes) is stored by the kernel that stores K: that takes the
# link 20 us, and a copy behind the computation costs more than that to launch.
SMALL_V_BYTES = 1 << 20
# Where it is more.
ALL_BUT_HOST = WriteParts.K | WriteParts.ROW_SLOT


@dataclass(frozen=True)
class Ragged:
    """Where the requests of a batch begin.

    Attributes:
        first_rows: [R + 1] int32, GPU.
        max_length: Longest request, tokens (host).
        lengths: Tokens of each request (host); only the torch and xformers kernels need it.
    """

    first_rows: torch.Tensor
    max_length: int
    lengths: tuple[int, ...]


# Output [Tq, Hq, D] model dtype and log-sum-exp [Hq, Tq] float32, GPU.
Attended = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class PrefillKernels:
    """Exact attention of ragged batches, from vLLM or xformers (integration/prefill.py).

    Attributes:
        name: As `kcache_config.prefill` names it.
        attend: query, keys, values, ragged queries, ragged keys, causal, scale, soft cap ->
            `Attended`.
        merge: attention to the union of two sets of keys, from the attention to each.
    """

    name: str
    attend: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, Ragged, Ragged, bool, float, float | None],
        Attended,
    ]
    merge: Callable[[Attended, Attended], Attended]


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
    queries: Ragged
    page_table: torch.Tensor
    pieces: tuple[ContextPiece, ...]
    keys: tuple[Ragged, ...]


class GPUSplitCache(SplitCache):
    """Runs decode steps through the kernels and prefills through FlashAttention.

    Takes `memory.fixed_bytes` of GPU memory when it is made: before vLLM profiles, which then
    counts them.

    Args:
        config, shape, figures, device: as for `SplitCache`.
        limits: What a step may hold.
        prefill: Kernels of exact attention.
    """

    def __init__(
        self,
        config: KCacheConfig,
        shape: CacheShape,
        figures: Figures,
        device: torch.device,
        limits: StepLimits,
        prefill: PrefillKernels,
    ) -> None:
        super().__init__(config, shape, figures, device)
        self.memory = GPUMemory(shape, self.selection, limits)
        self.prefill = prefill
        # Slots of the hot cache; decided when the memory for pages is known.
        self.hot_slots: int | None = None
        self.hot_cache: HotCache | None = None
        # While vLLM measures the memory of graphs it runs on a tiny cache, before the real one.
        self.is_final = False
        # Decode steps that ran outside a graph.
        self.eager_decode_steps = 0
        # See `before_step`.
        self._store_at_once = False
        self.workspace = self._make_workspace()
        self.transfer = PrefillTransfer(
            shape, limits.max_tokens, self.memory.scratch_tokens, device
        )

    def _make_workspace(self) -> DecodeWorkspace:
        memory = self.memory
        return DecodeWorkspace.make(
            self.shape, self.selection, memory.group_requests, memory.max_blocks, self.device,
            memory.limits.decode_tokens,
        )  # fmt: skip

    def allocate(self, num_pages: int) -> None:
        super().allocate(num_pages)
        shape = self.shape
        self.hot_cache = HotCache.make(
            self.hot_slots or 0,
            shape.num_layers,
            num_pages * shape.rows_per_page,
            shape.row.bytes,
            self.device,
        )
        self.transfer.set_num_slots(num_pages * shape.page_tokens)

    def _make_view(self, layer: int, k_pages: torch.Tensor) -> LayerView:
        rows = k_pages.shape[0] * self.shape.rows_per_page
        if not self.is_final and (self.pool is None or self.pool.num_rows != rows):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("The host pool must exist before a graph is captured.")
            self.allocate(k_pages.shape[0])
        view = super()._make_view(layer, k_pages)
        assert self.hot_cache is not None  # made with the pool
        view = replace(view, hot_cache=self.hot_cache)
        return replace(view, packed=packed_view(view))

    @property
    def prefill_name(self) -> str:
        return self.prefill.name

    def _check_tail(self, config: KCacheConfig) -> None:
        if config.resolved_tail == "clip" and self._started.resolved_tail != "clip":
            raise KCacheConfigError(
                "kcache_config.tail='clip': this engine has no buffers for it; start it with a "
                "mass_threshold"
            )

    def invalidate(self) -> None:
        """Forget every row in the hot cache: the host pool was written around it, or pages were
        discarded."""
        if self.hot_cache is not None:
            self.hot_cache.flush()

    def before_step(self, store_at_once: bool = False) -> None:
        """Order the coming step after V that is still on its way to the host.

        Args:
            store_at_once: Rows of this step's prompts are to be on the host before its decodes look
                for theirs: a request may decode in the step that gives it pages of the prefix
                cache, which a prompt may be filling.
        """
        self.transfer.fence()
        self.transfer.end_step()
        self._store_at_once = store_at_once

    def close(self) -> None:
        if self.pool is not None:
            torch.cuda.synchronize(self.device)
        super().close()
        self.hot_cache = None

    def attend(
        self, layer: int, k_pages: torch.Tensor, inputs: LayerInputs, step: Step, out: torch.Tensor
    ) -> None:
        view = self.view(layer, k_pages)
        if step.num_prefills and step.plan is None:
            step.plan = self._plan(step)
        written = self._write(view, inputs, step)
        if step.num_decodes:
            if layer == 0 and not torch.cuda.is_current_stream_capturing():
                self.eager_decode_steps += 1
            self._decode(view, inputs, step, out, written)
        if step.num_prefills:
            self._prefill(view, inputs, step.plan, out)

    def _write(self, view: LayerView, inputs: LayerInputs, step: Step) -> bool:
        """K and resident rows now; rows of long prefills to the host behind the computation.

        Returns:
            Whether the last launch wrote what the decodes need, and no more. A request of one new
            token may share pages that a prefill of the same step writes.
        """
        if inputs.key is None or inputs.value is None:
            return False
        slots = step.slot_mapping
        tokens, decodes = slots.shape[0], step.num_decodes
        key, value = inputs.key[:tokens], inputs.value[:tokens]
        coded = self.shape.row.has_keys
        # Rows that hold K are most of what a request reads: they stay while there is room.
        store: Callable[..., None] = (
            functools.partial(write_rows, fills=True) if coded else write_kv
        )
        is_small = (tokens - decodes) * self.shape.token_bytes * (1 + coded) <= SMALL_V_BYTES
        if is_small or self._store_at_once:
            store(
                view, key, value, slots, allocate_tokens=decodes,
                dependent=self.workspace.dependent,
            )  # fmt: skip
            return not step.num_prefills
        if decodes:
            store(view, key[:decodes], value[:decodes], slots[:decodes], allocate_tokens=decodes)
        store(view, key[decodes:], value[decodes:], slots[decodes:], parts=ALL_BUT_HOST)
        self.transfer.store(view, key[decodes:], value[decodes:], slots[decodes:])
        return False

    def _decode(
        self, view: LayerView, inputs: LayerInputs, step: Step, out: torch.Tensor, written: bool
    ) -> None:
        """Score, select, fetch, attend, for a group of rows at a time."""
        # Scoring takes what was written just before to lie in the last two chunks of a row.
        chunk_tokens = chunk_blocks(self.shape) * self.shape.block_tokens
        written = written and self.memory.limits.decode_tokens < chunk_tokens
        max_blocks = min(self.memory.max_blocks, self.shape.score_columns(step.max_seq_len))
        group = self.workspace.max_requests
        for first in range(0, step.num_decodes, group):
            rows = slice(first, min(first + group, step.num_decodes))
            batch = DecodeBatch(
                inputs.query[rows], step.block_table[rows], step.seq_lens[rows], inputs.scale,
                max_blocks, None if step.spans is None else step.spans[rows],
                self.memory.limits.decode_tokens, inputs.sinks, inputs.soft_cap,
            )  # fmt: skip
            followers = None
            if batch.scored_together(self.shape.group) == 1:
                followers = plan_followers(
                    self.shape, batch.num_requests, max_blocks, self.workspace.multiprocessors
                )
            decode_step(
                view, self.workspace, batch, out[rows], after_write=written and first == 0,
                followers=followers,
            )  # fmt: skip

    def _plan(self, step: Step) -> PrefillPlan:
        """Work out once what all layers of a step with prefills need."""
        assert step.seq_lens_cpu is not None
        first, count = step.num_decodes, step.num_prefills
        starts = step.query_start_loc_cpu[first : first + count + 1].tolist()
        queries = [after - before for before, after in itertools.pairwise(starts)]
        totals = step.seq_lens_cpu[first : first + count].tolist()
        contexts = [total - query for total, query in zip(totals, queries, strict=True)]
        page_tokens, scratch_tokens = self.shape.page_tokens, self.transfer.scratch_tokens
        pieces = plan_pieces(contexts, scratch_tokens, page_tokens, self.device)
        if pieces:
            self.transfer.begin_step(step.slot_mapping)
            if self.shape.row.has_keys and self.hot_cache is not None:
                # What the steps before have copied may be gathered from there (csrc/residency.cuh).
                self.hot_cache.advance_epoch()
        run = scratch_tokens // max(1, sum(map(bool, contexts))) // page_tokens * page_tokens
        keys = tuple(
            Ragged(
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
            Ragged(first_rows.int(), max(queries), tuple(queries)),
            step.block_table[first : first + count],
            tuple(pieces),
            keys,
        )

    def _prefill(
        self, view: LayerView, inputs: LayerInputs, plan: PrefillPlan, out: torch.Tensor
    ) -> None:
        """Exact attention of the chunks to themselves and to everything before them."""
        assert inputs.key is not None  # layers that share a cache are refused on a GPU
        assert inputs.value is not None
        rows = slice(plan.first_token, plan.first_token + plan.num_tokens)
        query, layer, attend = inputs.query[rows], view.index, self.prefill.attend
        if plan.pieces and not self.transfer.is_ahead((layer, 0)):
            self.transfer.gather_ahead((layer, 0), plan.pieces[0], view, plan.page_table)
        result = attend(
            query, inputs.key[rows], inputs.value[rows], plan.queries, plan.queries, True,
            inputs.scale, inputs.soft_cap,
        )  # fmt: skip
        for number, (piece, keys_at) in enumerate(zip(plan.pieces, plan.keys, strict=True)):
            keys, values = self.transfer.gather(
                (layer, number), piece, view, (inputs.key, inputs.value), plan.page_table
            )
            self._gather_next(layer, number, plan)
            part = attend(
                query, keys, values, plan.queries, keys_at, False, inputs.scale, inputs.soft_cap
            )
            self.transfer.release()
            result = self.prefill.merge(part, result)
        output, lse = result
        if inputs.sinks is not None:
            output = output * share_of_tokens(lse.T, inputs.sinks)[..., None]
        out[rows] = output

    def _gather_next(self, layer: int, number: int, plan: PrefillPlan) -> None:
        """Start on the piece after this one: of this layer, or the first of the next layer."""
        number += 1
        if number == len(plan.pieces):
            layer, number = layer + 1, 0
            if layer not in self._views:
                return
        self.transfer.gather_ahead(
            (layer, number), plan.pieces[number], self._views[layer], plan.page_table
        )
