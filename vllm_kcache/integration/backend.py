# SPDX-License-Identifier: Apache-2.0
"""vLLM's view of the split cache: the backend class and the attention of one layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_kcache.config import KCacheConfigError
from vllm_kcache.integration import runtime
from vllm_kcache.integration.metadata import KCacheMetadata, KCacheMetadataBuilder


class KCacheBackend(AttentionBackend):
    """K in vLLM's pages, V in the host pool."""

    # One opaque op per layer: how V is stored depends on the step, which only `forward` is given.
    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    supported_kv_cache_dtypes: ClassVar[list] = ["auto", "float16", "bfloat16", "float32"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[KCacheImpl]:
        return KCacheImpl

    @staticmethod
    def get_builder_cls() -> type[KCacheMetadataBuilder]:
        return KCacheMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        # Any multiple is taken whole, so that block-table ids stay the manager's ids and V of
        # block b is page b of the host pool.
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [64, 80, 96, 128, 256]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Each head's tokens lie together, as score reads them.
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """A page holds K only: half the bytes, twice the blocks for the same memory."""
        return replace(spec, state_content_bytes=spec.head_size * get_dtype_size(spec.dtype))

    @classmethod
    def supports_kv_connector(cls) -> bool:
        # Which connectors are allowed is decided in refusals.py.
        return True


class KCacheImpl(AttentionImpl[KCacheMetadata]):
    """Attention of one layer over the split cache.

    Prefill is exact. Decode scores all K, selects V blocks, fetches and attends (docs/design.md).
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        refused = {
            "ALiBi": alibi_slopes is not None,
            f"sliding_window={sliding_window}": sliding_window is not None,
            f"attn_logit_softcapping={logits_soft_cap}": bool(logits_soft_cap),
            f"attention type {AttentionType(attn_type).value}": attn_type != AttentionType.DECODER,
        }
        for feature, is_on in refused.items():
            if is_on:
                raise KCacheConfigError(
                    f"--kv-backend kcache does not support {feature}. "
                    "Serve this model with vLLM's own backend."
                )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KCacheMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store K and V, then attend: decodes through the selection, prefills exactly.

        Args:
            layer: vLLM's attention layer.
            query: [tokens, Hq, D] model dtype, on the device.
            key: [tokens, Hkv, D] model dtype, on the device. Written to the K pages.
            value: [tokens, Hkv, D] model dtype, on the device. Written through to the host pool.
            kv_cache: [M, Hkv, S, D] K pages; empty while vLLM profiles.
            attn_metadata: The step; None while vLLM profiles.
            output: [tokens, Hq, D], overwritten.

        Raises:
            RuntimeError: Output quantisation was asked for.
        """
        if output_scale is not None or output_block_scale is not None:
            raise RuntimeError("--kv-backend kcache does not quantise the attention output.")
        if attn_metadata is None or kv_cache.numel() == 0:
            return output.fill_(0)
        shares = self.kv_sharing_target_layer_name is not None
        inputs = runtime.LayerInputs(
            name=self.kv_sharing_target_layer_name or layer.layer_name,
            query=query.view(-1, self.num_heads, self.head_size),
            key=None if shares else key.view(-1, self.num_kv_heads, self.head_size),
            value=None if shares else value.view(-1, self.num_kv_heads, self.head_size),
            k_pages=kv_cache,
            scale=self.scale,
        )
        shaped = output.view(-1, self.num_heads, self.head_size)
        runtime.current().run_layer(inputs, attn_metadata, shaped)
        return output
