# SPDX-License-Identifier: Apache-2.0
"""Who limits the number of blocks. That it doubles is shown in test_gate.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.engines import GATE, run_engine

pytestmark = pytest.mark.slow

BATCH = [{"prompts": ["Hello"], "sampling": {"max_tokens": 2}}]


def test_host_memory_limits_the_blocks(tmp_path: Path) -> None:
    """A quarter GiB of V: 32 tokens x 3 heads x 64 values x 4 bytes x 30 layers a block."""
    split = run_engine(tmp_path, BATCH, kcache={**GATE, "host_memory_gib": 0.25})
    assert split["num_blocks"] == 2**28 // (32 * 3 * 64 * 4 * 30)


def test_override_beyond_the_host_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="num_gpu_blocks_override=2000: V of that many blocks"):
        run_engine(
            tmp_path,
            BATCH,
            kcache={**GATE, "host_memory_gib": 0.25},
            num_gpu_blocks_override=2000,
        )
