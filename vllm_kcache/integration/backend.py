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

from vllm_kcache.cache.formats import code_bytes
from vllm_kcache.integration import features, refusals
from vllm_kcache.integration.metadata import KCacheMetadata, KCacheMetadataBuilder
from vllm_kcache.split_cache import LayerInputs, SplitCache


class KCacheBackend(AttentionBackend):
    """K, or its codes, in vLLM's pages; V, or K and V, in the host pool."""

    # What the pages of this process's engine hold. vLLM asks the class, without an instance or a
    # configuration, how large a page is; the worker says it before it loads the model.
    k_bits: ClassVar[int] = 16
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
        """A page holds K only, half the bytes of K and V, or K codes."""
        if cls.k_bits == 16:
            return replace(spec, state_content_bytes=spec.head_size * get_dtype_size(spec.dtype))
        return replace(spec, state_content_bytes=code_bytes(spec.head_size))

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        # A batch is put in order by lengths that the host knows (metadata.py).
        return False

    @classmethod
    def supports_kv_connector(cls) -> bool:
        # Which connectors are allowed is decided in refusals.py.
        return True


class KCacheImpl(AttentionImpl[KCacheMetadata]):
    """Attention of one layer over the split cache (docs/design.md)."""

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
        sinks: torch.Tensor | None = None,
    ) -> None:
        if alibi_slopes is not None:
            refusals.refuse("alibi", "slopes")
        if sliding_window is not None:
            refusals.refuse("window_layer", f"sliding_window={sliding_window}")
        if attn_type != AttentionType.DECODER:
            refusals.refuse("attention_type", AttentionType(attn_type).value)
        if not features.is_within(scale, features.SCALES):
            refusals.refuse("scale", f"scale={scale}")
        # vLLM says 0 for none, too.
        if logits_soft_cap and not features.is_within(logits_soft_cap, features.SOFT_CAPS):
            refusals.refuse("soft_cap", f"logits_soft_cap={logits_soft_cap}")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.soft_cap = logits_soft_cap or None
        # A parameter of the model, [Hq], loaded after this.
        self.sinks = sinks
        self._cache: SplitCache | None = None
        self._index = -1

    def bind(self, cache: SplitCache, index: int) -> None:
        """Name the cache that this layer runs on. The worker does, when the model is loaded.

        Args:
            cache: That of this layer's engine.
            index: The layer's number in it; that of another layer whose pages this one reads.
        """
        self._cache, self._index = cache, index

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
            key: [tokens, Hkv, D] model dtype, on the device. Written to the K pages; with codes to
                the host pool, too.
            value: [tokens, Hkv, D] model dtype, on the device. Written through to the host pool.
            kv_cache: [M, Hkv, S, D] K pages (with codes [M, Hkv, S, C]); empty while vLLM profiles.
            attn_metadata: The step; None while vLLM profiles.
            output: [tokens, Hq, D], overwritten.

        Raises:
            KCacheConfigError: Output quantisation was asked for.
            RuntimeError: This worker was not started by kcache.
        """
        if output_scale is not None or output_block_scale is not None:
            refusals.refuse("output_quantisation")
        if attn_metadata is None or kv_cache.numel() == 0:
            return output.fill_(0)
        if self._cache is None:
            raise RuntimeError(
                "The split cache is not running: this worker was not started by kcache."
            )
        shares = self.kv_sharing_target_layer_name is not None
        heads, kv_heads = (
            (-1, self.num_heads, self.head_size),
            (-1, self.num_kv_heads, self.head_size),
        )
        inputs = LayerInputs(
            query=query.view(heads),
            key=None if shares else key.view(kv_heads),
            value=None if shares else value.view(kv_heads),
            scale=self.scale,
            sinks=self.sinks,
            soft_cap=self.soft_cap,
        )
        shaped, order = output.view(heads), attn_metadata.token_order
        if order is None:
            self._cache.attend(self._index, kv_cache, inputs, attn_metadata, shaped)
            return output
        in_order = torch.empty_like(inputs.query[: order.shape[0]])
        self._cache.attend(self._index, kv_cache, _take(inputs, order), attn_metadata, in_order)
        shaped[order] = in_order
        return output


def _take(inputs: LayerInputs, order: torch.Tensor) -> LayerInputs:
    """The inputs of some tokens, in their order."""
    return LayerInputs(
        inputs.query[order],
        None if inputs.key is None else inputs.key[order],
        None if inputs.value is None else inputs.value[order],
        inputs.scale,
        inputs.sinks,
        inputs.soft_cap,
    )
