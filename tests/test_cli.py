# SPDX-License-Identifier: Apache-2.0
"""The `vllm-kcache` command. `check` has its own tests beside vLLM's (tests/integration)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_kcache.cli import main

ROOT = Path(__file__).resolve().parents[1]
LLAMA = str(ROOT / "benchmarks/shapes/llama-3-8b")
PLAN = ["plan", LLAMA, "--context", "32768", "--host-memory", "109", "--top-n", "16"]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PLAN) == 0
    shown = capsys.readouterr().out
    rows = {line[:26].strip(): line[26:].split() for line in shown.splitlines() if line[26:]}
    assert rows["requests that fit"] == ["13", "27", "25"]
    assert float(rows["step, ms"][0]) == pytest.approx(24.7, abs=0.3)
    assert re.fullmatch(r"1\.[678]\dx", rows["kcache against it"][0])
    for text in ("NVIDIA H100", "pays (more tokens/s than stock): from", "limited by: "):
        assert text in shown
    # What was not given is said to be an estimate.
    assert "note: The hit rate is an estimate" in shown


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [plan[name]["fits"] for name in ("stock", "stock_fp8", "kcache")] == [13, 27, 25]
    assert plan["kcache"]["cost"]["pcie_bytes"] > 0
    assert plan["setup"]["config"] == {"top_n": 16}
    assert plan["limited_by"] in (
        "GPU memory bandwidth", "PCIe", "kernel launches", "host memory",
    )  # fmt: skip


def test_every_figure_of_the_machine_counts(capsys: pytest.CaptureFixture[str]) -> None:
    def step_ms(*flags: str) -> float:
        assert main([*PLAN, "--requests", "13", "--hit-rate", "0", "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)["kcache"]["step_ms"]

    plain = step_ms()
    assert step_ms("--hbm-bandwidth", "1550") > 1.5 * plain
    assert step_ms("--pcie-bandwidth", "5") > plain
    assert step_ms("--selected-tokens", "1024") > plain
    assert step_ms("--hit-rate", "0.9") < plain
    assert step_ms("--gpu", "h200") < plain
    assert step_ms("--weight-bits", "4") < plain
    assert step_ms("--tensor-parallel-size", "2") < plain


def test_memory_flags(capsys: pytest.CaptureFixture[str]) -> None:
    def blocks(*flags: str) -> int:
        assert main([*PLAN, "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)["kcache"]["fit"]["num_blocks"]

    plain = blocks()
    assert blocks("--gpu-memory", "40") < plain
    assert blocks("--gpu-memory-utilization", "0.5") < plain
    assert blocks("--host-memory", "10") < plain
    assert blocks("--kcache-config", '{"hot_cache_gib": 10}') < plain
    assert blocks("--max-num-batched-tokens", "65536") < plain


def test_settings(capsys: pytest.CaptureFixture[str]) -> None:
    def selected(*flags: str) -> float:
        assert (
            main(["plan", LLAMA, "--context", "4096", "--host-memory", "99", "--json", *flags]) == 0
        )
        return json.loads(capsys.readouterr().out)["selected_tokens"]

    assert selected() == pytest.approx(497)
    assert selected("--coverage", "0.9") == pytest.approx(345)
    assert selected("--coverage", "0.97") == pytest.approx(746)
    assert selected("--top-n", "16") == 128
    assert selected("--top-n", "all") == 4096
    assert selected("--kcache-config", '{"coverage": 0.95, "top_n": 32}') == 256


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--context", "0"], "context=0"),
        (["--context", "999999", "--max-model-len", "4096"], "max_model_len, which is 4096"),
        (["--gpu-memory", "-1"], "gpu_memory_bytes: -1.0 must be above 0"),
        (["--host-memory", "0"], "--host-memory=0.0: must be above 0"),
        (["--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization=1.5: must be above 0"),
        (["--block-size", "0"], "--block-size=0: must be at least 1"),
        (["--max-model-len", "0"], "--max-model-len=0: must be at least 1"),
        (["--requests", "0"], "requests=0: must be at least 1"),
        (["--coverage", "2"], "kcache_config.coverage=2.0: must be greater than 0"),
        (["--top-n", "most"], "kcache_config.top_n='most'"),
        (["--kcache-config", "{"], "kcache_config='{': not valid JSON"),
        (["--kcache-config", '{"k_bits": 4}'], "kcache_config.k_bits=4: not planned yet"),
        (["--tensor-parallel-size", "5"], "must divide the 32 query heads"),
    ],
)
def test_wrong_figures(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, *flags]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("vllm-kcache: error: ")
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["serve"], [*PLAN, "--no-such-flag"], [*PLAN, "--gpu", "abacus"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert "usage: vllm-kcache" in capsys.readouterr().err


def test_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "/nowhere"]) == 2
    assert "neither a folder with a config.json" in capsys.readouterr().err


def test_plan_needs_no_vllm() -> None:
    """Nothing of vLLM is imported, nor asked for."""
    code = (
        "import sys; sys.modules['vllm'] = None; from vllm_kcache.cli import main; "
        f"raise SystemExit(main({PLAN!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout


@pytest.mark.slow
def test_check_as_a_command() -> None:
    """The real command: its answer alone on stdout, whatever vLLM has to say."""
    model = ROOT / "models/SmolLM2-135M-Instruct"
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("vllm-kcache")),
            "check", str(model), "--json", "--kv-sharing-fast-prefill",
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (found,) = json.loads(done.stdout)
    assert found.startswith("--kv-backend kcache does not support kv_sharing_fast_prefill=True:")


@pytest.mark.parametrize("command", ["plan", "check"])
def test_help_is_printed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: vllm-kcache {command}" in capsys.readouterr().out
