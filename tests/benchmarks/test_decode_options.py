# SPDX-License-Identifier: Apache-2.0
"""The command line of benchmarks/decode.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.decode import parse


def test_preset_of_the_paper() -> None:
    options = parse(["--preset", "paper"])
    assert Path(options.model, "config.json").is_file()
    assert (options.requests, options.max_requests, options.top_n) == ([8], 8, 16)
    assert options.mode == "fixed"
    assert max(options.context) == 32768
    assert options.engines == ["stock", "kcache"]


def test_what_is_given_wins_over_the_preset() -> None:
    options = parse(["elsewhere", "--preset", "paper", "--context", "8192", "--top-n", "32"])
    assert (options.model, options.context, options.top_n) == ("elsewhere", [8192], 32)
    assert options.requests == [8]


def test_without_a_preset() -> None:
    options = parse(["model", "--mode", "replay", "--mass-threshold", "0.002"])
    assert (options.context, options.requests) == ([16384], [0, 1])
    assert (options.coverage, options.mass_threshold, options.top_n) == (None, 0.002, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a model"),
        (["model", "--output", "8"], "--output 8: must be above 8"),
        (["--preset", "papers"], "invalid choice"),
    ],
)
def test_what_makes_no_sense(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err
