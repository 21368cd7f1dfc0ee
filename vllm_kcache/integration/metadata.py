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


@dataclass(frozen=True)
class TokenRows:
    """A row for each token of the requests that decode, where a request may bring several: at
    addresses that a captured graph keeps.

    Attributes:
        seq_lens: [rows] int32, on the device. Tokens up to a row's own; 0 marks a padded row.
        block_table: [rows, MB] int32, on the device. That of its request.
        places: [rows + 1] int32, on the device. 0, 1, 2 and so on.
        spans: [rows, 2] int32, on the device. As `Step.spans`; 0 of a padded row.
    """

    seq_lens: torch.Tensor
    block_table: torch.Tensor
    places: torch.Tensor
    spans: torch.Tensor

    @classmethod
    def make(cls, rows: int, pages: int, device: torch.device) -> TokenRows:
        """Room for so many rows, of requests of so many pages: `GPUMemory.row_table_bytes`."""
        return cls(
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.zeros((rows, pages), dtype=torch.int32, device=device),
            torch.arange(rows + 1, dtype=torch.int32, device=device),
            torch.zeros((rows, 2), dtype=torch.int32, device=device),
        )

    def fill(self, common: CommonAttentionMetadata, count: int) -> None:
        """Make the first rows those of a batch's first tokens, by what the device knows alone.

        K and V of all tokens are stored before any of them attends, and each sees as many as its
        request has up to it: so they are causal among themselves, and what a draft leaves behind
        that is not accepted lies past the length of all that read before it is overwritten.

        Args:
            common: vLLM's metadata of the batch.
            count: Rows; those of no token of the batch are padding.
        """
        starts, ends = common.query_start_loc[:-1], common.query_start_loc[1:]
        places = self.places[:count]
        request = torch.searchsorted(ends, places, right=True).clamp_(max=common.num_reqs - 1)
        # Tokens of its request that come after each one; negative behind the last of the batch.
        after = ends[request] - 1 - places
        of_row = torch.stack([places - starts[request], after, common.seq_lens[request] - after])
        of_row.masked_fill_(after < 0, 0)
        self.spans[:count] = of_row[:2].T
        self.seq_lens[:count] = of_row[2]
        columns = min(self.block_table.shape[1], common.block_table_tensor.shape[1])
        torch.index_select(
            common.block_table_tensor[:, :columns], 0, request,
            out=self.block_table[:count, :columns],
        )  # fmt: skip


class KCacheMetadataBuilder(AttentionMetadataBuilder[KCacheMetadata]):
    """Builds `KCacheMetadata` from vLLM's common metadata."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    # A request of at most so many query tokens decodes, unless it still prefills; the runner puts
    # those first. With speculative decoding a request brings its last token and the drafts.
    reorder_batch_threshold: int = 1

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._rows: TokenRows | None = None
        if self.reorder_batch_threshold > 1:
            self._rows = TokenRows.make(
                vllm_config.scheduler_config.max_num_seqs * self.reorder_batch_threshold,
                -(-vllm_config.model_config.max_model_len // kv_cache_spec.block_size),
                device,
            )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> KCacheMetadata:
        """Split the batch into decodes and prefills.

        A request that still prefills counts as prefill even with one token left, so that its
        attention is exact; but beside states vLLM's second runner says that it decodes, and a
        captured decode graph, which vLLM may replay for a batch of short requests, holds decodes
        only. Of a request that verifies drafts each token decodes.
        """
        common, threshold, rows = common_attn_metadata, self.reorder_batch_threshold, self._rows
        if common.causal is not True:
            refusals.refuse("not_causal")
        is_short = common.max_query_len <= threshold
        if rows is not None and is_short:
            # For all of the batch, in vLLM's order: a graph that may be replayed reads it there,
            # whatever is found below.
            rows.fill(common, common.num_reqs * threshold)
        prefilling = common.is_prefilling
        if prefilling is not None and prefilling.shape[0] < common.num_reqs:
            # A batch padded for a graph: rows past the real ones prefill nothing.
            prefilling = torch.zeros(common.num_reqs, dtype=torch.bool)
            prefilling[: common.is_prefilling.shape[0]] = common.is_prefilling
            common = common.replace(is_prefilling=prefilling)
        order = None
        if prefilling is not None:
            order = decodes_first(common.query_start_loc_cpu, prefilling, threshold)
        token_order = None
        if order is not None:
            common, token_order = _reorder(common, order)
        num_decodes, num_prefills, decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=threshold, treat_short_extends_as_decodes=prefilling is None
        )
        spans = None
        if rows is not None and num_decodes:
            if order is not None:
                rows = TokenRows.make(decode_tokens, rows.block_table.shape[1], self.device)
            if order is not None or not is_short:
                rows.fill(common, decode_tokens)
            # Without drafts each row is a request of its own, and the kernels are those of such.
            if decode_tokens > num_decodes:
                spans = rows.spans[:decode_tokens]
            common = _one_token_each(common, rows, num_decodes, decode_tokens)
            num_decodes = decode_tokens
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
            spans=spans,
        )


def decodes_first(
    query_start_loc: torch.Tensor, prefilling: torch.Tensor, threshold: int = 1
) -> torch.Tensor | None:
    """Order of a batch's leading short requests that puts decodes before prompts.

    vLLM sorts a step's requests by their tokens alone. A prompt of which one token is left may so
    come before requests that decode, and all of those would count as prompts, whose whole V is
    read.

    Args:
        query_start_loc: [requests + 1] int32, host.
        prefilling: [requests] bool, host. Whether the request still prefills.
        threshold: Most tokens of a short request.

    Returns:
        [n] int64, host: the first n requests, all of them short, in their new order. None where the
        decodes are first already.
    """
    if not bool(prefilling.any()):
        return None
    lengths = query_start_loc.diff()
    short = (lengths > 0) & (lengths <= threshold)
    leading = int((~short).int().argmax()) if not bool(short.all()) else short.shape[0]
    early = prefilling[:leading]
    if not bool((early[:-1] & ~early[1:]).any()):
        return None
    return torch.argsort(early.int(), stable=True)


def _reorder(
    common: CommonAttentionMetadata, order: torch.Tensor
) -> tuple[CommonAttentionMetadata, torch.Tensor]:
    """The batch with its first requests in this order; and that of its tokens.

    Args:
        common: vLLM's metadata of the batch.
        order: from `decodes_first`.

    Returns:
        The metadata, and [tokens] int64 on the device.
    """
    starts = common.query_start_loc_cpu
    rows = torch.arange(common.num_reqs)
    rows[: order.shape[0]] = order
    tokens = torch.arange(common.num_actual_tokens)
    spans = zip(starts[order].tolist(), starts[order + 1].tolist(), strict=True)
    moved = torch.cat([tokens[first:last] for first, last in spans])
    tokens[: moved.shape[0]] = moved
    new_starts = starts.clone()
    new_starts[1:] = starts.diff()[rows].cumsum(0)
    device = common.seq_lens.device
    tokens_there, starts_there = (x.to(device, non_blocking=True) for x in (tokens, new_starts))
    reordered = _of_requests(common, rows).replace(
        query_start_loc=starts_there,
        query_start_loc_cpu=new_starts,
        is_prefilling=common.is_prefilling[rows],
        slot_mapping=common.slot_mapping[tokens_there],
    )
    return reordered, tokens_there


def _one_token_each(
    common: CommonAttentionMetadata, rows: TokenRows, decodes: int, tokens: int
) -> CommonAttentionMetadata:
    """The batch with a request for each token of those that decode.

    Args:
        common: vLLM's metadata of the batch, decodes first.
        rows: Of its tokens. What is made of them alone stays at their addresses.
        decodes: Requests that decode.
        tokens: Their tokens, padding of a graph included.
    """
    starts, prefills = common.query_start_loc_cpu, common.num_reqs - decodes
    # Of a graph's padding no token is a request's.
    host_starts = torch.cat([torch.arange(tokens), starts[decodes:].clamp_min(tokens)]).int()
    each = common.replace(
        num_reqs=tokens + prefills,
        query_start_loc=rows.places[: tokens + 1],
        query_start_loc_cpu=host_starts,
        seq_lens=rows.seq_lens[:tokens],
        seq_lens_cpu_upper_bound=None,
        block_table_tensor=rows.block_table[:tokens],
    )
    if not prefills:
        return each
    upper, columns = common.seq_lens_cpu_upper_bound, rows.block_table.shape[1]
    if upper is not None:
        lengths = starts.diff()[:decodes]
        upper = torch.cat([upper[:decodes].repeat_interleave(lengths), upper[decodes:]])
    tables = each.block_table_tensor, common.block_table_tensor[decodes:, :columns]
    return each.replace(
        query_start_loc=torch.cat([rows.places[:tokens], common.query_start_loc[decodes:]]),
        seq_lens=torch.cat([each.seq_lens, common.seq_lens[decodes:]]),
        seq_lens_cpu_upper_bound=upper,
        block_table_tensor=torch.cat([table[:, : tables[1].shape[1]] for table in tables]),
    )


def _of_requests(common: CommonAttentionMetadata, rows: torch.Tensor) -> CommonAttentionMetadata:
    """The batch with what is known of each request in other rows; its tokens as they are.

    Args:
        common: vLLM's metadata of the batch.
        rows: [n] int64, host. The request of each new row.
    """
    rows_there = rows.to(common.seq_lens.device, non_blocking=True)
    upper = common.seq_lens_cpu_upper_bound
    return common.replace(
        seq_lens=common.seq_lens[rows_there],
        seq_lens_cpu_upper_bound=None if upper is None else upper[rows],
        block_table_tensor=common.block_table_tensor[rows_there],
    )
