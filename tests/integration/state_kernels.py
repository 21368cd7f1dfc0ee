# SPDX-License-Identifier: Apache-2.0
"""An engine on a CPU whose Mamba layers forget rejected drafts, as vLLM's kernels of a GPU do.

vLLM's kernels of a CPU begin with the state after all tokens of the step before, accepted or not
(0.32), so stock vLLM's own text changes with drafts there. These begin where they should. With
prefix caching vLLM moves states from page to page, and that of drafts with kernels that a CPU does
not have: `move` takes their place. And where a preempted request reads its own text again, vLLM's
first runner, the one of a CPU, takes a piece as short as a step of drafts for one, after which it
goes on with the state of the first token of that piece; the second runner, of a GPU, does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.integration import generate


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


class Copies:
    """Of a model's layers: their states, and the tables that say where each request's lie."""

    def __init__(
        self, context: Any, config: Any, layers: dict[str, Any], functions: Any, tables: Any
    ) -> None:
        from vllm.model_executor.layers.mamba.mamba_utils import get_conv_copy_spec
        from vllm.v1.worker.mamba_utils import _get_mamba_spec_for_layer

        self._states: list[tuple[torch.Tensor, bool, torch.Tensor]] = []
        requests = context.num_accepted_tokens_out.shape[0]
        for number, rows in zip(context.mamba_group_ids, tables, strict=True):
            group = config.kv_cache_groups[number]
            # Given are the rows of the first step's requests.
            table = rows.as_strided((requests, rows.shape[1]), rows.stride())
            for name in group.layer_names:
                kinds = functions[_get_mamba_spec_for_layer(group, name).mamba_type]
                for state, kind in zip(layers[name].kv_cache, kinds, strict=True):
                    self._states.append((state, kind is get_conv_copy_spec, table))

    def move(self, row: int, source: int, target: int, skipped: int) -> None:
        """To a request's column of its table the state after so many drafts of another column."""
        for state, is_window, table in self._states:
            into = state[int(table[row, target])]
            if is_window:
                # Inputs of the last tokens, side by side.
                kept = state[int(table[row, source])][skipped:].clone()
                into[: kept.shape[0]] = kept
            else:
                into.copy_(state[int(table[row, source + skipped])].clone())


def _remember(self: Any, *given: Any) -> None:
    """In place of the addresses by which vLLM's kernels find states."""
    config, layers, functions, tables, _ = given
    self.copies = Copies(self, config, layers, functions, tables)
    self.is_initialized = True


def _before_step(
    self: Any,
    num_reqs: int,
    state_idx_gpu: torch.Tensor,
    src_col_gpu: torch.Tensor,
    token_bias_gpu: torch.Tensor,
    idx_mapping: torch.Tensor | None,
) -> None:
    """vLLM's `run_fused_precopy`: where a request goes on in another page its state goes there."""
    assert idx_mapping is None
    columns = (x[:num_reqs].tolist() for x in (src_col_gpu, state_idx_gpu, token_bias_gpu))
    for row, (source, target, skipped) in enumerate(zip(*columns, strict=True)):
        if source not in (-1, target):
            self.copies.move(row, source, target, skipped)


def _after_step(
    self: Any,
    num_reqs: int,
    num_accepted_tokens_gpu: torch.Tensor,
    mamba_state_idx_gpu: torch.Tensor,
    num_scheduled_tokens_gpu: torch.Tensor,
    num_computed_tokens_gpu: torch.Tensor,
    num_draft_tokens_gpu: torch.Tensor,
) -> None:
    """vLLM's `run_fused_postprocess`: the state at the end of a page stays with it, where what was
    accepted passes that end."""
    self.num_accepted_tokens_out[:num_reqs] = num_accepted_tokens_gpu[:num_reqs]
    given = (
        num_accepted_tokens_gpu, mamba_state_idx_gpu, num_scheduled_tokens_gpu,
        num_computed_tokens_gpu, num_draft_tokens_gpu,
    )  # fmt: skip
    rows = zip(*(each[:num_reqs].tolist() for each in given), strict=True)
    for row, (accepted, source, scheduled, computed, drafts) in enumerate(rows):
        # Tokens of the first of the states that the step left.
        first = computed + scheduled - drafts
        end = (first + accepted - 1) // self.block_size * self.block_size
        if end < first:
            continue
        target = end // self.block_size - 1
        if target == source:
            self.num_accepted_tokens_out[row] = 1
        if (target, end) != (source, first):
            self.copies.move(row, source, target, end - first)


def _as_prompts(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_build_attention_metadata` of a runner that takes for a prompt all that a request reads but
    its last token, and the drafts."""

    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        prompts, known = batch.num_prompt_tokens_cpu_tensor, batch.num_tokens_no_spec
        kept = prompts.clone()
        prompts.copy_(torch.maximum(prompts, torch.from_numpy(known) - 1))
        try:
            return original(self, *args, **kwargs)
        finally:
            prompts.copy_(kept)

    return _build_attention_metadata


def forget_drafts() -> None:
    """Has the layers of this process begin with the state after what was accepted; so vLLM's
    kernels are not refused."""
    from vllm.model_executor.layers.mamba import mamba_mixer2
    from vllm.model_executor.layers.mamba.ops import ssu_dispatch

    from vllm_kcache.integration import refusals

    mamba_mixer2.causal_conv1d_update = convolve
    ssu_dispatch.CPUSSUBackend.__call__ = update_states
    kept = tuple(r for r in refusals.REFUSALS if r.name != "states_with_drafts")
    assert len(kept) == len(refusals.REFUSALS) - 1
    refusals.REFUSALS = kept


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """As generate.py's, with these kernels, in vLLM's first runner."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.mamba_utils import MambaSpecDecodeGPUContext

    forget_drafts()
    MambaSpecDecodeGPUContext._populate_metadata = _remember
    MambaSpecDecodeGPUContext.run_fused_precopy = _before_step
    MambaSpecDecodeGPUContext.run_fused_postprocess = _after_step
    GPUModelRunner._build_attention_metadata = _as_prompts(GPUModelRunner._build_attention_metadata)
    return generate.run(spec)


def run_in_second_runner(spec: dict[str, Any]) -> dict[str, Any]:
    """The same in vLLM's second runner, which moves states with kernels of its own."""
    forget_drafts()
    return generate.run(spec)
