# SPDX-License-Identifier: Apache-2.0
"""What the layers and the worker refuse: the last line, when no setting told beforehand.

Layers are vLLM's own attention layers, registered in a real configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_kcache.config import KCacheConfig, KCacheConfigError

pytestmark = pytest.mark.usefixtures("quick_vllm")

PREFIX = "--kv-backend kcache does not support "


@pytest.fixture
def vllm_config(folders: Callable[[str], str]) -> Any:
    """A complete configuration with our backend, two layers."""
    from vllm import EngineArgs

    return EngineArgs(
        model=folders("llama"), skip_tokenizer_init=True, load_format="dummy", kv_backend="kcache"
    ).create_engine_config()


def add_layer(vllm_config: Any, index: int, model: str = "model", **arguments: Any) -> Any:
    """Build an attention layer as a model does; it registers itself in the configuration."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention.attention import Attention

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with set_current_vllm_config(vllm_config):
            return Attention(
                num_heads=4,
                head_size=64,
                num_kv_heads=2,
                cache_config=vllm_config.cache_config,
                prefix=f"{model}.layers.{index}.self_attn.attn",
                **{"scale": 0.125, **arguments},
            )
    finally:
        torch.set_default_dtype(before)


def stock_backend() -> Any:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend


def split_layers(vllm_config: Any, **settings: Any) -> list[str]:
    from vllm_kcache.integration.worker import split_layers as checked

    return checked(vllm_config, KCacheConfig.from_user(settings))


# One layer.


@pytest.mark.parametrize(
    ("arguments", "feature"),
    [
        ({"alibi_slopes": [0.5] * 4}, "ALiBi"),
        ({"per_layer_sliding_window": 128}, "window in a split layer (sliding_window=128)"),
        *(
            ({"logits_soft_cap": cap}, f"cap on scores out of range (logits_soft_cap={cap})")
            for cap in (float("inf"), float("nan"), -50.0, 1e38)
        ),
        *(
            ({"scale": scale}, f"scale of scores out of range (scale={scale})")
            for scale in (float("inf"), float("nan"), 0.0, -0.125, 1e38)
        ),
    ],
)
def test_layer_refuses(vllm_config: Any, arguments: dict[str, Any], feature: str) -> None:
    """vLLM asks no backend about these, but for the window of a layer."""
    from vllm_kcache.integration.backend import KCacheBackend

    with pytest.raises(KCacheConfigError) as caught:
        add_layer(vllm_config, 0, attn_backend=KCacheBackend, **arguments)
    assert str(caught.value).startswith(PREFIX)
    assert feature in str(caught.value)


def test_a_layer_takes_a_soft_cap(vllm_config: Any) -> None:
    assert add_layer(vllm_config, 0, logits_soft_cap=30.0).impl.soft_cap == 30.0
    assert add_layer(vllm_config, 1, logits_soft_cap=0.0).impl.soft_cap is None


def test_a_layer_takes_sinks(vllm_config: Any) -> None:
    """The parameter itself, which is loaded later."""
    sinks = torch.zeros(4)
    assert add_layer(vllm_config, 0, sinks=sinks).impl.sinks is sinks


@pytest.mark.parametrize("attn_type", ["encoder", "encoder_only", "encoder_decoder"])
def test_layer_refuses_other_attention(vllm_config: Any, attn_type: str) -> None:
    from vllm.v1.attention.backend import AttentionType

    from vllm_kcache.integration.backend import KCacheBackend

    with pytest.raises(KCacheConfigError) as caught:
        add_layer(vllm_config, 0, attn_backend=KCacheBackend, attn_type=AttentionType(attn_type))
    assert str(caught.value).startswith(f"{PREFIX}attention ")
    assert attn_type in str(caught.value)
    assert "Serve this model with vLLM's own backend." in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"head_size": 32}, "head_size not supported"),
        ({"dtype": torch.float64}, "dtype not supported"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
        ({"block_size": 8}, "block_size not supported"),
        ({"use_mm_prefix": True}, "partial multimodal token full attention not supported"),
        ({"use_mla": True}, "MLA not supported"),
        ({"use_sparse": True}, "sparse not supported"),
        ({"use_per_head_quant_scales": True}, "per-head quant scales not supported"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only not supported"),
        ({"has_sliding_window": True}, "sliding window not supported"),
        ({"use_rswa": True}, "R-SWA not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"use_batch_invariant": True}, "batch invariance not supported"),
        ({"use_pcp": True}, "PCP not supported"),
        ({"use_dcp": True}, "DCP not supported"),
    ],
)
def test_backend_is_validated_on_the_cpu(
    vllm_config: Any, wanted: dict[str, Any], reason: str
) -> None:
    """The CPU platform of vLLM validates nothing and would take its own attention instead."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    fits = {
        "head_size": 64,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 32,
    }
    custom = AttentionBackendEnum.CUSTOM
    path = CpuPlatform.get_attn_backend_cls(custom, AttentionSelectorConfig(**fits))
    assert path == "vllm_kcache.integration.backend.KCacheBackend"
    with pytest.raises(ValueError, match="kcache cannot run this model") as caught:
        CpuPlatform.get_attn_backend_cls(custom, AttentionSelectorConfig(**{**fits, **wanted}))
    assert reason in str(caught.value)
    assert "Serve it with vLLM's own backend." in str(caught.value)


# All layers.


def test_every_layer_is_ours(vllm_config: Any) -> None:
    names = [add_layer(vllm_config, index).layer_name for index in range(2)]
    assert split_layers(vllm_config) == names


def test_stock_attention_in_one_layer_is_seen(vllm_config: Any) -> None:
    add_layer(vllm_config, 0)
    add_layer(vllm_config, 1, attn_backend=stock_backend())
    with pytest.raises(RuntimeError) as caught:
        split_layers(vllm_config)
    assert str(caught.value) == (
        "Layer model.layers.1.self_attn.attn runs CPUAttentionBackend, expected KCacheBackend."
    )


def test_split_attention_in_a_dense_layer_is_seen(vllm_config: Any) -> None:
    for index in range(2):
        add_layer(vllm_config, index)
    with pytest.raises(
        RuntimeError, match=r"Layer model\.layers\.0\.self_attn\.attn runs KCacheBackend"
    ):
        split_layers(vllm_config, dense_layers=1)


def test_dense_layers_are_left_out(vllm_config: Any) -> None:
    add_layer(vllm_config, 0, attn_backend=stock_backend())
    name = add_layer(vllm_config, 1).layer_name
    assert split_layers(vllm_config, dense_layers=1) == [name]


def test_window_layers_run_stock_attention(vllm_config: Any) -> None:
    """Of a window of their own or of the whole model; the choice for others stays ours."""
    window = add_layer(vllm_config, 0, per_layer_sliding_window=128)
    assert window.get_attn_backend() is stock_backend()
    assert window.impl.sliding_window == 128
    full = add_layer(vllm_config, 1)
    assert split_layers(vllm_config) == [full.layer_name]
    vllm_config.cache_config.sliding_window = 64
    assert add_layer(vllm_config, 2).get_attn_backend() is stock_backend()
    assert split_layers(vllm_config) == [full.layer_name]


def test_chunked_layers_run_stock_attention(vllm_config: Any) -> None:
    """vLLM derives their backend from what it would choose."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention

    full = add_layer(vllm_config, 0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with set_current_vllm_config(vllm_config):
            chunked = ChunkedLocalAttention(
                4, 64, 0.125, 128, num_kv_heads=2, cache_config=vllm_config.cache_config,
                prefix="model.layers.1.self_attn.attn",
            )  # fmt: skip
    finally:
        torch.set_default_dtype(before)
    backend = chunked.get_attn_backend()
    assert issubclass(backend, stock_backend())
    assert backend is not stock_backend()
    assert split_layers(vllm_config) == [full.layer_name]


def test_no_layer_but_window_layers(vllm_config: Any) -> None:
    add_layer(vllm_config, 0, per_layer_sliding_window=128)
    with pytest.raises(KCacheConfigError, match="dense or has a window"):
        split_layers(vllm_config)


def test_split_attention_in_a_window_layer_is_seen(vllm_config: Any) -> None:
    """Such as by a model that changes its layers when they are built."""
    add_layer(vllm_config, 0).sliding_window = 128
    add_layer(vllm_config, 1)
    with pytest.raises(RuntimeError, match=r"KCacheBackend, expected vLLM own attention \(window"):
        split_layers(vllm_config)


def test_full_layers_with_other_query_heads_than_the_model_says(vllm_config: Any) -> None:
    add_layer(vllm_config, 0, per_layer_sliding_window=128)
    add_layer(vllm_config, 1).num_heads = 8
    with pytest.raises(KCacheConfigError, match=r"different numbers of query heads \(4, 8\)"):
        split_layers(vllm_config)


def test_a_rank_with_dense_layers_only(vllm_config: Any) -> None:
    """Pipeline parallel: this rank has the bottom layer, and that is dense."""
    add_layer(vllm_config, 0, attn_backend=stock_backend())
    with pytest.raises(
        KCacheConfigError, match=r"kcache_config.dense_layers: every layer"
    ) as caught:
        split_layers(vllm_config, dense_layers=1)
    assert "List fewer layers." in str(caught.value)


def test_layers_that_share_a_cache_are_refused_on_a_gpu(vllm_config: Any) -> None:
    first = add_layer(vllm_config, 0)
    add_layer(vllm_config, 1, kv_sharing_target_layer_name=first.layer_name)
    assert split_layers(vllm_config) == [first.layer_name]
    object.__setattr__(vllm_config.device_config, "device_type", "cuda")
    with pytest.raises(KCacheConfigError) as caught:
        split_layers(vllm_config)
    assert str(caught.value).startswith(
        f"{PREFIX}layers that share the cache of another layer, on a GPU "
        f"(model.layers.1.self_attn.attn that of {first.layer_name}): a prompt's V"
    )
    assert "Serve this model with vLLM's own backend." in str(caught.value)


def full_attention(**changes: Any) -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(
        **{
            "block_size": 32,
            "num_kv_heads": 2,
            "head_size": 64,
            "dtype": torch.bfloat16,
            **changes,
        }
    )


LAYERS = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]


def page_shape(vllm_config: Any, *specs: Any) -> Any:
    from vllm_kcache.integration.worker import cache_shape_of

    return cache_shape_of(
        vllm_config, KCacheConfig(), dict(zip(LAYERS, specs, strict=True)), LAYERS
    )


def test_layers_of_one_shape(vllm_config: Any) -> None:
    shape = page_shape(vllm_config, full_attention(), full_attention())
    assert (shape.num_layers, shape.page_tokens, shape.block_tokens) == (2, 32, 8)
    # Of a layer and head four rows: K and V in int8 and their scales.
    assert shape.host_page_bytes == 2 * 2 * 4 * (2 * 8 * 64 + 2 * 8 * 2)


def test_layers_of_different_shapes_are_refused(vllm_config: Any) -> None:
    with pytest.raises(KCacheConfigError, match="does not support layers of different shapes"):
        page_shape(vllm_config, full_attention(), full_attention(num_kv_heads=1))


def test_v_of_another_size_is_refused(vllm_config: Any) -> None:
    wide = full_attention(head_size_v=128)
    with pytest.raises(KCacheConfigError) as caught:
        page_shape(vllm_config, wide, wide)
    assert str(caught.value).startswith(PREFIX)
    assert "head_size_v=128 beside head_size=64" in str(caught.value)


def test_several_kv_cache_groups_are_refused() -> None:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    from vllm_kcache.integration.worker import SplitCacheWorker

    groups = [KVCacheGroupSpec([name], full_attention()) for name in LAYERS]
    with pytest.raises(KCacheConfigError) as caught:
        SplitCacheWorker().initialize_from_config(KVCacheConfig(8, [], groups))
    assert str(caught.value).startswith(PREFIX + "several KV cache groups (2): one id must")
    assert "vLLM's own backend" in str(caught.value)


def test_a_changed_backend_is_refused(vllm_config: Any) -> None:
    """As vLLM derives one for prompts that attend in both directions."""
    from vllm_kcache.integration.backend import KCacheBackend

    class Bidirectional(KCacheBackend):
        pass

    for settings in ({}, {"dense_layers": 1}):
        vllm_config.compilation_config.static_forward_context.clear()
        add_layer(vllm_config, 0, attn_backend=Bidirectional)
        add_layer(vllm_config, 1)
        with pytest.raises(KCacheConfigError, match=r"Bidirectional of model\.layers\.0.*causal"):
            split_layers(vllm_config, **settings)


def test_layers_of_different_query_heads_are_refused(vllm_config: Any) -> None:
    layer = add_layer(vllm_config, 0)
    add_layer(vllm_config, 1)
    assert len(split_layers(vllm_config)) == 2
    layer.num_heads = 8
    with pytest.raises(KCacheConfigError, match=r"different numbers of query heads \(4, 8\)"):
        split_layers(vllm_config)


# Layers that make drafts.


def add_draft_layer(
    vllm_config: Any, index: int, tag: str = "draft_model", **arguments: Any
) -> Any:
    """Build an attention layer as vLLM's runners do for drafts; a head's come after the model's."""
    from vllm.compilation.backends import set_model_tag

    with set_model_tag(tag):
        model = "model" if tag == "eagle_head" else "draft_model.model"
        return add_layer(vllm_config, index, model, **arguments)


@pytest.mark.parametrize("tag", ["draft_model", "eagle_head"])
@pytest.mark.parametrize("takes_choice_away", [True, False])
def test_layers_of_drafts_are_not_split(
    vllm_config: Any, takes_choice_away: bool, tag: str
) -> None:
    """One of vLLM's runners takes our choice of backend away from them, the other does not; their
    numbers are of another model, or no layer of this one has them."""
    add_layer(vllm_config, 0, attn_backend=stock_backend())
    add_layer(vllm_config, 1)
    chosen = vllm_config.attention_config.backend
    for index in range(2, 5) if tag == "eagle_head" else range(3):
        vllm_config.attention_config.backend = None if takes_choice_away else chosen
        layer = add_draft_layer(vllm_config, index, tag)
        assert layer.get_attn_backend() is stock_backend()
    assert takes_choice_away or vllm_config.attention_config.backend is chosen
    assert split_layers(vllm_config, dense_layers=1) == ["model.layers.1.self_attn.attn"]


def test_a_draft_model_that_would_be_split(vllm_config: Any) -> None:
    from vllm_kcache.integration.backend import KCacheBackend

    add_layer(vllm_config, 0)
    add_draft_layer(vllm_config, 0, attn_backend=KCacheBackend)
    with pytest.raises(RuntimeError, match=r"expected vLLM own attention \(draft layer\)"):
        split_layers(vllm_config)


@pytest.mark.parametrize(
    ("arguments", "feature"),
    [
        ({"per_layer_sliding_window": 64}, "a sliding window in a draft model ({})"),
        (
            {"kv_sharing_target_layer_name": "model.layers.0.self_attn.attn"},
            "drafts that read the cache of the model ({} that of model.layers.0.self_attn.attn)",
        ),
    ],
)
def test_layers_of_drafts_that_are_refused(
    vllm_config: Any, arguments: dict[str, Any], feature: str
) -> None:
    add_layer(vllm_config, 0)
    add_draft_layer(vllm_config, 0, attn_backend=stock_backend(), **arguments)
    with pytest.raises(KCacheConfigError) as caught:
        split_layers(vllm_config)
    name = "draft_model.model.layers.0.self_attn.attn"
    assert str(caught.value).startswith(PREFIX + feature.format(name))
