# SPDX-License-Identifier: Apache-2.0
"""Two GPUs, by heads, by layers, by requests: what tests/integration/test_tensor_parallel.py and
tests/serve/test_data_parallel.py show on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.comparing import GRAPHS
from tests.gpu.test_serve import SHARE
from tests.integration.test_tensor_parallel import RANKS, check_ranks
from tests.serve import test_data_parallel as data_parallel
from tests.serve.server import serving

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("split", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_text_equals_stock_on_two_gpus(tmp_path: Path, split: str) -> None:
    graphs = {name: value for name, value in GRAPHS.items() if name != "block_size"}
    check_ranks(tmp_path, GRAPHS["block_size"], dtype="float32", **{split: RANKS}, **graphs)


def test_two_engines_behind_one_port(tmp_path: Path) -> None:
    with serving(tmp_path, *data_parallel.FLAGS, SHARE) as server:
        data_parallel.check_both_engines_answer(server)
        data_parallel.check_host_memory_is_shared(server)
