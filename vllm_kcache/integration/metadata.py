# SPDX-License-Identifier: Apache-2.0
"""What a layer needs to know about a step: decodes first, prefills after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from vllm_kcache.integration import refusals
from vllm_kcache.split_cache import Step


@dataclass
class KCacheMetadata(Step, AttentionMetadata):
    """One step, shared by all layers of a KV cache group.

    Attributes:
        num_actual_tokens: Tokens of the step, padding of a graph included.
        max_query_len: Longest query, tokens.
        token_order: [tokens] int64, on the device. Where the batch came with a prompt's last token
            before decodes, the tokens in the order of the fields of `Step`; otherwise None.
    """

    num_actual_tokens: int
    max_query_len: int
    token_order: torch.Tensor | None = None


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
            refusals.refuse("not_causal")
        prefilling = common.is_prefilling
        if prefilling is not None and prefilling.shape[0] < common.num_reqs:
            # A batch padded for a graph: rows past the real ones prefill nothing.
            prefilling = torch.zeros(common.num_reqs, dtype=torch.bool)
            prefilling[: common.is_prefilling.shape[0]] = common.is_prefilling
            common = common.replace(is_prefilling=prefilling)
        order = None
        if prefilling is not None:
            order = decodes_first(common.query_start_loc_cpu, prefilling)
        token_order = None
        if order is not None:
            common, token_order = _reorder(common, order)
        num_decodes, num_prefills, _, _ = split_decodes_and_prefills(
            common, decode_threshold=1, treat_short_extends_as_decodes=prefilling is None
        )
        return KCacheMetadata(
            num_decodes=num_decodes,
            num_prefills=num_prefills,
            max_seq_len=common.max_seq_len,
            query_start_loc=common.query_start_loc,
            query_start_loc_cpu=common.query_start_loc_cpu,
            seq_lens=common.seq_lens,
            seq_lens_cpu=common.seq_lens_cpu_upper_bound,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            token_order=token_order,
        )


def decodes_first(query_start_loc: torch.Tensor, prefilling: torch.Tensor) -> torch.Tensor | None:
    """Order of a batch's leading requests of one token that puts decodes before prompts.

    vLLM sorts a step's requests by their tokens alone. A prompt of which one token is left may so
    come before requests that decode, and all of those would count as prompts, whose whole V is
    read.

    Args:
        query_start_loc: [requests + 1] int32, host.
        prefilling: [requests] bool, host. Whether the request still prefills.

    Returns:
        [n] int64, host: the first n requests, each of one token, in their new order. None where the
        decodes are first already.
    """
    if not bool(prefilling.any()):
        return None
    single = query_start_loc.diff() == 1
    leading = int((~single).int().argmax()) if not bool(single.all()) else single.shape[0]
    early = prefilling[:leading]
    if not bool((early[:-1] & ~early[1:]).any()):
        return None
    return torch.argsort(early.int(), stable=True)


def _reorder(
    common: CommonAttentionMetadata, order: torch.Tensor
) -> tuple[CommonAttentionMetadata, torch.Tensor]:
    """The batch with its first requests, of one token each, in this order; and that of its tokens.

    Args:
        common: vLLM's metadata of the batch.
        order: from `decodes_first`.

    Returns:
        The metadata, and [tokens] int64 on the device.
    """
    device = common.seq_lens.device
    rows = torch.arange(common.num_reqs)
    rows[: order.shape[0]] = order
    # Only requests of one token change places, so a row of them is a token of them.
    tokens = torch.arange(common.num_actual_tokens)
    tokens[: order.shape[0]] = order
    rows_there, tokens_there = (x.to(device, non_blocking=True) for x in (rows, tokens))
    upper = common.seq_lens_cpu_upper_bound
    reordered = common.replace(
        is_prefilling=common.is_prefilling[rows],
        seq_lens=common.seq_lens[rows_there],
        seq_lens_cpu_upper_bound=None if upper is None else upper[rows],
        block_table_tensor=common.block_table_tensor[rows_there],
        slot_mapping=common.slot_mapping[tokens_there],
    )
    return reordered, tokens_there
