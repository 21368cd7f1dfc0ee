# SPDX-License-Identifier: Apache-2.0
"""Lets several processes share a file's tests: GPU_TEST_SHARD=2/3 runs the second third.

Tests of one shape stay together, so that a kernel is compiled for it in one process only.
"""

from __future__ import annotations

import os
import re
import zlib

import pytest

SHAPE = re.compile(r"len[\d_a-z]+-kv\d+x\d+-D\d+-S\d+-T\d+")


def shard_of(nodeid: str, shards: int) -> int:
    """Which of so many processes runs a test, from 0."""
    shape = SHAPE.search(nodeid)
    return zlib.crc32((shape.group() if shape else nodeid).encode()) % shards


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    given = os.environ.get("GPU_TEST_SHARD")
    if given is None:
        return
    try:
        number, shards = map(int, given.split("/"))
    except ValueError:
        raise pytest.UsageError(f"GPU_TEST_SHARD={given}: must be like 2/3") from None
    if not 1 <= number <= shards:
        raise pytest.UsageError(f"GPU_TEST_SHARD={given}: must be from 1/{shards} on")
    others = [item for item in items if shard_of(item.nodeid, shards) != number - 1]
    config.hook.pytest_deselected(items=others)
    kept = set(items) - set(others)
    items[:] = [item for item in items if item in kept]
