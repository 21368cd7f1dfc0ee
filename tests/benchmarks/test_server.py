# SPDX-License-Identifier: Apache-2.0
"""The load of benchmarks/engine/server.py, how its servers are called, and its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from benchmarks.engine import server
from benchmarks.engine.server import Workload
from benchmarks.replay import extension, replay
from benchmarks.replay.record import Recording
from vllm_kcache.cache.formats import CacheShape
from vllm_kcache.types import Selection


@pytest.mark.parametrize("text", ["16384/512", "32768+256/256"])
def test_workloads_are_read(text: str) -> None:
    assert str(Workload.parse(text)) == text


@pytest.mark.parametrize("text", ["16384", "0/4", "8+16/4", "16+0/4", "16/0", "a/b", "16+16+16/4"])
def test_no_workload(text: str) -> None:
    with pytest.raises(ValueError, match="workload"):
        Workload.parse(text)


def test_new_prompts_share_no_tokens() -> None:
    ahead, trace = Workload.parse("40/512").traces(3, 2, 0)
    assert [request["input_length"] for request in trace] == [40] * 3
    assert [request["output_length"] for request in trace] == [512] * 3
    assert {request["output_length"] for request in ahead} == {16}
    ids = [number for request in (*ahead, *trace) for number in request["hash_ids"]]
    assert len(ids) == len(set(ids)) == 3 * (len(ahead) + 3)


def test_conversations_take_turns() -> None:
    """A turn of all before the next; each begins with what was sent ahead, and nothing else."""
    workload = Workload.parse("64+16/8")
    ahead, trace = workload.traces(6, 2, 1000)
    assert workload.concurrency(6, 2) == len(ahead) == 3
    prefixes = [request["hash_ids"] for request in ahead]
    assert [request["input_length"] for request in ahead] == [64] * 3
    assert [request["output_length"] for request in ahead] == [1] * 3
    assert [request["hash_ids"][:4] for request in trace] == prefixes * 2
    new = [tuple(request["hash_ids"][4:]) for request in trace]
    assert len(set(new)) == 6
    assert not {number for ids in new for number in ids} & {id for ids in prefixes for id in ids}
    assert {request["input_length"] for request in trace} == {80}
    with pytest.raises(ValueError, match="--num-prompts 5"):
        workload.traces(5, 2, 0)


def test_each_token_id_is_a_word(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 300, "model_type": "llama"}))
    server.add_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = [299, 0, 17, 17]
    assert tokenizer.encode("w299 w0 w17 w17").ids == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "w299 w0 w17 w17"
    assert tokenizer.get_vocab_size() == 300


@pytest.mark.parametrize(
    ("config", "recording"), [({}, "max"), ({"coverage": 0.95, "k_bits": 4}, "sum")]
)
def test_a_server_plays_what_its_rule_reads(config: dict[str, Any], recording: str) -> None:
    options = server.parse(["shape", "--serve-arguments", "--seed 3"])
    options.on_gpu = True
    engine = {"engine": "kcache", "kv_cache_dtype": "auto", "kcache_config": config}
    arguments = server.serve_arguments(options, Path("shape"), engine, 100)
    at = arguments.index("--worker-extension-cls")
    assert arguments[at + 1] == f"benchmarks.replay.extension.{recording}"
    assert json.loads(arguments[arguments.index("--kcache-config") + 1]) == config
    assert arguments[-2:] == ["--seed", "3"]
    stock = {"engine": "stock", "kv_cache_dtype": "fp8", "kcache_config": {}}
    arguments = server.serve_arguments(options, Path("shape"), stock, 100)
    assert arguments[arguments.index("--kv-cache-dtype") + 1] == "fp8"
    assert not any("kcache" in argument or "extension" in argument for argument in arguments)


def test_a_worker_that_looks_for_the_extension_plays(monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[int] = []

    class Played:
        def __init__(self, recording: Recording, device: str) -> None:
            assert device == "cpu"
            self.group = recording.group

        def install(self) -> None:
            played.append(self.group)

    monkeypatch.setattr(replay, "Replay", Played)
    assert extension.max is extension.Player
    assert played == [3]
    assert extension.sum is extension.Player
    assert played == [3, 1]
    with pytest.raises(AttributeError):
        _ = extension.mean


def test_a_recording_goes_where_a_worker_has_its_buffers() -> None:
    """When it looks for the extension, a worker's current GPU is the first one, whichever it is to
    be."""
    shape = CacheShape(1, 4, 2, 64, 16, 8, torch.bfloat16)
    played = replay.Replay(Recording.load(), "cpu")
    assert played.codes.device.type == "cpu"
    its = played.Workspace.make(shape, Selection(None, 0.9, 1, 16, "sum"), 2, 8, "meta")
    assert {its.block_lse.device, played.codes.device, played.lengths.device} == {
        torch.device("meta")
    }


def test_replay_needs_long_prompts() -> None:
    server.replay_of(server.parse(["shape", "--workloads", "4168/4", "4160+8/4"]), {})
    with pytest.raises(ValueError, match=r"at least 4168 tokens.* 4167"):
        server.replay_of(server.parse(["shape", "--workloads", "4167/4", "8192/4"]), {})


REPORT = {
    "duration": 8.0, "completed": 2, "total_input_tokens": 80, "total_output_tokens": 20,
    "request_throughput": 0.25, "output_throughput": 2.5,
    **{f"{p}_{name}_ms": value for name in ("ttft", "tpot", "itl", "e2el")
       for p, value in (("p50", 10.0), ("p99", 20.0))},
}  # fmt: skip


def test_a_request_that_fails_is_no_figure() -> None:
    _, trace = Workload.parse("40/10").traces(2, 1, 0)
    server.check_report(REPORT, trace)
    with pytest.raises(RuntimeError, match="'completed': 1"):
        server.check_report({**REPORT, "completed": 1, "failed": 1}, trace)
    with pytest.raises(RuntimeError, match="'total_output_tokens': 19"):
        server.check_report({**REPORT, "total_output_tokens": 19}, trace)


def test_figures_are_of_the_measurement_alone() -> None:
    names = (*server.STOCK_METRICS, *server.KCACHE_METRICS)
    before = dict.fromkeys(names, 100.0)
    after = dict(zip(names, (180, 140, 101, 300, 104, 190, 107, 103, 1000, 100), strict=True))
    row = server.figures_of(REPORT, before, after)
    assert (row["cached_share"], row["preemptions"]) == (0.5, 1)
    assert (row["mean_selected_blocks"], row["hit_rate"]) == (50.0, 0.9)
    assert row["kcache_metrics"]["vllm_kcache_fetched_bytes_total"] == 900
    assert row["ttft_ms"] == {"p50": 10.0, "p99": 20.0}
    stock = {name: after[name] for name in server.STOCK_METRICS}
    assert "hit_rate" not in server.figures_of(REPORT, before, stock)


def test_table_has_the_last_row_of_each() -> None:
    def row(engine: str, workload: str, rate: float) -> dict[str, Any]:
        return {
            "gpu": "GPU", "model": "m", "layers": None, "workload": workload, "num_prompts": 4,
            "concurrency": 2, "request_rate": "inf", "engine": engine, "mode": None, "label": "",
            "kcache_config": None, "requests_per_second": rate / 8, "commit": "abc",
            "output_tokens_per_second": rate, "ttft_ms": {"p50": 1500.0, "p99": 2000.0},
            "tpot_ms": {"p50": 10.0, "p99": 20.0}, "cached_share": 0.5,
        }  # fmt: skip

    rows = [
        row("stock", "16/8", 1.0), row("stock", "32/8", 10.0), row("kcache-4", "16/8", 30.0),
        row("stock", "16/8", 20.0),
    ]  # fmt: skip
    assert server.table(rows).splitlines()[2:] == [
        "| 16/8: 4, 2 at once | stock | 2.50 | 20 | 1.00x | 1.50, 2.00 | 10.0, 20.0 | 50% | abc |",
        (
            "| 16/8: 4, 2 at once | kcache-4 | 3.75 | 30 | 1.50x | 1.50, 2.00 | 10.0, 20.0 | 50% "
            "| abc |"
        ),
        "| 32/8: 4, 2 at once | stock | 1.25 | 10 | 1.00x | 1.50, 2.00 | 10.0, 20.0 | 50% | abc |",
    ]
