# SPDX-License-Identifier: Apache-2.0
"""The split cache on the CPU: the reference steps, run by the real engine.

Here both memories are the same RAM, so nothing is saved; it is the definition of correct, the test
bed, and a way to try the settings of a model without a GPU.
"""

from __future__ import annotations

import torch

from vllm_kcache import ops
from vllm_kcache.integration.metadata import KCacheMetadata
from vllm_kcache.integration.runtime import LayerInputs, Runtime
from vllm_kcache.reference.full import attend_full
from vllm_kcache.reference.write import update_page_means
from vllm_kcache.types import Tail


class CPURuntime(Runtime):
    """Runs every step through `ops` on CPU tensors."""

    def allocate(self, num_pages: int) -> None:
        super().allocate(num_pages)
        self.page_means: list[torch.Tensor] | None = None
        if self.config.tail == "mean":
            shape = self.shape
            size = (num_pages, shape.num_kv_heads, shape.head_size)
            self.page_means = [torch.zeros(size) for _ in shape.layer_names]

    def supported_tails(self) -> tuple[Tail, ...]:
        # Means are kept up as V is written: they cannot start in the middle.
        tails = super().supported_tails()
        return tails if self.page_means is None else (*tails, "mean")

    def run_layer(self, inputs: LayerInputs, step: KCacheMetadata, output: torch.Tensor) -> None:
        v_pool = self.v_pool(inputs.name, inputs.k_pages.shape[0])
        self._write(inputs, v_pool, step.slot_mapping)
        decodes = step.num_decodes
        if decodes:
            self._decode(inputs, v_pool, step, output[:decodes])
        if step.num_prefills:
            first = int(step.query_start_loc_cpu[decodes])
            last = int(step.query_start_loc_cpu[decodes + step.num_prefills])
            attend_full(
                inputs.query[first:last],
                inputs.k_pages,
                v_pool,
                step.block_table[decodes:],
                step.query_start_loc_cpu[decodes:] - first,
                step.seq_lens[decodes:],
                inputs.scale,
                out=output[first:last],
            )

    def _write(self, inputs: LayerInputs, v_pool: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        if inputs.key is None or inputs.value is None:
            return
        tokens = slot_mapping.shape[0]
        ops.write_kv(
            inputs.key[:tokens], inputs.value[:tokens], slot_mapping, inputs.k_pages, v_pool
        )
        means = self._means(inputs.name)
        if means is not None:
            update_page_means(v_pool, slot_mapping, means)

    def _decode(
        self,
        inputs: LayerInputs,
        v_pool: torch.Tensor,
        step: KCacheMetadata,
        output: torch.Tensor,
    ) -> None:
        """Score, select, fetch, attend: one query per request."""
        decodes, tokens = step.num_decodes, self.v_block_tokens
        query = inputs.query[:decodes]
        table, seq_lens = step.block_table[:decodes], step.seq_lens[:decodes]
        max_blocks = -(-int(seq_lens.max()) // tokens)
        block_lse = ops.score_blocks(
            query, inputs.k_pages, table, seq_lens, inputs.scale, tokens, max_blocks
        )
        selected = ops.select_blocks(
            block_lse, seq_lens, self.shape.num_kv_heads, tokens, self.selection
        )
        fetched = ops.fetch_blocks(selected, table, v_pool, tokens)
        ops.attend_blocks(
            query,
            inputs.k_pages,
            v_pool,
            fetched,
            selected,
            table,
            seq_lens,
            inputs.scale,
            tokens,
            self.config.resolved_tail,
            block_lse,
            v_page_means=self._means(inputs.name),
            out=output,
            clip=self.selection.clip,
        )
        row_bytes = tokens * self.shape.head_size * self.shape.dtype.itemsize
        self.counters.add_selection(selected.counts, selected.mass, row_bytes)

    def _means(self, layer_name: str) -> torch.Tensor | None:
        return None if self.page_means is None else self.page_means[self.layer_index[layer_name]]
