# SPDX-License-Identifier: Apache-2.0
"""`vllm-kcache check`: everything that would be refused at start, at once, without starting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integration.builders import configs_of
from vllm_kcache.cli import main

pytestmark = pytest.mark.usefixtures("quick_vllm")

PREFIX = "--kv-backend kcache does not support "


def problems(folder: str, *flags: str) -> list[str]:
    from vllm_kcache.integration.check import problems as found

    return found(folder, list(flags))


def test_nothing_to_refuse(
    folders: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders("llama")
    flags = ["--max-model-len", "256", "--kcache-config", '{"k_bits": 16}']
    assert main(["check", folder, *flags]) == 0
    assert capsys.readouterr().out == f"{folder}: nothing would be refused\n"


def test_everything_at_once(folders: Callable[[str], str]) -> None:
    """Arguments, features of engine and model, settings, memory: none hides another."""
    found = problems(
        folders("gemma2"),
        "--attention-backend", "FLASH_ATTN",
        "--kv-offloading-size", "1",
        "--block-size", "8",
        "--kcache-config", '{"dense_layers": 2, "host_memory_gib": 1000000}',
    )  # fmt: skip
    assert [text.split(":")[0].removeprefix(PREFIX) for text in found[:-1]] == [
        "attention_backend=FLASH_ATTN",
        "kv_offloading_size=1.0",
        "block_size=8",
        "kcache_config.dense_layers=2",
    ]
    assert found[-1].startswith("the host pool needs 1000000.00 GiB, but ")
    assert found[-1].endswith("or set kcache_config.host_memory_gib lower")


def test_exit_code_and_lines(
    folders: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders("bloom")
    assert main(["check", folder]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"refused: {PREFIX}ALiBi (BloomForCausalLM):")
    assert lines[1].startswith("note: k_bits 4: ")
    assert lines[2:] == [f"{folder}: 1 refusal"]


def test_json(folders: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", folders("llama"), "--json", "--kv-cache-dtype", "fp8"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert list(answer) == ["refused", "notes"]
    (found,), (note,) = answer.values()
    assert found.startswith(PREFIX + "kv_cache_dtype=fp8:")
    assert note.startswith("k_bits 4: ")


@pytest.mark.parametrize("cap", [float("inf"), float("nan"), -50.0])
def test_a_soft_cap_that_is_none(folders: Callable[[str], str], tmp_path: Path, cap: float) -> None:
    """JSON as Python writes it has such numbers, and vLLM takes them."""
    config = json.loads(Path(folders("gemma2"), "config.json").read_text())
    for value in (cap, None, 0.0):
        text = json.dumps({**config, "attn_logit_softcapping": value})
        (tmp_path / "config.json").write_text(text)
        starts = [PREFIX + "a soft cap on scores out of range"] if value is cap else []
        assert [found.split(" (")[0] for found in problems(str(tmp_path))] == starts


def test_what_vllm_refuses_is_listed(folders: Callable[[str], str]) -> None:
    (found,) = problems(folders("llama"), "--tensor-parallel-size", "3")
    assert found == (
        "vLLM: Total number of attention heads (4) must be divisible by tensor parallel size (3)."
    )


def test_flags_that_name_the_backend_are_taken(folders: Callable[[str], str]) -> None:
    """A command line of vllm serve can be checked as it is."""
    assert problems(folders("llama"), "--kv-backend", "kcache", "--kcache-config", "{}") == []
    by_additional = problems(
        folders("llama"), "--additional-config", '{"kcache": {"dense_layers": 2}}'
    )
    assert [text.split(":")[0] for text in by_additional] == ["kcache_config.dense_layers=2"]


@pytest.mark.parametrize(("k_bits", "token_bytes"), [(16, 64 * 2), (4, 64 + 64 + 2 + 2)])
def test_blocks_that_do_not_fit(
    folders: Callable[[str], str], k_bits: int, token_bytes: int
) -> None:
    """2 layers x 2 KV heads x 16 tokens of V, or of K and V as int8 with their scales."""
    settings = f'{{"host_memory_gib": 0.5, "k_bits": {k_bits}}}'
    flags = ("--block-size", "16", "--kcache-config", settings, "--num-gpu-blocks-override")
    most = 2**29 // (2 * 2 * 16 * token_bytes)
    assert problems(folders("llama"), *flags, str(most)) == []
    (found,) = problems(folders("llama"), *flags, str(most + 1))
    assert found == (
        f"num_gpu_blocks_override={most + 1}: the rows of that many blocks need 0.50 GiB of host "
        "memory, and this rank may use 0.50 GiB. Lower --num-gpu-blocks-override or raise "
        "kcache_config.host_memory_gib."
    )


def test_blocks_that_the_table_cannot_number() -> None:
    """As the table itself refuses them (cache/hot_cache.py), and up to there it does not."""
    from vllm_kcache.cache.hot_cache import HotCache
    from vllm_kcache.integration.check import override_problems

    layers, rows = 2, 4
    most = (2**31 - 1) // (layers * rows)
    assert list(override_problems(most, most, 8192, 2**60, layers * rows)) == []
    (found,) = override_problems(most + 1, most + 1, 8192, 2**60, layers * rows)
    assert found.endswith(f"Lower --num-gpu-blocks-override to {most}.")
    assert list(override_problems(most + 1, most + 1, 8192, 2**60, None)) == []
    HotCache.make(1, layers, most * rows, 1024, "meta")
    with pytest.raises(ValueError, match=r"must be below 2\*\*31"):
        HotCache.make(1, layers, (most + 1) * rows, 1024, "meta")


@pytest.mark.parametrize(("k_bits", "dense"), [(16, []), (4, []), (4, [1]), (4, [0])])
def test_blocks_of_window_layers_that_do_not_fit(
    folders: Callable[[str], str], tmp_path: Path, k_bits: int, dense: list[int]
) -> None:
    """By the pages that vLLM's own planning makes beside them, layers 1 and 3 of 4 without one."""
    import torch
    from vllm import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    config = json.loads(Path(folders("gemma3"), "config.json").read_text())
    config |= {"num_hidden_layers": 4, "layer_types": config["layer_types"] * 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    blocks = 60
    arguments = {"block_size": 16, "max_num_batched_tokens": 512, "max_model_len": 512}
    vllm_config = EngineArgs(
        str(tmp_path), skip_tokenizer_init=True, kv_backend="kcache",
        num_gpu_blocks_override=blocks, **arguments,
    ).create_engine_config()  # fmt: skip
    vllm_config.cache_config.kv_cache_layout = "LBHNC"
    shape = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    token_bytes = 128 if k_bits == 16 else 36
    specs = {
        f"layers.{number}": SlidingWindowSpec(**shape, sliding_window=256)
        if number % 2 == 0
        else FullAttentionSpec(
            **shape, state_content_bytes=None if number in dense else token_bytes
        )
        for number in range(4)
    }
    (made,) = configs_of(vllm_config, [specs], 0)
    pages = made.hisparse_host_num_blocks
    assert pages != blocks
    split = 2 - len(set(dense) & {1, 3})
    needed = pages * split * 2 * 16 * (64 * 2 if k_bits == 16 else 64 + 64 + 2 + 2)
    for budget, refused in (
        (needed, []),
        (needed - 1, [f"override={blocks}: the rows of {pages}"]),
    ):
        settings = {"host_memory_gib": budget / 2**30, "k_bits": k_bits, "dense_layers": dense}
        flags = (f"--{name.replace('_', '-')}={value}" for name, value in arguments.items())
        found = problems(
            str(tmp_path), *flags, f"--num-gpu-blocks-override={blocks}",
            "--kcache-config", json.dumps(settings),
        )  # fmt: skip
        assert len(found) == len(refused)
        assert all(part in text for part, text in zip(refused, found, strict=True))


def test_blocks_that_are_states(
    folders: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Their number says nothing of the pages beside them, and that is said."""
    note = (
        "note: num_gpu_blocks_override=100000000: of this model these are states; the pages beside "
        "them, and whether the host holds their rows, are found at start and not checked here"
    )
    override = ["--num-gpu-blocks-override", "100000000"]
    for model, flags, code, noted in (
        ("jamba", override, 0, 1),
        ("jamba", [], 0, 0),
        ("jamba", [*override, "--tensor-parallel-size", "3"], 1, 1),
        ("llama", override, 1, 0),
    ):
        assert main(["check", folders(model), *flags]) == code
        assert capsys.readouterr().out.count(note) == noted, (model, flags)


def ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a check that has no answer; with --json the same as JSON."""
    capsys.readouterr()
    assert main(["check", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("vllm-kcache: error: ")
    assert len(shown.err.splitlines()) == 1
    assert not shown.out
    assert main(["check", *arguments, "--json"]) == 2
    message = json.loads(capsys.readouterr().out)["error"]
    assert message in shown.err
    return message


def test_a_model_that_is_not_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "neither a folder nor a name" in ends_with_2(["/nowhere"], capsys)
    assert "nobody/nothing: " in ends_with_2(["nobody/nothing"], capsys)
    assert "config.json: No such file" in ends_with_2([str(tmp_path)], capsys)
    assert "File name too long" in ends_with_2(["x" * 5000], capsys)
    # Half of a model in Mistral's format: vLLM says so as it does for a name the hub has not.
    (tmp_path / "params.json").write_text("{}")
    message = ends_with_2([str(tmp_path)], capsys)
    assert "Invalid repository ID or local directory specified" in message
    assert "[type=" not in message


def test_bad_settings_and_flags(
    folders: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, message in (
        (["--kcache-config", '{"coverage": 2}'], "kcache_config.coverage=2: must be"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--tensor-parallel-size", "two"], "--tensor-parallel-size/-tp: invalid int value: 'two'"),
    ):
        assert message in ends_with_2([folders("llama"), *flags], capsys)


# What may stand where a number, a name or a list belongs.
VALUES = (
    st.sampled_from((0, -1, 2**31, 10**30, 1e308, 0.5, "", "x", [], [1], {}, {"a": 1}))
    | st.sampled_from(list(map(float, ("inf", "-inf", "nan"))))
    | st.none()
    | st.booleans()
    | st.integers(1, 64)
)
KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "model_type", "architectures", "layer_types",
    "sliding_window", "quantization_config", "rope_scaling", "torch_dtype", "text_config",
    "attn_logit_softcapping", "query_pre_attn_scalar", "attention_multiplier",
)  # fmt: skip
FLAGS = (
    "--block-size", "--max-model-len", "--num-gpu-blocks-override", "--tensor-parallel-size",
    "--kcache-config", "--additional-config", "--dtype", "--max-num-seqs",
)  # fmt: skip


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=2),
    flags=st.dictionaries(st.sampled_from(FLAGS), VALUES.map(json.dumps), max_size=2),
)
def test_any_model_and_flag_has_an_answer(
    changes: dict,
    flags: dict[str, str],
    folders: Callable[[str], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = json.loads(Path(folders("llama"), "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**good, **changes}))
    capsys.readouterr()
    given = [f"{flag}={value}" for flag, value in flags.items()]
    code = main(["check", str(tmp_path), "--json", *given])
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert code == (2 if "error" in answer else bool(answer["refused"]))
    assert code != 2 or answer["error"] in shown.err.splitlines()[-1]


@pytest.mark.parametrize("data", [b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_configuration_that_cannot_be_read(
    data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes(data)
    assert str(tmp_path / "config.json") in ends_with_2([str(tmp_path)], capsys)


def test_codes_are_measured_at_start(
    folders: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders("llama")
    for chosen, noted in (('{"k_bits": 4}', True), ('{"k_bits": 16}', False), ("{}", True)):
        assert main(["check", folder, "--kcache-config", chosen]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in lines[:-1]] == ["note"] * noted
        assert all(line.startswith("note: k_bits 4: ") for line in lines[:-1])
        assert lines[-1] == f"{folder}: nothing would be refused"


@pytest.mark.parametrize(("k_bits", "token_bytes"), [(16, 2 * 64 * 2), (4, 2 * 36)])
def test_what_window_layers_take_is_noted(
    folders: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
    k_bits: int,
    token_bytes: int,
) -> None:
    """One of two layers, 2 KV heads of 64 channels in bfloat16."""
    folder = folders("gemma3")
    assert main(["check", folder, "--kcache-config", f'{{"k_bits": {k_bits}}}']) == 0
    note, last = capsys.readouterr().out.splitlines()[-2:]
    assert note == (
        "note: 1 of 2 layers have a window of 256 tokens and keep K and V in GPU memory, 0 MiB a "
        f"request; a token takes {token_bytes} bytes of the other 1 there, of stock vLLM 512"
    )
    assert last == f"{folder}: nothing would be refused"
