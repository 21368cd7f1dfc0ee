# SPDX-License-Identifier: Apache-2.0
"""benchmarks/engine/mixed_load.py: what it says when, of an engine that only repeats.

The comparison of tokens: tests/gpu/test_mixed_load.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams  # noqa: F401  (its import is no part of a second of load)

from benchmarks.engine import mixed_load
from benchmarks.rows import load
from vllm_kcache.integration import counters

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["one", "two", "three"]


class Repeater:
    """Stands for AsyncLLM: answers each prompt with the numbers from its own on.

    Args:
        wrong: Whether to answer another number in the third place, now and then.
        stale: Resident copies to report.
        ends: What `shutdown` does.
    """

    def __init__(self, wrong: bool = False, stale: int = 0, ends: Any = None) -> None:
        self.wrong, self.stale, self.ends = wrong, stale, ends
        self.asked = 0
        self.row_at_shutdown: list[Any] = []

    async def generate(self, prompt: str, sampling: Any, name: str) -> AsyncIterator[Any]:
        """One token at a time."""
        self.asked += 1
        number = PROMPTS.index(prompt)
        for at in range(sampling.max_tokens):
            await asyncio.sleep(0.001)
            token = number + at + (self.wrong and at == 2 and self.asked % 7 == 0)
            outputs = [
                SimpleNamespace(index=index, token_ids=[token]) for index in range(sampling.n)
            ]
            yield SimpleNamespace(outputs=outputs, finished=at + 1 == sampling.max_tokens)

    async def collective_rpc(self, method: str) -> list[Any]:
        """What the worker would say."""
        if method == "kcache_counters":
            figures = dict.fromkeys(counters.SCALARS, 0.0) | {
                "selected_blocks": 7.0, "hot_cache_hits": 4.0, "hot_cache_misses": 3.0,
            }  # fmt: skip
            return [[figures[name] for name in counters.SCALARS]]
        return [
            {
                "has_hot_cache": True, "resident": 5, "stale": self.stale,
                "pool_pages": 36, "k_pages": 36,
            }
        ]  # fmt: skip

    def shutdown(self, timeout: float) -> None:
        """End, or fail to."""
        if self.ends is not None:
            self.ends()


def replace_engine(patch: Any, engine: Repeater, figures: dict[str, float] | None = None) -> None:
    """Have `mixed_load.main` load this engine."""
    counted = {"vllm:num_preemptions": 3.0, **(figures or {})}
    rows = [
        {
            "tokens": [[number + at for at in range(24)]],
            "top": [[{str(number + at): -0.1} for at in range(24)]],
        }
        for number in range(len(PROMPTS))
    ]
    patch(mixed_load, "start_engine", lambda options, sizes: engine)
    patch(mixed_load, "prompt_set", lambda sizes: PROMPTS)
    patch(mixed_load, "expected_of", lambda options, sizes, report: rows)
    patch(mixed_load, "metric", lambda name: counted.get(name, 0.0))
    patch(mixed_load, "origin", lambda *packages: {"commit": "0000000"})


def run(
    monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path, engine: Repeater, **figures: float
) -> tuple[int, str, list[Any]]:
    """The exit code, the output and the rows of a second of load."""
    replace_engine(monkeypatch.setattr, engine, figures)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    code = mixed_load.main(["--minutes", "0.02", "--results", str(tmp_path)])
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)
    return code, capfd.readouterr().out, load(tmp_path / "mixed_load.jsonl")


def test_the_row_is_there_before_the_engine_ends(
    monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path
) -> None:
    engine = Repeater()
    engine.ends = lambda: engine.row_at_shutdown.extend(load(tmp_path / "mixed_load.jsonl"))
    code, output, rows = run(monkeypatch, capfd, tmp_path, engine)
    assert code == 0, output
    (row,) = rows
    assert engine.row_at_shutdown == [row]
    assert row["passed"] is True
    assert row["counts"]["equal"] > 50
    assert row["held_in_the_end"] == 0
    places = [
        output.index(text)
        for text in (
            "0.02 minutes of load; the verdict after", "waiting for the engine's start",
            "waiting for 0.02 minutes of load", "ok: completions equal to stock's",
            "waiting for all blocks to be free", "ok: blocks or requests that are still held: 0",
            "ok: resident copies that are stale: 0 of 5", "passed; the row is in",
            "waiting for the engine's end", "ok: the engine ended well",
        )
    ]  # fmt: skip
    assert places == sorted(places)


def test_what_the_shutdown_finds_contradicts_the_row(
    monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path
) -> None:
    def fail() -> None:
        raise RuntimeError("worker gone")

    code, output, rows = run(monkeypatch, capfd, tmp_path, Repeater(ends=fail))
    assert code == 1
    assert [row["passed"] for row in rows] == [True, False]
    assert "worker gone" in rows[1]["engine_ended"]
    assert "WRONG: the engine ended well: shutdown raised" in output
    assert "the row before it does not stand" in output


@pytest.mark.parametrize(
    ("engine", "figures", "said"),
    [
        (Repeater(wrong=True), {}, "WRONG: completions that are not: "),
        (Repeater(stale=2), {}, "WRONG: resident copies that are stale: 2 of 5"),
        (Repeater(), {"vllm:num_preemptions": 0.0}, "WRONG: preemptions (fewer --bl"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path, engine: Repeater,
    figures: dict[str, float], said: str,
) -> None:  # fmt: skip
    code, output, (row,) = run(monkeypatch, capfd, tmp_path, engine, **figures)
    assert code == 1
    assert row["passed"] is False
    assert said in output
    assert "WRONG; the row is in" in output
    if engine.wrong:
        # At once, not with the checks.
        assert output.index("WRONG: {'request'") < output.index("ok: requests cancelled")
        assert row["wrong"][0]["at"] == 2


class LateEngine(Repeater):
    """Answers three tokens, then none until it is told to stop, and then all the others."""

    async def generate(self, prompt: str, sampling: Any, name: str) -> AsyncIterator[Any]:
        """As wait_for of Python 3.11 does where a token and a cancellation come together."""
        self.sent = 0
        async for output in super().generate(prompt, sampling, name):
            if self.sent == 3:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(60)
            self.sent += 1
            yield output


@pytest.mark.parametrize("wrong", [False, True])
def test_what_comes_before_a_cancellation_is_compared(
    wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a request leaves, though a token came with its cancellation."""
    engine = LateEngine(wrong=wrong)
    engine.asked = 6  # Repeater's seventh answer may be wrong, in its third place.
    replace_engine(monkeypatch.setattr, engine)
    rows, report = mixed_load.expected_of(None, None, None), mixed_load.Report()  # type: ignore[arg-type]
    load = mixed_load.Load(engine, PROMPTS, rows, mixed_load.ON_CPU, 0, report)
    # One completion, that leaves after 0.25 seconds.
    drawn = iter((0.9, 0.01, 0.5))
    load.random = SimpleNamespace(  # type: ignore[assignment]
        random=lambda: next(drawn), randrange=lambda most: 0, randint=lambda least, most: 24
    )
    asyncio.run(load.request())
    assert engine.sent == 4
    assert load.tally.counts == {
        "cancelled at a random time": 1, "wrong" if wrong else "equal": 1
    }  # fmt: skip
    assert load.tally.tokens == 4
    assert [(what["at"], what["ours"]) for what in load.tally.wrong] == [(2, 3)] * wrong


def test_a_request_that_delivers_nothing_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_load, "SILENT_SECONDS", 0.25)
    engine = SimpleNamespace(generate=silent)
    load = mixed_load.Load(engine, PROMPTS, [], mixed_load.ON_CPU, 0, mixed_load.Report())
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(load.stream("load-1", 0, 24, 1, None))


async def silent(prompt: str, sampling: Any, name: str) -> AsyncIterator[Any]:
    """An answer that never comes."""
    await asyncio.sleep(60)
    yield


def test_held_blocks_are_wrong(monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(mixed_load, "DRAIN_SECONDS", 0.5)
    code, output, (row,) = run(
        monkeypatch, capfd, tmp_path, Repeater(), **{"vllm:kv_cache_usage_perc": 0.25}
    )
    assert (code, row["held_in_the_end"]) == (1, 0.25)
    assert "WRONG: blocks or requests that are still held: 0.25" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_without_a_verdict(tmp_path: Path, number: signal.Signals) -> None:
    """As timeout(1) ends a run: in the middle of its load."""
    program = (
        "import sys\n"
        "from benchmarks.engine import mixed_load\n"
        "from tests.benchmarks.test_mixed_load import Repeater, replace_engine\n"
        "replace_engine(setattr, Repeater())\n"
        "mixed_load.PROGRESS_SECONDS = 0.5\n"
        f"sys.exit(mixed_load.main(['--minutes', '5', '--results', {str(tmp_path)!r}]))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        said = ""
        while "s of load left" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        process.send_signal(number)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert f"{number.name} while waiting for 5.0 minutes of load" in output
    assert "'completed': " in output
    assert "stopped early: not a verdict" in output
    assert "passed" not in output
    assert not (tmp_path / "mixed_load.jsonl").exists()


def test_kept_texts_are_those_of_the_same_engine(
    monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path
) -> None:
    """A second run takes stock's texts from the file; one of other prompts makes them anew."""
    from tests.integration import engines

    made: list[Any] = []

    def run_engine(folder: Path, batches: list[Any], **engine: Any) -> dict[str, Any]:
        made.append(batches)
        return {"batches": [[f"row {len(made)}"]]}

    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    monkeypatch.setattr(engines, "run_engine", run_engine)
    monkeypatch.setattr(mixed_load, "device", lambda: "GPU")
    prompts = ["a", "b"]
    monkeypatch.setattr(mixed_load, "prompt_set", lambda sizes: list(prompts))
    kept = tmp_path / "kept.json"
    options = SimpleNamespace(expected=kept, model=str(tmp_path / "model"))

    def expected() -> list[Any]:
        return mixed_load.expected_of(options, mixed_load.ON_CPU, mixed_load.Report())

    assert expected() == expected() == ["row 1"]
    assert f"stock's texts are those of {kept}" in capfd.readouterr().out
    prompts.append("c")
    assert expected() == ["row 2"]
    assert "is not of this model" in capfd.readouterr().out
    monkeypatch.setattr(mixed_load, "device", lambda: "another GPU")
    assert expected() == expected() == ["row 3"]
    (tmp_path / "model/config.json").write_text('{"changed": 1}')
    assert expected() == ["row 4"]
    assert json.loads(kept.read_text())["rows"] == ["row 4"]
