# SPDX-License-Identifier: Apache-2.0
"""The real commands refuse what is wrong: exit code not 0, one message, no traceback."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serve.server import MODEL, VLLM, environment

pytestmark = pytest.mark.slow

SERVE = ("serve", str(MODEL))
BENCH_LATENCY = ("bench", "latency", "--model", str(MODEL))
BENCH_THROUGHPUT = ("bench", "throughput", "--model", str(MODEL))
BENCH_STARTUP = ("bench", "startup", "--model", str(MODEL))
KCACHE = ("--kv-backend", "kcache")

REFUSED = {
    "value out of range": (
        (*SERVE, *KCACHE, "--kcache-config", '{"coverage": 2}'),
        "kcache_config.coverage=2: must be a number from 1e-9 to 1",
    ),
    "unknown key": (
        (*SERVE, *KCACHE, "--kcache-config", '{"covrage": 0.9}'),
        "kcache_config.covrage=0.9: unknown key (did you mean 'coverage'?)",
    ),
    "not JSON": (
        (*SERVE, *KCACHE, "--kcache-config", "coverage=0.9"),
        "kcache_config='coverage=0.9': not valid JSON",
    ),
    "dotted flag": (
        (*SERVE, *KCACHE, "--kcache-config.recent_tokens", "0"),
        "kcache_config.recent_tokens=0: must be an integer from 1 to 16777216",
    ),
    "settings without the backend": (
        (*SERVE, "--kcache-config", '{"coverage": 0.9}'),
        "add --kv-backend kcache",
    ),
    "a setting that does not fit the model": (
        (*SERVE, *KCACHE, "--kcache-config", '{"dense_layers": 30}'),
        "kcache_config.dense_layers=30: must be at most 29, since the model has 30 layers",
    ),
    "an engine feature": (
        (*SERVE, *KCACHE, "--kv-offloading-size", "1"),
        "--kv-backend kcache does not support kv_offloading_size=1",
    ),
    "unknown backend": ((*SERVE, "--kv-backend", "kcahe"), "invalid choice: 'kcahe'"),
    "bench latency": (
        (*BENCH_LATENCY, *KCACHE, "--kcache-config", '{"tail": "cut"}'),
        "kcache_config.tail='cut': must be",
    ),
    "bench throughput": (
        (*BENCH_THROUGHPUT, *KCACHE, "--kcache-config", '{"tail": "cut"}'),
        "kcache_config.tail='cut': must be",
    ),
    "bench startup": (
        (*BENCH_STARTUP, *KCACHE, "--kcache-config", '{"tail": "cut"}'),
        "kcache_config.tail='cut': must be",
    ),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, subprocess.CompletedProcess[str]]:
    """Every command of REFUSED, run to its end. Two at a time: a start is one busy core."""

    def run(case: str) -> subprocess.CompletedProcess[str]:
        arguments, _ = REFUSED[case]
        return subprocess.run(
            [*VLLM, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
            timeout=180,
            check=False,
        )

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(REFUSED, pool.map(run, REFUSED), strict=True))


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_start(case: str, outcomes: dict[str, subprocess.CompletedProcess[str]]) -> None:
    _, message = REFUSED[case]
    finished = outcomes[case]
    assert finished.returncode > 0, finished.stdout
    assert finished.stdout.count(message) == 1, finished.stdout
    assert "Traceback" not in finished.stdout, finished.stdout
