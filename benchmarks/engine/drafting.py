# SPDX-License-Identifier: Apache-2.0
"""Drafts that are always there and as good as never right: steps of k + 1 tokens that make one."""

from __future__ import annotations

from typing import Any

DRAFT_TOKEN = 7


def speculation(num_drafts: int) -> dict[str, Any]:
    """vLLM's speculative_config for them. N-grams on the GPU: the only drafts that its second
    runner makes beside asynchronous scheduling without a model.
    """
    return {
        "method": "ngram_gpu",
        "num_speculative_tokens": num_drafts,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 1,
    }


def install() -> None:
    """Has the n-grams of engines of this process be `DRAFT_TOKEN`, over and over.

    What was last sampled, which vLLM drafts where no n-gram repeats, would at times be right.
    """
    from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator

    NgramGPUSpeculator.propose = propose


def propose(speculator: Any, input_batch: Any, *_: Any, **__: Any) -> Any:
    """[num_reqs, k] int64, GPU: drafts of a step's requests."""
    return speculator.drafts[: input_batch.num_reqs].fill_(DRAFT_TOKEN)
