# SPDX-License-Identifier: Apache-2.0
"""The study of rules: its models, its codes and rows, and its table."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from benchmarks.study import model as study_model
from benchmarks.study.__main__ import rule_of
from benchmarks.study.model import Prefix, StudyModel, attend_exactly, key_stats
from benchmarks.study.rules import Rule, RuleAttention, Stock, clipped_threshold, compared
from benchmarks.study.table import table
from vllm_kcache.cache.formats import RowFormat, code_bytes
from vllm_kcache.integration import calibration
from vllm_kcache.reference.attend import attend_rows
from vllm_kcache.reference.fetch import fetch_rows
from vllm_kcache.reference.score import score_codes
from vllm_kcache.reference.select import select_blocks
from vllm_kcache.reference.write import write_codes_and_rows
from vllm_kcache.types import KStats, Selection

TOKENS, QUERIES = 96, 24


class Letters:
    """A tokenizer of 90 tokens."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 90 for letter in text]


def tiny(kind: str) -> Any:
    """A small model with peaked attention."""
    common: dict[str, Any] = {
        "vocab_size": 90, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "head_dim": 16, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(3)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **common)).eval()
    common["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    # A scale of the scores that is not that of the head's size.
    common |= {"num_key_value_heads": 1, "sliding_window": 16, "query_pre_attn_scalar": 64}
    return Gemma3ForCausalLM(Gemma3TextConfig(**common)).eval()


@pytest.fixture(params=["llama", "gemma"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    # Longer than the window, with a remainder.
    monkeypatch.setattr(study_model, "PREFIX_CHUNK", 28)
    monkeypatch.setattr(study_model, "CALIBRATION_TOKENS", 200)
    return request.param


def a_prefix(model: StudyModel) -> Prefix:
    tokens = torch.randint(90, (TOKENS + 1,), generator=torch.Generator().manual_seed(7))
    return model.make_prefix("text", tokens, QUERIES)


@torch.no_grad()
def test_exact_attention_is_the_models_own(kind: str) -> None:
    own = tiny(kind)
    model = StudyModel(copy.deepcopy(own), Letters())
    prefix = a_prefix(model)
    expected = own(prefix.tokens[None, :TOKENS], use_cache=False).logits[0, -QUERIES:]
    torch.testing.assert_close(model.logits(prefix, attend_exactly), expected, rtol=0, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"k_bits": 4}])
@pytest.mark.parametrize("tail", ["clip", "renormalize"])
def test_with_everything_selected_it_is_full_attention(
    kind: str, tail: str, more: dict[str, Any]
) -> None:
    """Whatever the codes say."""
    model = StudyModel(tiny(kind), Letters())
    prefix = a_prefix(model)
    rule = Rule("threshold", 1e-30, "max", tail=tail, clip=0.1, **more)
    found = model.logits(prefix, RuleAttention(rule, model.k_stats if more else ()))
    expected = model.logits(prefix, attend_exactly)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@torch.no_grad()
def test_an_fp8_cache_is_of_every_layer() -> None:
    """Layers with a window keep K and V, too."""
    model = StudyModel(tiny("gemma"), Letters())
    prefix = a_prefix(model)
    seen: list[int] = []

    def store(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[1])
        return Stock.store(x)

    exact, stored = (
        model.logits(prefix, attend_exactly),
        model.logits(prefix, attend_exactly, store),
    )
    assert seen == [39, 39, 96, 96, 39, 39]  # 15 tokens of a window before 24 queries
    assert float((exact - stored).abs().max()) > 1e-4


def test_fp8_of_scale_1_saturates() -> None:
    values = torch.tensor([500.0, -1e9, 0.3, 448.0, -0.0018])
    assert Stock.store(values).tolist() == [448.0, -448.0, 0.3125, 448.0, -0.001953125]


def some_kv(heads: int = 2, size: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [Hkv, 2, Q, D] scaled, K and V [Hkv, T, D], with large channels of K."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(heads, 2, QUERIES, size, generator=generator) * 0.4
    k, v = (torch.randn(heads, TOKENS, size, generator=generator) for _ in range(2))
    k[..., 3] = k[..., 3] * 9 + 20
    return query, k, v


@pytest.mark.parametrize("host_dtype", ["model", "int8"])
@pytest.mark.parametrize("tail", ["clip", "renormalize"])
def test_codes_and_rows_are_those_of_the_reference(host_dtype: Any, tail: Any) -> None:
    """Selected blocks and outputs of the package's own steps, a request for each query."""
    query, k, v = some_kv()
    stats, level, page = key_stats(k), 0.02, 16
    heads, size = k.shape[0], k.shape[2]
    row = RowFormat(8, size, torch.float32, 4, host_dtype)
    pages = torch.zeros(TOKENS // page, heads, page * code_bytes(size), dtype=torch.uint8)
    host = torch.zeros(pages.shape[0] * heads * page // 8, row.bytes, dtype=torch.uint8)
    write_codes_and_rows(
        k.transpose(0, 1), v.transpose(0, 1), torch.arange(TOKENS), pages, host, row, stats
    )
    by_query = query.permute(2, 0, 1, 3).flatten(1, 2)
    lengths = torch.arange(TOKENS - QUERIES, TOKENS, dtype=torch.int32) + 1
    block_table = torch.arange(TOKENS // page, dtype=torch.int32).expand(QUERIES, -1)
    block_lse = score_codes(by_query, pages, stats, block_table, lengths, 1.0, 8, TOKENS // 8)
    selection = Selection(None, None, 1, 32, "max", level)
    selected = select_blocks(block_lse, lengths, heads, 8, selection, estimated=True)
    expected = attend_rows(
        by_query, host, row, stats, fetch_rows(selected, block_table, host, heads, page // 8),
        selected, lengths, 1.0, tail, clip=level / 2,
    )  # fmt: skip
    rule = clipped_threshold(level, tail=tail, k_bits=4, host_dtype=host_dtype)
    attention = RuleAttention(rule, [stats])
    found = attention(0, query, k, v).permute(2, 0, 1, 3).flatten(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert attention.tokens[0] == pytest.approx(selected.counts.double().mean().item() * 8)
    assert attention.tokens[0] < 0.8 * TOKENS  # something is left out
    assert selected.dropped is not None
    assert attention.dropped[0] == pytest.approx(selected.dropped.mean().item(), rel=1e-4)


@pytest.mark.parametrize("more", [{}, {"k_bits": 4}, {"floor": 0.5}])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_a_threshold_falls_with_the_length(power: float, more: dict[str, Any]) -> None:
    """Each query answers as under the fixed rule of its own length."""
    query, k, v = some_kv()
    level, length = 0.05, 80
    rule = clipped_threshold(level, length=length, power=power, **more)
    found = RuleAttention(rule, [key_stats(k)])(0, query, k, v)
    for number in range(QUERIES):
        tokens = TOKENS - QUERIES + number + 1
        factor = min(1.0, (length / tokens) ** power)
        assert (factor < 1) == (number > 7)  # on both sides of `length`
        fixed = clipped_threshold(level * factor, **more)
        expected = RuleAttention(fixed, [key_stats(k)])(0, query, k, v)[:, :, number]
        torch.testing.assert_close(found[:, :, number], expected, rtol=1e-5, atol=1e-6)
    unlike = RuleAttention(clipped_threshold(level, **more), [key_stats(k)])(0, query, k, v)
    assert not torch.allclose(found[:, :, -1], unlike[:, :, -1], rtol=1e-4, atol=1e-5)


def test_k_is_measured_as_by_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text, and the same mean and deviation of it."""
    model_config = SimpleNamespace(get_vocab_size=lambda: 90)
    monkeypatch.setattr(calibration, "cached_tokenizer_from_config", lambda config: Letters())
    tokens = calibration._tokens(model_config)
    model = StudyModel(tiny("gemma"), Letters())
    with torch.no_grad():
        found = model.k_stats[1]
        prefix = model.make_prefix("calibration", torch.cat((tokens, tokens[:1])), 0)
    key = prefix.keys[1]
    assert key.shape[1] == len(tokens)
    recorder = calibration._Recorder(SimpleNamespace(num_heads=4, num_kv_heads=1, scale=1.0), None)
    recorder._add(key.transpose(0, 1))
    for ours, theirs in zip(vars(found).values(), vars(recorder.stats()).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_channel_that_stands_still_has_a_deviation() -> None:
    key = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(0))
    key[0, :, 2] = 5.0
    key[1] = 3.0
    recorder = calibration._Recorder(SimpleNamespace(num_heads=3, num_kv_heads=3, scale=1.0), None)
    recorder._add(key.transpose(0, 1))
    found, expected = key_stats(key), recorder.stats()
    assert isinstance(found, KStats)
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.deviation, expected.deviation)


def test_rules_have_names_and_limits() -> None:
    assert [str(rule) for rule in (
        Rule(), Stock(), clipped_threshold(0.002),
        clipped_threshold(0.002, floor=0.9, k_bits=4, host_dtype="int8"),
        clipped_threshold(0.002, length=4096, power=0.5), clipped_threshold(0.002, clip=0.0005),
        Rule("threshold", 0.003, length=8192),
    )] == [
        "coverage .95, renormalize", "all, fp8 cache", "threshold .002, clip",
        "threshold .002, floor .9, clip, K codes, int8 rows", "threshold .002 x (4096/T)^.5, clip",
        "threshold .002, clip .0005", "threshold .003 x (8192/T), mean, renormalize",
    ]  # fmt: skip
    names = [str(rule) for rule in compared()]
    assert len(set(names)) == len(names)
    assert rule_of('{"kv_cache_dtype": "fp8"}') == Stock()
    assert rule_of('{"level": 0.9, "tail": "page"}') == Rule(level=0.9, tail="page")
    for fields, message in (
        ({"tail": "clip"}, "clip=0.0"), ({"length": 10}, "needs stop"),
        ({"host_dtype": "int8"}, "needs k_bits 4"), ({"k_bits": 4, "tail": "page"}, "not with"),
        ({"k_bits": 3}, "must be one of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Rule(**fields)
    with pytest.raises(ValueError, match="must be 'fp8'"):
        Stock("fp4")


def a_row(rule: dict[str, Any], context: int, kl: float, tokens: float, **more: Any) -> Any:
    return {
        "model": "small", "context": context, "passages": [{}] * 3, "device": "GPU", "rule": rule,
        "kl": kl, "tokens": tokens, "commit": "new", **more,
    }  # fmt: skip


def test_the_table_says_what_holds() -> None:
    fp8, one = {"kv_cache_dtype": "fp8"}, {"level": 0.9}
    rows = [
        {"commit": "old", "rule": {}},
        a_row(one, 4096, 0.9, 1.0, commit="older"),
        a_row(fp8, 4096, 0.005, 4000), a_row(fp8, 16384, 0.002, 16000),
        a_row(one, 4096, 0.0041, 700), a_row(one, 4096, 0.004, 701), a_row(one, 16384, 0.003, 900),
        a_row({"level": 0.99}, 16384, 0.001, 2000),
    ]  # fmt: skip
    assert table(rows).splitlines() == [
        "KL in nats a token (tokens a head); small; GPU; commit new",
        "",
        "| rule | small 4096 | small 16384 | holds |",
        "| --- | --- | --- | --- |",
        "| all, fp8 cache | 0.00500 (4000) | 0.00200 (16000) |  |",
        "| coverage .9, renormalize | 0.00400 (701) | 0.00300 (900) | 1 of 2 |",
        "| coverage .99, renormalize |  | 0.00100 (2000) | 1 of 1 |",
    ]
