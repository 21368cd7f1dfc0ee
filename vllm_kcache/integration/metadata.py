# SPDX-License-Identifier: Apache-2.0
"""What a layer needs to know about a step: decodes first, prefills after."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from vllm_kcache.config import KCacheConfigError


@dataclass
class KCacheMetadata(AttentionMetadata):
    """One step, shared by all layers of a KV cache group.

    The first `num_decodes` requests decode one token each; the others prefill.

    Attributes:
        num_decodes: Requests that decode. Under a CUDA graph padded rows count too.
        num_prefills: Requests that prefill.
        num_actual_tokens: Tokens of the step, padding of a graph included.
        max_query_len: Longest query, tokens.
        max_seq_len: Longest request, tokens; an upper bound.
        query_start_loc: [requests + 1] int32, on the device.
        query_start_loc_cpu: the same on the host.
        seq_lens: [requests] int32, on the device; 0 marks a padded row.
        seq_lens_cpu: [requests] int32, on the host; exact for rows that prefill.
        block_table: [requests, MB] int32, on the device.
        slot_mapping: [tokens] int64, on the device; -1 is padding.
        plan: What the runtime works out once per step for all layers.
    """

    num_decodes: int
    num_prefills: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor | None
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    plan: Any = field(default=None)


class KCacheMetadataBuilder(AttentionMetadataBuilder[KCacheMetadata]):
    """Builds `KCacheMetadata` from vLLM's common metadata."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )
    # One query token a request is a decode; the runner puts those first.
    reorder_batch_threshold: int | None = 1

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> KCacheMetadata:
        """Split the batch into decodes and prefills.

        A request that still prefills counts as prefill even with one token left, so that its
        attention is exact; but a captured decode graph, which vLLM may replay for a batch of one
        token each, holds decodes only.
        """
        common = common_attn_metadata
        if common.causal is not True:
            raise KCacheConfigError(
                "--kv-backend kcache does not support attention that is not causal: prefill is "
                "causal here. Serve this model with vLLM's own backend."
            )
        exact_short_prefills = common.is_prefilling is not None
        if exact_short_prefills and common.is_prefilling.shape[0] < common.num_reqs:
            # A batch padded for a graph: rows past the real ones prefill nothing.
            padded = torch.zeros(common.num_reqs, dtype=torch.bool)
            padded[: common.is_prefilling.shape[0]] = common.is_prefilling
            common = common.replace(is_prefilling=padded)
        num_decodes, num_prefills, _, _ = split_decodes_and_prefills(
            common,
            decode_threshold=1,
            treat_short_extends_as_decodes=not exact_short_prefills,
        )
        return KCacheMetadata(
            num_decodes=num_decodes,
            num_prefills=num_prefills,
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            query_start_loc=common.query_start_loc,
            query_start_loc_cpu=common.query_start_loc_cpu,
            seq_lens=common.seq_lens,
            seq_lens_cpu=common.seq_lens_cpu_upper_bound,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
        )
