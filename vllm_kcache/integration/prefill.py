# SPDX-License-Identifier: Apache-2.0
"""Exact attention of prompt chunks on a GPU: FlashAttention, xformers or plain torch.

Each kernel attends a ragged batch of queries to a ragged batch of contiguous keys and values, and
returns the log-sum-exp, so that the chunk and the pieces of its context can be merged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from vllm_kcache.config import KCacheConfigError
from vllm_kcache.reference.soft_cap import cap_scores
from vllm_kcache.split_cache_gpu import Attended, PrefillKernels, Ragged

Attend = Callable[..., Attended]


def choose(name: str, head_size: int, dtype: torch.dtype, capped: bool = False) -> PrefillKernels:
    """The kernels of exact attention for a setting.

    Args:
        name: `kcache_config.prefill`: "auto", "flash_attn", "xformers" or "torch".
        head_size: D.
        dtype: Model dtype. FlashAttention and xformers take float16 and bfloat16.
        capped: Scores have a soft cap, which xformers does not know.

    Raises:
        KCacheConfigError: The named kernel cannot run here.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if name == "auto":
        candidates = ("flash_attn", "xformers") if half else ()
        fits = (it for it in candidates if _missing(it, head_size, dtype, capped) is None)
        name = next(fits, "torch")
    elif name != "torch":
        reason = _missing(name, head_size, dtype, capped) if half else f"it does not take {dtype}"
        if reason is not None:
            raise KCacheConfigError(
                f"kcache_config.prefill={name!r}: {reason}; use 'auto' or 'torch'."
            )
    return PrefillKernels(name, _kernel(name, head_size, capped), merge)


def _kernel(name: str, head_size: int, capped: bool) -> Attend:
    if name == "flash_attn":
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        # Looked up once: it costs as much as a launch, and asks for vLLM's configuration, which is
        # not there when the model runs.
        needs = {"requires_softcap": True} if capped else {}
        version = get_flash_attn_version(head_size=head_size, **needs)
        return functools.partial(attend_flash, version=version)
    return attend_xformers if name == "xformers" else attend_torch


def _missing(name: str, head_size: int, dtype: torch.dtype, capped: bool) -> str | None:
    """Why a kernel cannot run here, or None."""
    if name == "xformers":
        if capped:
            return "it knows no soft cap on scores"
        try:
            import xformers.ops  # noqa: F401
        except ImportError as error:
            return f"xformers does not import ({error})"
        # It imports without its kernels, too, where it was built for another PyTorch or CUDA.
        token = torch.zeros((1, 1, head_size), dtype=dtype, device="cuda")
        at = Ragged(torch.tensor([0, 1], dtype=torch.int32, device="cuda"), 1, (1,))
        try:
            attend_xformers(token, token, token, at, at, True, 1.0)
        except NotImplementedError as error:
            return f"xformers has no kernel for it here ({' '.join(str(error).split())})"
        return None
    try:
        from vllm.v1.attention.backends.fa_utils import (
            flash_attn_varlen_func,  # noqa: F401
            get_flash_attn_version,
        )
    except ImportError as error:
        return f"vLLM's FlashAttention does not import ({error})"
    needs = {"requires_softcap": True} if capped else {}
    version = get_flash_attn_version(head_size=head_size, **needs)
    if version is None:
        return "vLLM has no FlashAttention for this GPU"
    from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported

    if not is_fa_version_supported(version):
        return f"vLLM's FlashAttention {version} is not installed"
    return None


def attend_flash(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    queries_at: Ragged,
    keys_at: Ragged,
    causal: bool,
    scale: float,
    soft_cap: float | None = None,
    *,
    version: int,
) -> Attended:
    """vLLM's FlashAttention, of that version (3 on Hopper, 2 elsewhere)."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    output, lse = flash_attn_varlen_func(
        q=query,
        k=keys,
        v=values,
        cu_seqlens_q=queries_at.first_rows,
        max_seqlen_q=queries_at.max_length,
        cu_seqlens_k=keys_at.first_rows,
        max_seqlen_k=keys_at.max_length,
        softmax_scale=scale,
        causal=causal,
        softcap=soft_cap or 0.0,
        return_softmax_lse=True,
        fa_version=version,
    )[:2]
    return output, lse


def attend_xformers(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    queries_at: Ragged,
    keys_at: Ragged,
    causal: bool,
    scale: float,
    soft_cap: float | None = None,
) -> Attended:
    """xformers' memory-efficient attention with a block-diagonal bias; without a cap on scores."""
    assert soft_cap is None
    from xformers.ops import fmha

    bias_type = (
        fmha.attn_bias.BlockDiagonalCausalMask if causal else fmha.attn_bias.BlockDiagonalMask
    )
    bias = bias_type.from_seqlens(
        list(queries_at.lengths), list(keys_at.lengths), device=query.device
    )
    group = query.shape[1] // keys.shape[1]
    shape = (1, query.shape[0], keys.shape[1], group, query.shape[2])
    expanded = (1, keys.shape[0], keys.shape[1], group, keys.shape[2])
    output, lse = fmha.memory_efficient_attention_partial(
        query.reshape(shape),
        keys[None, :, :, None].expand(expanded),
        values[None, :, :, None].expand(expanded),
        attn_bias=bias,
        scale=scale,
    )
    return output.reshape(query.shape), lse.reshape(query.shape[1], query.shape[0])


# Scores of one piece: bounds the scratch of the torch kernel.
_TORCH_SCORE_VALUES = 1 << 27


def attend_torch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    queries_at: Ragged,
    keys_at: Ragged,
    causal: bool,
    scale: float,
    soft_cap: float | None = None,
) -> Attended:
    """Plain torch, accumulated in float32: any dtype, any head size, slow."""
    output = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = query.new_full((query.shape[1], query.shape[0]), float("-inf"), dtype=torch.float32)
    first_query = first_key = 0
    group = query.shape[1] // keys.shape[1]
    for num_queries, num_keys in zip(queries_at.lengths, keys_at.lengths, strict=True):
        if num_queries and num_keys:
            key = keys[first_key : first_key + num_keys].float().permute(1, 2, 0)
            value = values[first_key : first_key + num_keys].float().transpose(0, 1)
            step = max(1, _TORCH_SCORE_VALUES // (num_keys * query.shape[1]))
            for begin in range(0, num_queries, step):
                end = min(begin + step, num_queries)
                rows = slice(first_query + begin, first_query + end)
                part = query[rows].float().unflatten(1, (keys.shape[1], group)).permute(1, 2, 0, 3)
                scores = cap_scores(torch.matmul(part, key[:, None]) * scale, soft_cap)
                if causal:
                    position = torch.arange(begin, end, device=query.device)
                    position = position + num_keys - num_queries
                    ahead = torch.arange(num_keys, device=query.device) > position[:, None]
                    scores.masked_fill_(ahead, float("-inf"))
                part_lse = scores.logsumexp(-1)
                weights = (scores - part_lse[..., None]).exp()
                result = torch.matmul(weights, value[:, None])
                output[rows] = result.permute(2, 0, 1, 3).flatten(1, 2).to(output.dtype)
                lse[:, rows] = part_lse.flatten(0, 1)
        first_query += num_queries
        first_key += num_keys
    return output, lse


def merge(first: Attended, second: Attended) -> Attended:
    """Attention to the union of two sets of keys, from the attention to each.

    Args:
        first, second: output [T, Hq, D] model dtype and log-sum-exp [Hq, T] float32, GPU. A query
            with no key in a set has log-sum-exp -inf there.

    Returns:
        Output and log-sum-exp of the union.
    """
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    output = torch.empty_like(first[0])
    lse = torch.empty_like(first[1])
    merge_attn_states(output, first[0], first[1], second[0], second[1], output_lse=lse)
    return output, lse
