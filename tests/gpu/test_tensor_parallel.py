# SPDX-License-Identifier: Apache-2.0
"""Tensor parallel on two GPUs: what tests/integration/test_tensor_parallel.py shows on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.comparing import GRAPHS
from tests.integration.test_tensor_parallel import check_two_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def test_text_equals_stock_on_two_gpus(tmp_path: Path) -> None:
    graphs = {name: value for name, value in GRAPHS.items() if name != "block_size"}
    check_two_ranks(tmp_path, GRAPHS["block_size"], dtype="float32", **graphs)
