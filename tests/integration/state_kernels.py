# SPDX-License-Identifier: Apache-2.0
"""An engine on a CPU whose Mamba layers forget rejected drafts, as vLLM's kernels of a GPU do.

vLLM's kernels of a CPU begin with the state after all tokens of the step before, accepted or not
(0.32), so stock vLLM's own text changes with drafts there. These begin where they should.
"""

from __future__ import annotations

from typing import Any

import torch


def convolve(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    conv_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """vLLM's `causal_conv1d_update`: inputs of a request's last tokens lie side by side, and those
    that were not accepted are at the end."""
    width = weight.shape[-1]
    assert conv_state_indices is not None
    slots = conv_state_indices.reshape(conv_state_indices.shape[0], -1)[:, 0].tolist()
    out = torch.empty_like(x)
    for index, (slot, first, last) in enumerate(_requests(slots, query_start_loc)):
        state, skipped = conv_state[slot], _accepted(num_accepted_tokens, index) - 1
        before = state[:, skipped : skipped + width - 1]
        inputs = torch.cat([before, x[first:last].T.to(before.dtype)], 1)
        found = torch.nn.functional.conv1d(
            inputs[None], weight[:, None].to(inputs.dtype), bias, groups=weight.shape[0]
        )[0]
        if activation in ("silu", "swish"):
            found = torch.nn.functional.silu(found)
        out[first:last] = found.T.to(x.dtype)
        kept = inputs[:, 1 : 1 + state.shape[1]].clone()
        state[:, : kept.shape[1]] = kept
    return out


def update_states(
    _: Any,
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    state_batch_indices: torch.Tensor,
    out: torch.Tensor,
    dst_state_batch_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    **_more: Any,
) -> None:
    """vLLM's `selective_state_update`: each token leaves its state in a block of its own."""
    sources = state_batch_indices.reshape(state_batch_indices.shape[0], -1)
    targets = sources if dst_state_batch_indices is None else dst_state_batch_indices
    targets = targets.reshape(sources.shape[0], -1)
    group = x.shape[1] // B.shape[1]
    requests = _requests(sources[:, 0].tolist(), cu_seqlens)
    for index, (_slot, first, last) in enumerate(requests):
        begin = sources[index, _accepted(num_accepted_tokens, index) - 1]
        current = state[begin].float().clone()
        for token in range(first, last):
            step = torch.nn.functional.softplus(dt[token].float() + dt_bias.float())[..., None]
            into, read = (m[token].float().repeat_interleave(group, 0)[:, None] for m in (B, C))
            given = x[token].float()
            current = current * torch.exp(A.float() * step) + into * step * given[..., None]
            out[token] = ((current * read).sum(-1) + D.float() * given).to(out.dtype)
            place = token - first if num_accepted_tokens is not None else 0
            state[targets[index, place]] = current.to(state.dtype)


def _requests(slots: list[int], starts: torch.Tensor | None) -> list[tuple[int, int, int]]:
    """Of each request its slot, its first token, and the one after its last."""
    bounds = list(range(len(slots) + 1)) if starts is None else starts.tolist()
    return list(zip(slots, bounds[:-1], bounds[1:], strict=True))


def _accepted(counts: torch.Tensor | None, index: int) -> int:
    return 1 if counts is None else int(counts[index])


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """As generate.py's, with these kernels, and so without the refusal of vLLM's."""
    from vllm.model_executor.layers.mamba import mamba_mixer2
    from vllm.model_executor.layers.mamba.ops import ssu_dispatch

    from tests.integration import generate
    from vllm_kcache.integration import refusals

    mamba_mixer2.causal_conv1d_update = convolve
    ssu_dispatch.CPUSSUBackend.__call__ = update_states
    refusals.REFUSALS = tuple(r for r in refusals.REFUSALS if r.name != "states_with_drafts")
    return generate.run(spec)
