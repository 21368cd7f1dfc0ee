# SPDX-License-Identifier: Apache-2.0
"""Mean and deviation of K, measured at start: the constants that K codes need.

One pass over a text that ships with the package, the same always, before the first page is written:
so answers do not depend on what a server was asked first. In that pass every layer attends to the
text itself, and every layer with a state, linear or Mamba, runs as in a first chunk of a prompt.
After the zeros that vLLM's profile run puts in place of both, K of later layers would be another.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from importlib import resources
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import get_pp_group
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.sequence import IntermediateTensors
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kcache.config import KCacheConfigError
from vllm_kcache.integration.layers import chunk_of
from vllm_kcache.reference.codes import stats_of
from vllm_kcache.reference.soft_cap import cap_scores
from vllm_kcache.types import KStats

logger = init_logger(__name__)

CALIBRATION_TOKENS = 2048
# A channel this many times as wide as its head's root mean square counts as large, for the log.
LARGE = 4.0


def calibrate(
    runner: Any, vllm_config: Any, names: list[str], device: torch.device
) -> list[KStats]:
    """Measure K of the split layers.

    All ranks of an engine call it at the same time. A text longer than a request or a step may be
    is read in pieces, each as a request of its own.

    Args:
        runner: vLLM's model runner, its model loaded.
        vllm_config: vLLM's configuration.
        names: The split layers, bottom first.
        device: Where the model runs.

    Returns:
        One for each layer, on the device.

    Raises:
        KCacheConfigError: The model cannot be run this way; the message says what to change.
    """
    begin = time.monotonic()
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    limits = vllm_config.model_config.max_model_len, vllm_config.scheduler_config
    piece_tokens = min(CALIBRATION_TOKENS, limits[0], limits[1].max_num_batched_tokens)
    try:
        tokens = _tokens(vllm_config.model_config)
        with _recording(layers) as recorders, _states(vllm_config, device) as builders:
            for piece in tokens.split(piece_tokens):
                metadata = _metadata(builders, piece.shape[0], device) if builders else None
                if metadata is not None:
                    metadata |= dict.fromkeys(layers)
                _run(runner, vllm_config, piece.to(device), metadata)
        stats = [recorders[name].stats() for name in names]
    except Exception as error:
        # A model class may ask for anything, and raise anything where it does not get it.
        raise KCacheConfigError(
            "kcache_config.k_bits=4: the pass over a short text that measures K failed for "
            f"{vllm_config.model_config.architecture} ({type(error).__name__}: {error}). Set "
            "kcache_config.k_bits to 16, which needs no such pass."
        ) from error
    logger.info(
        "KCache: K measured over %d tokens in %.1f s. %s",
        CALIBRATION_TOKENS,
        time.monotonic() - begin,
        summary(stats),
    )
    return stats


def summary(stats: list[KStats]) -> str:
    """The one line about what was measured: of all layers of this rank."""
    shift = max(float((each.mean.abs() / each.deviation).max()) for each in stats)
    large = sum(int((_relative(each.deviation) > LARGE).sum()) for each in stats)
    channels = sum(each.deviation.numel() for each in stats)
    return (
        f"Of {len(stats)} layers the largest |mean| / deviation of a channel is {shift:.1f}, and "
        f"{large} of {channels} channels are more than {LARGE:.0f} times as wide as their head."
    )


def _relative(deviation: torch.Tensor) -> torch.Tensor:
    """Deviation of each channel in units of its head's root mean square."""
    return deviation / deviation.square().mean(-1, keepdim=True).sqrt()


def _tokens(model_config: Any) -> torch.Tensor:
    """[CALIBRATION_TOKENS] int64, host: the text, from its beginning again where it is too short;
    random tokens where there is no tokenizer. The same always."""
    vocabulary = model_config.get_vocab_size()
    tokenizer = cached_tokenizer_from_config(model_config)
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, (CALIBRATION_TOKENS,), generator=generator)
    text = resources.files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text)
    repeats = -(-CALIBRATION_TOKENS // len(ids))
    return torch.tensor((ids * repeats)[:CALIBRATION_TOKENS])


@torch.inference_mode()
def _run(
    runner: Any, vllm_config: Any, tokens: torch.Tensor, metadata: dict[str, Any] | None
) -> None:
    """One piece through the stages of the model that this rank holds, with what layers by name
    need to know of it; None where none needs anything."""
    model, group, count = runner.get_model(), get_pp_group(), tokens.shape[0]
    config = vllm_config.model_config
    positions = torch.arange(count, device=tokens.device)
    if config.uses_mrope:
        # Text stands at the same place in all three.
        positions = positions.expand(3, -1)
    embeds = before = None
    if not group.is_first_rank:
        before = IntermediateTensors(group.recv_tensor_dict())
    elif config.is_multimodal_model:
        embeds = model.embed_input_ids(tokens)
    if vllm_config.lora_config is not None:
        # No adapter for any token.
        runner._set_active_loras((0,), (0,) * count, set())
    # Not compiled: the first shape that a compiled model sees is vLLM's own choice.
    with set_forward_context(metadata, vllm_config, num_tokens=count, skip_compiled=True):
        result = model(
            input_ids=None if embeds is not None else tokens,
            positions=positions,
            intermediate_tensors=before,
            inputs_embeds=embeds,
        )
    if not group.is_last_rank:
        group.send_tensor_dict(result.tensors)


@contextlib.contextmanager
def _recording(layers: dict[str, Any]) -> Iterator[dict[str, _Recorder]]:
    """Every layer attends to the tokens of the pass alone, and adds up its K."""
    impls = {name: layer.impl for name, layer in layers.items()}
    recorders: dict[str, _Recorder] = {}
    for name, layer in layers.items():
        target = layer.kv_sharing_target_layer_name
        # Layers of other stages have no target here; a target comes before those that read it.
        source = recorders.get(target)
        recorders[name] = layer.impl = _Recorder(
            layer.impl, source, layer.sliding_window, chunk_of(layer)
        )
    try:
        yield recorders
    finally:
        for name, layer in layers.items():
            layer.impl = impls[name]


# vLLM's block 0 stands for none.
_STATE_BLOCK = 1


@contextlib.contextmanager
def _states(vllm_config: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """Room for the state of one request in each layer that keeps one; and vLLM's builder of what
    the layer needs to know of a batch, by the layer's name. There is no cache of states yet."""
    layers = get_layers_from_vllm_config(vllm_config, MambaBase)
    kept = {name: getattr(layer, "kv_cache", ()) for name, layer in layers.items()}
    builders, by_kind = {}, {}
    try:
        for name, layer in layers.items():
            spec, backend = layer.get_kv_cache_spec(vllm_config), layer.get_attn_backend()
            pages = (_STATE_BLOCK + 1, 1, 1, spec.page_size_bytes)
            layer.bind_kv_cache(torch.zeros(pages, dtype=torch.int8, device=device))
            kind = backend, spec
            if kind not in by_kind:
                by_kind[kind] = backend.get_builder_cls()(spec, [name], vllm_config, device)
            builders[name] = by_kind[kind]
        yield builders
    finally:
        for name, layer in layers.items():
            layer.kv_cache = kept[name]


def _metadata(builders: dict[str, Any], tokens: int, device: torch.device) -> dict[str, Any]:
    """Of one request that prefills all of its so many tokens, by the layer's name."""
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    lengths = starts[1:]
    # Where states of prefixes are kept a table has a column for each, otherwise one; and one more
    # for the state after each draft.
    specs = [each.kv_cache_spec for each in builders.values()]
    kept = min((spec.block_size for spec in specs), default=tokens)
    drafts = max((getattr(spec, "num_speculative_blocks", 0) for spec in specs), default=0)
    columns = -(-tokens // kept) + drafts
    table = torch.full((1, columns), _STATE_BLOCK, dtype=torch.int32, device=device)
    batch = CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=lengths.to(device),
        num_reqs=1,
        num_actual_tokens=tokens,
        max_query_len=tokens,
        max_seq_len=tokens,
        block_table_tensor=table,
        slot_mapping=torch.arange(tokens, device=device),
        is_prefilling=torch.ones(1, dtype=torch.bool),
        seq_lens_cpu_upper_bound=lengths,
    )
    made = {builder: builder.build(0, batch) for builder in set(builders.values())}
    return {name: made[builder] for name, builder in builders.items()}


class _Recorder:
    """In place of a layer's attention: causal attention of some tokens to themselves.

    Args:
        impl: The layer's own.
        source: Recorder of the layer whose K and V this one reads.
        window: Tokens that each one attends to, itself included; None for all before it.
        chunk: Tokens of the chunks within which they attend; None for one.
    """

    def __init__(
        self,
        impl: Any,
        source: _Recorder | None,
        window: int | None = None,
        chunk: int | None = None,
    ) -> None:
        self._window, self._chunk = window, chunk
        self._heads = impl.num_heads, impl.num_kv_heads
        self._scale = impl.scale
        self._sinks = getattr(impl, "sinks", None)
        # Ours and vLLM's own; 0 is none.
        self._cap = (
            getattr(impl, "soft_cap", None) or getattr(impl, "logits_soft_cap", None) or None
        )
        self._source = source
        # Whether K and V of a pass are kept, for layers that read them. Of all layers they would
        # take gigabytes.
        self._is_read = False
        self._kv: tuple[torch.Tensor, torch.Tensor] | None = None
        if source is not None:
            source._is_read = True
        self._count = 0
        self._sum = self._squares = torch.zeros(())

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As vLLM's; there is no cache and no metadata yet."""
        tokens, (heads, kv_heads) = query.shape[0], self._heads
        if self._source is None:
            keys, values = (x.view(tokens, kv_heads, -1) for x in (key, value))
            self._add(keys)
            if self._is_read:
                self._kv = keys, values
        else:
            assert self._source._kv is not None
            keys, values = self._source._kv
        queries = query.view(tokens, heads, -1)
        sees_all = self._window is None and self._chunk is None
        if self._sinks is not None or self._cap is not None:
            result = self._attend_plainly(queries, keys, values)
        else:
            result = torch.nn.functional.scaled_dot_product_attention(
                queries.transpose(0, 1)[None],
                keys.transpose(0, 1)[None],
                values.transpose(0, 1)[None],
                attn_mask=None if sees_all else self._mask(tokens, query.device),
                is_causal=sees_all,
                scale=self._scale,
                enable_gqa=heads != kv_heads,
            )[0].transpose(0, 1)
        output.view(tokens, heads, -1).copy_(result)
        return output

    def _attend_plainly(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """[tokens, Hq, D], with sinks and a cap: a KV head at a time, all scores in memory."""
        tokens, kv_heads = keys.shape[:2]
        unseen = ~self._mask(tokens, keys.device)
        sinks = query.new_full(query.shape[1:2], -torch.inf) if self._sinks is None else self._sinks
        by_head = sinks.float().unflatten(0, (kv_heads, -1))[..., None, None]
        grouped, parts = query.unflatten(1, (kv_heads, -1)), []
        for head in range(kv_heads):
            scores = grouped[:, head].float().transpose(0, 1) @ keys[:, head].float().T
            scores = cap_scores(scores * self._scale, self._cap).masked_fill(unseen, -torch.inf)
            sink = by_head[head].expand(-1, tokens, 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., :tokens]
            parts.append((weights @ values[:, head].float()).transpose(0, 1))
        return torch.cat(parts, 1)

    def _mask(self, tokens: int, device: torch.device) -> torch.Tensor:
        """[tokens, tokens] bool: who attends to whom."""
        order = torch.arange(tokens, device=device)
        before = order[:, None] - order
        seen = before >= 0
        if self._window is not None:
            seen &= before < self._window
        if self._chunk is not None:
            # A piece of the text is a request: its first token begins a chunk.
            seen &= order[:, None] // self._chunk == order // self._chunk
        return seen

    def _add(self, key: torch.Tensor) -> None:
        exact = key.double()
        self._count += key.shape[0]
        self._sum = self._sum.to(exact.device) + exact.sum(0)
        self._squares = self._squares.to(exact.device) + exact.square().sum(0)

    def stats(self) -> KStats:
        """Mean and deviation of what was seen."""
        if not self._count:
            raise RuntimeError("a split layer was not run")
        mean = self._sum / self._count
        variance = (self._squares / self._count - mean.square()).clamp_min(0.0)
        if not bool(variance.isfinite().all()):
            raise RuntimeError("K is not finite")
        return stats_of(mean, variance)
