# SPDX-License-Identifier: Apache-2.0
"""The limits of a process: what they leave is found, and named where it is too little."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from vllm_kcache.cache.host_memory import HostMemory, host_memory, too_little_for_one_request

GIB = 2**30


def test_without_a_limit_there_is_none() -> None:
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        pytest.skip("this shell has a limit")
    assert host_memory().process_bytes is None


LIMITED = """
import resource
from vllm_kcache.cache.host_memory import *
resource.setrlimit(resource.{kind}, (64 * 2**30, resource.RLIM_INFINITY))
print(host_memory().process_bytes)
resource.setrlimit(resource.{kind}, (2**20, resource.RLIM_INFINITY))
print(host_memory().process_bytes)
try:
    check_host_memory(2**30)
except HostMemoryError as error:
    print(error)
print(too_little_for_one_request("auto", 100, 2**30))
"""


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_limit_of_the_process_is_found_and_named(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(kind=kind)],
        capture_output=True,
        text=True,
        check=True,
    )
    wide, narrow, check, request = done.stdout.splitlines()
    # The process itself has taken some of it.
    assert 32 * GIB < int(wide) < 64 * GIB
    assert int(narrow) == 0
    for text in (check, request):
        assert "but the address-space limit of this process leaves 0.00 GiB: raise that" in text
        assert "(ulimit -v unlimited, ulimit -d unlimited)" in text


@pytest.mark.parametrize(
    ("memory", "named"),
    [
        (HostMemory(3 * GIB), "this machine has 3.00 GiB available (MemAvailable)"),
        (HostMemory(3 * GIB, 5 * GIB, 4 * GIB), "this machine has 3.00 GiB available"),
        (HostMemory(3 * GIB, 2 * GIB, 4 * GIB), "the memory limit of this control group leaves 2"),
        (HostMemory(3 * GIB, 2 * GIB, GIB), "the address-space limit of this process leaves 1.00"),
        (HostMemory(3 * GIB, None, GIB), "the address-space limit of this process leaves 1.00"),
    ],
)
def test_the_tightest_limit_is_named(memory: HostMemory, named: str) -> None:
    assert memory.limit()[0].startswith(named)
    assert memory.available_bytes == GIB * int(
        float(memory.limit()[0].split(" GiB")[0].split()[-1])
    )


def test_a_number_names_a_number() -> None:
    assert too_little_for_one_request(0.02, 2048, int(0.3 * GIB)) == (
        "kcache_config.host_memory_gib=0.02: one request of max_model_len=2048 needs 0.3 GiB of "
        "host memory; set it to that at least, or lower --max-model-len"
    )
