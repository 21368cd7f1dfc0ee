# SPDX-License-Identifier: Apache-2.0
"""Mean and deviation of K, as the pass at start measures them; and what a user hears of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import assert_close
from vllm_kcache.cli import main
from vllm_kcache.config import KCacheConfigError
from vllm_kcache.integration import calibration
from vllm_kcache.types import KStats

HEADS, KV_HEADS, HEAD_SIZE, SCALE = 6, 2, 64, 0.2


def recorder(
    source: Any = None, window: int | None = None, chunk: int | None = None, **of_impl: Any
) -> Any:
    impl = SimpleNamespace(num_heads=HEADS, num_kv_heads=KV_HEADS, scale=SCALE, **of_impl)
    return calibration._Recorder(impl, source, window, chunk)


def run(recorder: Any, tokens: int, seed: int) -> tuple[torch.Tensor, ...]:
    """One pass with random inputs, as a layer gets them: query, key, value and the result."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(tokens, heads, HEAD_SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    query, key, value = (torch.randn(size, generator=generator) for size in sizes)
    key = key + torch.arange(HEAD_SIZE) / HEAD_SIZE
    output = torch.full((tokens, HEADS * HEAD_SIZE), torch.nan)
    recorder.forward(None, query, key, value, None, None, output=output)
    return query, key, value, output.view(tokens, HEADS, HEAD_SIZE)


def causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int = 10**6,
    sinks: torch.Tensor | None = None, cap: float = 1e6,
) -> torch.Tensor:  # fmt: skip
    key, value = (x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    scores = cap * (SCALE * torch.einsum("nhd,thd->hnt", query.double(), key) / cap).tanh()
    before = torch.arange(key.shape[0])[:, None] - torch.arange(key.shape[0])
    unseen = (before < 0) | (before >= window)
    weights = scores.masked_fill(unseen, -torch.inf).exp()
    total = weights.sum(-1)
    if sinks is not None:
        total = total + sinks.double().exp()[:, None]
    return torch.einsum("hnt,thd->nhd", weights / total[..., None], value)


def test_a_layer_attends_to_the_text_itself() -> None:
    query, key, value, result = run(recorder(), 37, 0)
    assert_close(result, causal(query, key, value))


@pytest.mark.parametrize("window", [1, 8, 36, 37, 100])
def test_a_window_layer_attends_to_its_window(window: int) -> None:
    query, key, value, result = run(recorder(window=window), 37, 0)
    assert_close(result, causal(query, key, value, window))


@pytest.mark.parametrize("chunk", [1, 8, 37, 100])
def test_a_chunked_layer_attends_within_chunks(chunk: int) -> None:
    query, key, value, result = run(recorder(chunk=chunk), 37, 0)
    for first in range(0, 37, chunk):
        part = slice(first, first + chunk)
        assert_close(result[part], causal(query[part], key[part], value[part]))


@pytest.mark.parametrize("window", [None, 8])
def test_a_layer_has_its_sinks(window: int | None) -> None:
    sinks = torch.linspace(-4, 6, HEADS)
    query, key, value, result = run(recorder(window=window, sinks=sinks), 37, 0)
    assert_close(result, causal(query, key, value, window or 10**6, sinks))


@pytest.mark.parametrize("name", ["soft_cap", "logits_soft_cap"])
def test_a_layer_has_its_cap(name: str) -> None:
    """Under our name, and under vLLM's own."""
    query, key, value, result = run(recorder(**{name: 3.0}), 37, 0)
    assert_close(result, causal(query, key, value, cap=3.0))


def test_a_layer_that_shares_a_cache_attends_to_that() -> None:
    owner = recorder()
    reader = recorder(owner)
    for seed in (0, 2):
        _, key, value, _ = run(owner, 20, seed)
        query, _, _, result = run(reader, 20, seed + 1)
        assert_close(result, causal(query, key, value))


def test_nothing_of_a_pass_stays_but_what_another_layer_reads() -> None:
    """K and V of all layers of a large model would take gigabytes."""
    tokens, alone, owner = 999, recorder(), recorder()
    layers = (alone, owner, recorder(owner))
    for layer in layers:
        run(layer, tokens, 0)
    kept = {
        layer: found
        for layer in layers
        if (found := [size for size in sizes_in(vars(layer)) if size >= tokens])
    }
    assert kept == {owner: [tokens * KV_HEADS * HEAD_SIZE] * 2}


def sizes_in(found: Any) -> list[int]:
    """Elements of the tensors in what an object holds."""
    if isinstance(found, torch.Tensor):
        return [found.numel()]
    if isinstance(found, dict):
        found = tuple(found.values())
    return [size for each in found for size in sizes_in(each)] if isinstance(found, tuple) else []


def test_mean_and_deviation_over_all_pieces() -> None:
    layer = recorder()
    keys = torch.cat([run(layer, tokens, tokens)[1] for tokens in (50, 1, 33)])
    stats = layer.stats()
    assert_close(stats.mean, keys.double().mean(0))
    assert_close(stats.deviation, keys.double().std(0, correction=0))


def test_no_deviation_is_zero() -> None:
    """Neither of a channel that stood still, nor of a head."""
    layer = recorder()
    key = torch.ones(10, KV_HEADS, HEAD_SIZE)
    key[:, 0, 1:] = torch.randn(10, HEAD_SIZE - 1)
    layer._add(key)
    stats = layer.stats()
    width = float(key[:, 0].double().var(0, correction=0).mean().sqrt())
    assert float(stats.deviation[0, 0]) == pytest.approx(width / 128)
    assert bool((stats.deviation[1] == 1).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_k_that_is_no_number_is_an_error(value: float) -> None:
    layer = recorder()
    key = torch.ones(10, KV_HEADS, HEAD_SIZE)
    key[3, 1, 5] = value
    layer._add(key)
    with pytest.raises(RuntimeError, match="K is not finite"):
        layer.stats()


def test_the_line_of_the_log() -> None:
    deviation = torch.ones(1, 64)
    deviation[0, 3] = 20.0
    stats = [
        KStats(torch.full((1, 64), -2.5), torch.ones(1, 64)),
        KStats(torch.zeros(1, 64), deviation),
    ]
    assert calibration.summary(stats) == (
        "Of 2 layers the largest |mean| / deviation of a channel is 2.5, and 1 of 128 channels are "
        "more than 4 times as wide as their head."
    )


def a_model(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "get_vocab_size": lambda: 100,
            "skip_tokenizer_init": True,
            "max_model_len": 4096,
            "architecture": "SomeForCausalLM",
            **changes,
        }
    )


def test_tokens_are_the_same_always(monkeypatch: pytest.MonkeyPatch) -> None:
    first = calibration._tokens(a_model())
    assert first.shape == (2048,)
    assert 0 <= int(first.min()) < int(first.max()) < 100
    torch.manual_seed(5)
    assert torch.equal(calibration._tokens(a_model()), first)

    class Words:
        def encode(self, text: str) -> list[int]:
            return [len(word) for word in text.split()]

    monkeypatch.setattr(calibration, "cached_tokenizer_from_config", lambda config: Words())
    # Fewer words than tokens are wanted: the text begins again.
    words = calibration._tokens(a_model())
    assert words[:4].tolist() == [3, 5, 4, 3]  # The ferry left the
    again = int((words[4:].unfold(0, 8, 1) == words[:8]).all(1).nonzero()[0]) + 4
    assert 1000 < again < 2048
    assert torch.equal(words[again:], words[: 2048 - again])


def test_a_model_that_cannot_be_run_says_what_to_do() -> None:
    config = SimpleNamespace(
        model_config=a_model(),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=512),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )

    class Runner:
        def get_model(self) -> Any:
            raise TypeError("forward() needs pictures")

    with pytest.raises(KCacheConfigError) as error:
        calibration.calibrate(Runner(), config, [], torch.device("cpu"))
    assert str(error.value) == (
        "kcache_config.k_bits=4: the pass over a short text that measures K failed for "
        "SomeForCausalLM (TypeError: forward() needs pictures). Set kcache_config.k_bits to 16, "
        "which needs no such pass."
    )


@pytest.mark.usefixtures("quick_vllm")
def test_check_says_that_k_is_measured(
    folders: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders("llama")
    for settings, noted in (('{"k_bits": 4}', True), ('{"k_bits": 16}', False), ("{}", True)):
        assert main(["check", folder, "--kcache-config", settings]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == f"{folder}: nothing would be refused"
        assert [line.split(":")[:2] for line in lines[:-1]] == [["note", " k_bits 4"]] * noted
