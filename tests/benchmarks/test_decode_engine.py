# SPDX-License-Identifier: Apache-2.0
"""The decode benchmark on models with several kinds of layers: what fits, and what is filled."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.engine import decode, decode_engine, drafting
from benchmarks.engine.decode import parse
from benchmarks.engine.decode_engine import SHORT_STEPS, longest
from benchmarks.rows import load
from tests.integration.engines import in_forks, spec_of
from tests.integration.families import FAMILIES
from tests.integration.tiny_models import write_random_model

# Tokens of a request and the last of them, which it makes; both lie in several blocks.
TOKENS, MADE = 300, 12
# Blocks that a few requests use up, of all groups; beside a second pool those of the first.
ENGINE = {
    "skip_tokenizer_init": True, "max_model_len": 384, "max_num_batched_tokens": 128,
    "enable_prefix_caching": False, "max_num_seqs": 32,
    "kv_transfer_config": {
        "kv_connector": "DecodeBenchConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"fill_std": 0.5, "startup_fill": True},
    },
}  # fmt: skip


def run(engine: dict[str, Any]) -> dict[str, Any]:
    """Requests that are said to fit; of these, and of one more, how many run to their end."""
    from vllm import LLM

    from benchmarks.engine.decode_engine import fill_cache, requests_that_fit

    llm = LLM(**engine)
    fits = requests_that_fit(llm, TOKENS)
    result: dict[str, Any] = {"fits": fits, "run": [at_once(llm, fits), at_once(llm, fits + 1)]}
    if "kv_backend" in engine:
        before = llm.collective_rpc(sums)[0]
        llm.collective_rpc(fill_cache)
        after = llm.collective_rpc(sums)[0]
        result["filled"] = sorted(name for name in after if after[name] != before[name])
    return result


def at_once(llm: Any, count: int) -> int:
    """Requests that run together at the last token of the first to end."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    sampling = SamplingParams(max_tokens=MADE, ignore_eos=True, detokenize=False)
    for number in range(count):
        prompt = {"prompt_token_ids": [5 + number % 90] * (TOKENS - MADE)}
        engine.add_request(str(number), prompt, sampling)
    scheduler, most = engine.engine_core.engine_core.scheduler, 0
    while engine.has_unfinished_requests():
        running = len(scheduler.running)
        if any(output.finished for output in engine.step()):
            most = max(most, running)
    return most


def sums(worker: Any) -> dict[str, int]:
    """Sum of the bytes of each layer's cache."""
    import torch

    def of_bytes(cache: Any) -> int:
        parts = (cache,) if isinstance(cache, torch.Tensor) else cache
        return sum(int(part.contiguous().view(torch.uint8).long().sum()) for part in parts)

    layers = worker.vllm_config.compilation_config.static_forward_context
    return {
        name: of_bytes(layer.kv_cache)
        for name, layer in layers.items()
        if hasattr(layer, "kv_cache")
    }


def test_no_profile_of_several_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["shape", "--profile"]).tensor_parallel_size == 1
    with pytest.raises(SystemExit):
        parse(["shape", "--profile", "--tensor-parallel-size", "2"])
    assert "kernels of one GPU" in capsys.readouterr().err


def test_drafts_are_of_one_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["shape"]).drafts == [0]
    with pytest.raises(SystemExit):
        parse(["shape", "--drafts", "0", "3", "--tensor-parallel-size", "2"])
    assert "--drafts: on one GPU" in capsys.readouterr().err


def test_every_draft_is_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of what vLLM's class would draft, in its buffer; the class takes the settings."""
    from vllm.v1.worker.gpu.spec_decode.ngram import speculator as module

    NgramGPUSpeculator = module.NgramGPUSpeculator
    takes = list(inspect.signature(NgramGPUSpeculator.propose).parameters)
    assert takes[:2] == ["self", "input_batch"]
    monkeypatch.setattr(NgramGPUSpeculator, "propose", None)  # put back behind the test
    monkeypatch.setattr(module, "HAS_TRITON", True)  # a CPU's vLLM says no
    drafting.install()
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(**drafting.speculation(3)),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        model_config=SimpleNamespace(max_model_len=64),
    )
    speculator = NgramGPUSpeculator(config, torch.device("cpu"), None)
    drafts = speculator.propose(SimpleNamespace(num_reqs=2), None, None, num_speculative_tokens=3)
    assert drafts.tolist() == [[drafting.DRAFT_TOKEN] * 3] * 2
    assert speculator.drafts[2:].eq(0).all(), "rows of no request were written"


def test_drafts_have_room(capsys: pytest.CaptureFixture[str]) -> None:
    """A step is scheduled behind one whose k + 1 tokens are taken for right; vLLM cuts what goes
    past max_model_len."""
    for drafts in (1, 3, 7, 15):
        options = {"contexts": [64, 1000], "output": 48, "max_model_len": None, "drafts": drafts}
        # The first token of all, and steps that are profiled.
        made = 1 + 48 + decode_engine.PROFILED_STEPS
        assert 1000 + made + 2 * (1 + drafts) <= longest(options)
        assert longest({**options, "drafts": None}) == 1000 + 48 + 16
    arguments = ["shape", "--context", "1000", "--output", "48", "--drafts", "0", "7"]
    for more, message in (
        (["--max-model-len", "1060"], "must be at least 1074"),
        (["--drafts", "-1"], "--drafts -1: must be at least 0"),
    ):
        with pytest.raises(SystemExit):
            parse([*arguments, *more])
        assert message in capsys.readouterr().err


class Stepper:
    """An engine of two requests, of which a step makes so many tokens."""

    def __init__(self, made: list[tuple[int, int]]) -> None:
        self.llm_engine, self.collective_rpc = self, lambda *arguments: None
        self.steps, self.tokens, self.running = iter(made), [0, 0], 2

    def add_request(self, name: str, prompt: Any, sampling: Any) -> str:
        return name

    def get_num_unfinished_requests(self) -> int:
        return self.running

    def has_unfinished_requests(self) -> bool:
        return self.running > 0

    def abort_request(self, names: list[str], internal: bool) -> None:
        self.running = 0

    def step(self) -> list[Any]:
        for number, more in enumerate(next(self.steps)):
            self.tokens[number] += more
        return [
            SimpleNamespace(
                request_id=str(number), outputs=[SimpleNamespace(token_ids=[0] * tokens)]
            )
            for number, tokens in enumerate(self.tokens)
        ]


@pytest.mark.parametrize(
    ("timed", "found"),
    [
        pytest.param([(1, 1)] * 4, None, id="a token a step"),
        pytest.param([(0, 0), *[(1, 1)] * 3], None, id="a step that begins the queue"),
        pytest.param([(1, 1), (1, 2), (1, 1), (1, 1)], 9, id="a right draft"),
        pytest.param([(1, 1), (0, 0), (0, 0), (1, 1)], 4, id="steps without a request"),
    ],
)
def test_a_step_makes_a_token_of_each_request(
    timed: list[tuple[int, int]], found: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        decode_engine, "_figures", lambda llm: dict.fromkeys(decode_engine.FIGURES, 0.0)
    )
    options = {"output": SHORT_STEPS + 4, "repeats": 1, "profile": False, "engine": "stock"}
    llm = Stepper([(1, 1)] * (1 + SHORT_STEPS) + timed)
    if found is None:
        assert decode_engine._time_steps(llm, options, 8, 2)["requests"] == 2
        return
    with pytest.raises(RuntimeError, match=f"2 requests made {found} tokens in 4 steps"):
        decode_engine._time_steps(llm, options, 8, 2)


# Of the model of two ranks.
LISTS_OF_STEP, STEPS = 2 * 4, 12


def decode_on_two_ranks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, contexts: list[int], *more: str
) -> list[dict[str, Any]]:
    """Rows of stock vLLM and the split cache; a second call adds none.

    Args:
        folder: For the model and the rows.
        contexts: Two, which are decoded by 2 requests and by 3.
        more: Arguments of decode.py.
    """
    model = write_random_model(
        folder / "model", "llama", hidden_size=512, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, num_hidden_layers=2, vocab_size=31000, max_position_embeddings=16384,
    )  # fmt: skip
    results = folder / "rows.jsonl"
    monkeypatch.setattr("sys.argv", [
        "decode", model, "--tensor-parallel-size", "2", "--engines", "stock", "kcache-4",
        "--context", *map(str, contexts), "--requests", "2", "0", "--max-requests", "3",
        "--output", str(STEPS), "--repeats", "1", "--resume", "--max-num-batched-tokens", "256",
        "--results", str(results), *more,
    ])  # fmt: skip
    decode.main()
    rows = load(results)
    assert [(row["engine"], row["context"], row["runs"][0]["requests"]) for row in rows] == [
        (engine, context, count)
        for engine in ("stock", "kcache") for context in contexts for count in (2, 3)
    ]  # fmt: skip
    assert {row["tensor_parallel_size"] for row in rows} == {2}
    for row in rows[4:]:
        lists = row["runs"][0]["requests"] * LISTS_OF_STEP * (STEPS - SHORT_STEPS)
        assert row["runs"][0]["kcache_metrics"]["selected_lists"] == lists
        assert row["runs"][0]["mean_selected_tokens"] > 0
    decode.main()
    assert load(results) == rows
    return rows


@pytest.mark.full
def test_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both ranks are filled and counted."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    decode_on_two_ranks(
        tmp_path, monkeypatch, [64, 128], "--top-n", "16", "--host-memory-gib", "0.5"
    )
    assert capfd.readouterr().err.count("no cell is left") == 2


@pytest.mark.parametrize(
    ("name", "blocks", "second_blocks", "full_layers"),
    [
        pytest.param("Gemma 3", 60, 30, (2, 3), id="windows"),
        pytest.param("Granite 4-H", 60, 8, (1, 3), id="states", marks=pytest.mark.full),
    ],
)
def test_all_that_fit_run_and_no_more(
    name: str, blocks: int, second_blocks: int, full_layers: tuple[int, ...], tmp_path: Path
) -> None:
    family = FAMILIES[name]
    model = write_random_model(tmp_path / "model", family.model_type, **family.changes)
    engine = {**ENGINE, **family.engine, "model": model}
    specs = {
        "stock": spec_of([], **engine, num_gpu_blocks_override=blocks),
        "kcache": spec_of(
            [], {"top_n": 16, "k_bits": 4}, **engine, num_gpu_blocks_override=second_blocks
        ),
    }
    calls = {
        key: ["tests.benchmarks.test_decode_engine:run", spec["engine"]]
        for key, spec in specs.items()
    }
    for key, outcome in in_forks(tmp_path, calls).items():
        assert outcome["code"] == 0, outcome["stdout"][-2000:] + outcome["stderr"][-4000:]
        found = outcome["result"]
        assert 2 <= found["fits"] < ENGINE["max_num_seqs"] - 1, (key, found)
        assert found["run"] == [found["fits"], found["fits"]], (key, found)
        if key == "kcache":
            # With K codes the pages of the split layers are filled anew, and nothing else.
            numbers = sorted(int(layer.split(".")[2]) for layer in found["filled"])
            assert tuple(numbers) == full_layers, found
