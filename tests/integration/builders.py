# SPDX-License-Identifier: Apache-2.0
"""The builder of metadata as an engine makes it, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

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
