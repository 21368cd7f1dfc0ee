# SPDX-License-Identifier: Apache-2.0
import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from vllm_kcache import ops
from vllm_kcache.ops import fetch, write
from vllm_kcache.ops.dispatch import STEMS, implementation
from vllm_kcache.types import Selected


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


def bound(op, call: list) -> dict:
    """Arguments of a recorded call, by the names that the op gives them."""
    return dict(inspect.signature(op).bind(*call).arguments)


def test_the_hot_cache_is_told_the_layer(monkeypatch):
    """A write that named another layer would leave stale V in the slots of its own."""
    calls = {}
    recorder = SimpleNamespace(
        write_kv=lambda *arguments: calls.update(write=arguments),
        fetch_blocks=lambda *arguments: calls.update(fetch=arguments),
    )
    for module in (write, fetch):
        monkeypatch.setattr(module, "implementation", lambda stem, device: recorder)
    pool, cache = torch.zeros(1, 1, 16, 64), object()
    token, slots = torch.zeros(1, 1, 64), torch.zeros(1, dtype=torch.int64)
    ops.write_kv(token, token, slots, pool, pool, cache, layer=3)
    rows = torch.zeros(1, 1, dtype=torch.int32)
    selected = Selected(rows[..., None], rows, torch.ones(1, 1))
    ops.fetch_blocks(selected, rows, pool, 8, cache, layer=3)
    for op, stem in ((ops.write_kv, "write"), (ops.fetch_blocks, "fetch")):
        arguments = bound(op, calls[stem])
        assert arguments["hot_cache"] is cache
        assert arguments["layer"] == 3
