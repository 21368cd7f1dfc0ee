# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest
import torch

from vllm_kcache.ops.dispatch import STEMS, implementation


@pytest.mark.parametrize("stem", STEMS)
def test_the_cpu_runs_the_reference(stem):
    module = implementation(stem, torch.device("cpu"))
    assert module.__name__ == f"vllm_kcache.reference.{stem}"


def test_unknown_stem():
    with pytest.raises(ValueError, match="stem='sort': must be one of write, score, select"):
        implementation("sort", torch.device("cpu"))


def test_device_without_an_implementation():
    with pytest.raises(ValueError, match="device=meta: must be one of cpu, cuda"):
        implementation("score", torch.device("meta"))


def test_a_machine_without_a_gpu_imports_neither_kernels_nor_vllm():
    program = (
        "import sys, torch\n"
        "from vllm_kcache import ops\n"
        "from vllm_kcache.ops.dispatch import STEMS, implementation\n"
        "[implementation(stem, torch.device('cpu')) for stem in STEMS]\n"
        "print([name for name in sys.modules if name.startswith('vllm_kcache.kernels')\n"
        "       or name == 'vllm' or name.startswith('vllm.')])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
