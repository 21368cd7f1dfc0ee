# SPDX-License-Identifier: Apache-2.0
"""Half a minute of benchmarks/engine/mixed_load.py; a real run takes 15."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.engine.mixed_load import TIE_NATS, compare
from tests.integration.engines import MODEL

ROOT = Path(__file__).resolve().parents[2]


def test_what_counts_as_a_difference() -> None:
    """Of three tokens the second has a rival at half the tie, and another at twice."""
    top = [
        {"5": -0.1, "6": -3.0},
        {"7": -0.5, "8": -0.5 - TIE_NATS / 2, "9": -0.5 - 2 * TIE_NATS},
        {"10": -0.2},
    ]
    expected = {"tokens": [[5, 7, 10]], "top": [top]}
    verdicts = {
        (): "equal",
        (5, 7): "equal",
        (5, 7, 10): "equal",
        (5, 8, 3): "tie",
        (5, 9): "wrong",
        (5, 4): "wrong",
        (6,): "wrong",
    }
    for delivered, verdict in verdicts.items():
        assert compare(expected, list(delivered))[0] == verdict, delivered
    with pytest.raises(ValueError, match="4 tokens; at most 3"):
        compare(expected, [5, 7, 10, 1])


@pytest.mark.gpu
@pytest.mark.slow
def test_every_token_is_stocks(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.engine.mixed_load", "--minutes", "0.5",
         "--model", MODEL, "--results", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
