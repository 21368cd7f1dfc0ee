# SPDX-License-Identifier: Apache-2.0
"""What an engine makes at start, without one: the builder of metadata, the layout of a cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from vllm_kcache.integration.metadata import KCacheMetadataBuilder


def builder_of(
    drafts: int, page_tokens: int, max_requests: int = 16, max_model_len: int = 512
) -> KCacheMetadataBuilder:
    """That of an engine for requests of up to so many drafts; 0 for one without."""
    speculation = SimpleNamespace(num_speculative_tokens=drafts, parallel_drafting=False)
    vllm_config = SimpleNamespace(
        speculative_config=speculation if drafts else None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_seqs=max_requests),
        model_config=SimpleNamespace(max_model_len=max_model_len),
    )
    spec = SimpleNamespace(block_size=page_tokens)
    return KCacheMetadataBuilder(spec, ["layer"], vllm_config, torch.device("cpu"))


def configs_of(vllm_config: Any, made: list[dict[str, Any]], available: int) -> list[Any]:
    """vLLM's configuration of each rank, with so many bytes each."""
    from vllm_kcache.integration.pools import planning

    # vLLM 0.33 groups layers beforehand.
    group = getattr(planning, "get_global_kv_cache_groups", None)
    groups = [] if group is None else [group(vllm_config, made)]
    return planning.get_kv_cache_configs(vllm_config, made, [available] * len(made), *groups)
