# SPDX-License-Identifier: Apache-2.0
"""The `vllm-kcache` command. `check` has its own tests beside vLLM's (tests/integration)."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vllm_kcache.cli import main
from vllm_kcache.config import KCacheConfig

ROOT = Path(__file__).resolve().parents[1]
LLAMA = str(ROOT / "benchmarks/shapes/llama-3-8b")
PLAN = ["plan", LLAMA, "--context", "32768", "--host-memory", "109", "--top-n", "16"]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PLAN) == 0
    shown = capsys.readouterr().out
    rows = {line[:26].strip(): line[26:].split() for line in shown.splitlines() if line[26:]}
    assert rows["requests that fit"] == ["13", "27", "25", "53"]
    assert float(rows["step, ms"][0]) == pytest.approx(24.7, abs=0.3)
    exact, codes = (float(text.removesuffix("x")) for text in rows["against stock"])
    assert 1.6 < exact < 1.9 < 3.5 < codes
    # 109 GiB hold 109,898 blocks of 16 tokens, one of them vLLM's.
    assert rows["fit, of 4096 tokens"][3] == "429.3"
    assert rows["fit, of 131072 tokens"][3] == "13.4"
    for text in (
        "NVIDIA H100",
        "kcache 16 step: weights",
        "kcache 4 step: weights",
        "pays (more tokens/s than stock): from",
        "limited by: GPU memory bandwidth",
        "limited by: host memory",
        "Requests are limited by GPU memory. A larger --gpu-memory-utilization",
        "Requests are limited by host memory. More host memory, or a larger kcache_config.host_mem",
    ):
        assert text in shown
    # What was not given is said to be an estimate.
    assert "note: The hit rate is an estimate" in shown


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    engines = ("stock", "stock_fp8", "kcache_16", "kcache_4")
    assert [plan[name]["fits"] for name in engines] == [13, 27, 25, 53]
    assert plan["setup"]["config"] == {"top_n": 16}
    for name, limit in (("kcache_16", "GPU memory"), ("kcache_4", "host memory")):
        split = plan[name]
        assert split["cost"]["pcie_bytes"] > 0
        assert split["fit"]["limited_by"] == limit
        assert split["remedies"][0].startswith(f"Requests are limited by {limit}. ")
        assert split["limited_by"] in (
            "GPU memory bandwidth", "PCIe", "kernel launches", "host memory",
        )  # fmt: skip


def test_both_forms_are_planned_whatever_is_set(capsys: pytest.CaptureFixture[str]) -> None:
    def plan(settings: str) -> dict[str, Any]:
        assert main([*PLAN, "--json", "--kcache-config", settings]) == 0
        found = json.loads(capsys.readouterr().out)
        return {name: found[name] for name in ("kcache_16", "kcache_4")}

    assert plan("{}") == plan('{"k_bits": 16}') == plan('{"k_bits": 4}')
    exact = plan('{"k_bits": 4, "host_dtype": "model"}')
    assert exact["kcache_16"] == plan("{}")["kcache_16"]
    assert exact["kcache_4"]["fit"]["num_blocks"] < plan("{}")["kcache_4"]["fit"]["num_blocks"]


def test_the_table_of_more_gpus_is_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/plan.md, with the settings that are the defaults today."""
    text = (ROOT / "docs/plan.md").read_text()
    rows = re.findall(r"^\| (\d), (\d+)K(, half of the layers)? \| (\d.*) \|$", text, re.MULTILINE)
    assert len(rows) == 8
    for gpus, context, half, cells in rows:
        shape = ROOT / f"benchmarks/shapes/llama-3-70b{'-half' if half else ''}"
        flags = ["--gpu", "h200", "--tensor-parallel-size", gpus, "--max-num-seqs", "256"]
        flags += ["--context", f"{int(context) * 1024}", "--host-memory", f"{112 * int(gpus)}"]
        assert main(["plan", str(shape), *flags, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        engines = [found[name] for name in ("stock", "stock_fp8", "kcache_16", "kcache_4")]
        shown = [f"{engine['tokens_per_second']:.0f}" for engine in engines]
        for i in (2, 3):
            shown[i] += f", {engines[i]['speed_up_over_stock']:.2f}x"
        assert cells.split(" | ") == shown


FORMS = pytest.mark.parametrize("form", ["kcache_16", "kcache_4"])


@FORMS
def test_every_figure_of_the_machine_counts(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    def step_ms(*flags: str) -> float:
        assert main([*PLAN, "--requests", "13", "--hit-rate", "0", "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)[form]["step_ms"]

    plain = step_ms()
    assert step_ms("--hbm-bandwidth", "1550") > 1.4 * plain
    assert step_ms("--pcie-bandwidth", "5") > plain
    assert step_ms("--selected-tokens", "1024") > plain
    assert step_ms("--hit-rate", "0.9") < plain
    assert step_ms("--gpu", "h200") < plain
    assert step_ms("--weight-bits", "4") < plain
    assert step_ms("--tensor-parallel-size", "2") < plain


@FORMS
def test_memory_flags(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the host would hold more than the GPU."""

    def blocks(*flags: str) -> int:
        assert main([*PLAN, "--json", "--host-memory", "900", *flags]) == 0
        return json.loads(capsys.readouterr().out)[form]["fit"]["num_blocks"]

    plain = blocks()
    assert blocks("--gpu-memory", "40") < plain
    assert blocks("--gpu-memory-utilization", "0.5") < plain
    assert blocks("--host-memory", "10") < plain
    assert blocks("--kcache-config", '{"hot_cache_gib": 15}') < plain
    assert blocks("--max-num-batched-tokens", "65536") < plain


def test_settings_count(capsys: pytest.CaptureFixture[str]) -> None:
    def selected(*flags: str) -> float:
        assert (
            main(["plan", LLAMA, "--context", "4096", "--host-memory", "99", "--json", *flags]) == 0
        )
        return json.loads(capsys.readouterr().out)["kcache_4"]["selected_tokens"]

    assert selected() == pytest.approx(497)
    assert selected("--coverage", "0.9") == pytest.approx(345)
    assert selected("--coverage", "0.97") == pytest.approx(746)
    assert selected("--top-n", "16") == 128
    assert selected("--top-n", "all") == 4096
    assert selected("--kcache-config", '{"coverage": 0.95, "top_n": 32}') == 256


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--context", "999999", "--max-model-len", "4096"], "max_model_len, which is 4096"),
        (["--gpu-memory", "-1"], "argument --gpu-memory: '-1' must be a number from 1e-06"),
        (["--host-memory", "inf"], "argument --host-memory: 'inf' must be a number from 1e-06"),
        (["--gpu-memory-utilization", "1.5"], "'1.5' must be a number from 1e-06 to 1"),
        (["--hit-rate", "nan"], "argument --hit-rate: 'nan' must be a number from 0 to 1"),
        (["--block-size", "0"], "argument --block-size: '0' must be a whole number from 1 to"),
        (["--weight-bits", "0"], "argument --weight-bits: '0' must be a whole number from 1 to 32"),
        (["--requests", "9" * 5001], "must be a whole number from 1 to 1e+09"),
        (["--coverage", "2"], "kcache_config.coverage=2.0: must be"),
        (["--top-n", "most"], "kcache_config.top_n='most'"),
        (["--kcache-config", "{"], "kcache_config='{': not valid JSON"),
        (["--kcache-config", '{"k_bits": 8}'], "kcache_config.k_bits=8: must be"),
        (["--host-memory", "2"], "kcache 16: not one request of 32768 tokens fits"),
        (["--tensor-parallel-size", "5"], "must divide the 32 query heads"),
        (["--no-such\nflag"], "unrecognized arguments: --no-such flag"),
        (["--gpu", "abacus"], "argument --gpu: invalid choice: 'abacus'"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in ends_well([*PLAN, *flags], capsys)
    assert message in json.loads(out_of([*PLAN, "--json", *flags], capsys))["error"]


def test_wrong_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert "required" in ends_well([], capsys)
    assert "invalid choice: 'serve'" in ends_well(["serve"], capsys)
    assert "neither a folder with a config.json" in ends_well(["plan", "/nowhere"], capsys)


def ends_well(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that has an answer, or 2 and one line; that line. Never an exception."""
    code = main(arguments)
    shown = capsys.readouterr()
    if "--json" in arguments:
        json.loads(shown.out, parse_constant=pytest.fail)
    if code == 0:
        assert shown.out
        assert not shown.err
        return ""
    assert code == 2
    assert shown.err.startswith("vllm-kcache: error: ")
    assert len(shown.err.splitlines()) == 1
    assert "--json" in arguments or not shown.out
    return shown.err


def out_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    main(arguments)
    return capsys.readouterr().out


# What may stand where a number, a name or a list belongs; sizes that a model may have among them.
ODD_NUMBERS = (0, -1, 2**31, 10**30, 10**400, 1e308, 5e-324, math.inf, math.nan, 1.5)
SIZES = st.sampled_from((1, 2, 3, 4, 8, 64, 128, 1000, 4096, 2**31 - 1))
SCALARS = st.none() | st.booleans() | st.sampled_from(ODD_NUMBERS) | st.integers() | st.text()
VALUES = SIZES | st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
KEYS = (
    "hidden_size", "n_embd", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "intermediate_size", "ffn_dim", "num_local_experts",
    "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
    "max_position_embeddings", "tie_word_embeddings", "model_type", "layer_types", "kv_lora_rank",
    "is_encoder_decoder", "sliding_window", "use_sliding_window", "quantization_config",
    "text_config",
)  # fmt: skip
QUANTIZATIONS = st.fixed_dictionaries(
    {}, optional={"quant_method": st.sampled_from(("fp8", "gptq")) | VALUES, "bits": VALUES}
)
CHANGES = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5) | st.fixed_dictionaries(
    {"quantization_config": QUANTIZATIONS}
)
SETTINGS = (
    st.sampled_from((*ODD_NUMBERS, 4, "auto", "all", "max", "clip", "int8", "model", [0, 1]))
    | VALUES
)
GOOD = json.loads(Path(LLAMA, "config.json").read_text())
GOOD_FLAGS = st.sampled_from(
    (
        "1",
        "2",
        "8",
        "16",
        "4096",
        "0.5",
        "90",
        "1e-6",
        "1e9",
        "1000000000",
        "all",
        "h200",
        "float32",
    )
)
ODD_FLAGS = st.sampled_from((*map(str, ODD_NUMBERS), "9" * 5001, "-inf", "\u0663", "1_0"))
FLAG_VALUES = GOOD_FLAGS | st.floats().map(str) | st.integers().map(str) | ODD_FLAGS | st.text()
FLAGS = (
    "--context", "--requests", "--selected-tokens", "--hit-rate", "--gpu", "--gpu-memory",
    "--hbm-bandwidth", "--pcie-bandwidth", "--host-memory", "--gpu-memory-utilization",
    "--tensor-parallel-size", "--max-model-len", "--max-num-seqs", "--max-num-batched-tokens",
    "--block-size", "--dtype", "--weight-bits", "--top-n", "--coverage",
)  # fmt: skip
quick = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@example(changes={"hidden_size": True}, nested=False, shown=[])
@example(changes={"num_hidden_layers": 10**400}, nested=True, shown=["--json"])
@example(changes={"num_key_value_heads": 0}, nested=False, shown=[])
@given(changes=CHANGES, nested=st.booleans(), shown=st.sampled_from(([], ["--json"])))
def test_any_configuration_has_an_answer(
    changes: dict,
    nested: bool,
    shown: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = {**GOOD, **changes}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"text_config": config} if nested else config))
    message = ends_well(["plan", str(tmp_path), "--host-memory", "99", *shown], capsys)
    # A wrong value names the file and the key; sizes that are each possible may not fit the GPU.
    named = str(path) in message and any(key in message for key in KEYS)
    assert not message or named or "fit" in message
    assert len(message) < 500


@quick
@given(data=st.binary() | st.text().map(str.encode) | VALUES.map(lambda v: json.dumps(v).encode()))
@example(data=b"[" * 100_000)
@example(data=b'{"hidden_size": ' + b"9" * 5001 + b"}")
def test_any_file_has_an_answer(
    data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    assert str(path) in ends_well(["plan", str(tmp_path), "--json"], capsys)


@quick
@given(
    flags=st.dictionaries(st.sampled_from(FLAGS), GOOD_FLAGS, max_size=4)
    | st.dictionaries(st.sampled_from(FLAGS), FLAG_VALUES, max_size=4),
    shown=st.sampled_from(([], ["--json"])),
)
def test_any_flag_has_an_answer(
    flags: dict[str, str], shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"{flag}={value}" for flag, value in flags.items()]
    ends_well(["plan", LLAMA, "--host-memory=99", *shown, *given], capsys)


@quick
@given(st.dictionaries(st.sampled_from(sorted(KCacheConfig.model_fields)), SETTINGS, max_size=2))
def test_any_settings_have_an_answer(
    capsys: pytest.CaptureFixture[str], given: dict[str, Any]
) -> None:
    ends_well(["plan", LLAMA, "--kcache-config", json.dumps(given)], capsys)


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
    (found,) = json.loads(done.stdout)["refused"]
    assert found.startswith("--kv-backend kcache does not support kv_sharing_fast_prefill=True:")


@pytest.mark.parametrize("command", ["plan", "check"])
def test_help_is_printed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: vllm-kcache {command}" in capsys.readouterr().out
