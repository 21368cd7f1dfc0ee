# SPDX-License-Identifier: Apache-2.0
"""`vllm-kcache check`: everything that would be refused at start, at once, without starting."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from vllm_kcache.cli import main
from vllm_kcache.config import KCacheConfigError

pytestmark = pytest.mark.usefixtures("quick_vllm")

PREFIX = "--kv-backend kcache does not support "


def problems(folder: str, *flags: str) -> list[str]:
    from vllm_kcache.integration.check import problems as found

    return found(folder, list(flags))


def test_nothing_to_refuse(
    folders: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders("llama")
    assert main(["check", folder, "--max-model-len", "256"]) == 0
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
        "sliding-window attention (layer_types with 'sliding_attention')",
        "attn_logit_softcapping=50.0",
        "block_size=8",
        "kcache_config.dense_layers=2",
    ]
    assert found[-1].startswith("the host V pool needs 1000000.00 GiB, but ")
    assert found[-1].endswith("or set kcache_config.host_memory_gib lower")


def test_exit_code_and_lines(
    folders: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders("bloom")
    assert main(["check", folder]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"refused: {PREFIX}ALiBi (BloomForCausalLM):")
    assert lines[1:] == [f"{folder}: 1 refusal"]


def test_json(folders: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", folders("llama"), "--json", "--kv-cache-dtype", "fp8"]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert found.startswith(PREFIX + "kv_cache_dtype=fp8:")


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


def test_bad_settings(folders: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KCacheConfigError):
        problems(folders("llama"), "--kcache-config", '{"coverage": 2}')
    assert main(["check", folders("llama"), "--kcache-config", '{"coverage": 2}']) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("vllm-kcache: error: kcache_config.coverage=2: must be greater than 0")


def test_unknown_flag(folders: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", folders("llama"), "--no-such-flag"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --no-such-flag" in capsys.readouterr().err
