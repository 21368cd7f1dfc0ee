# SPDX-License-Identifier: Apache-2.0
"""Who limits the number of blocks. That it doubles is shown in test_gate.py."""

from __future__ import annotations

import pytest

from tests.integration.engines import GATE, Runs, run_engines, spec_of
from tests.integration.tiny_models import CONFIGS, model_folder

pytestmark = pytest.mark.slow

# Of CONFIGS["llama"], in bytes: tokens x KV heads x values x float32 x layers.
V_BLOCK = 32 * 2 * 64 * 4 * 2
HOST_GIB = 2**-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("blocks")
    engine = {
        "model": model_folder(folder / "model", CONFIGS["llama"]),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 512,
    }
    batch = [{"prompts": [[3, 4, 5]], "sampling": {"max_tokens": 2, "detokenize": False}}]
    limited = {**GATE, "host_memory_gib": HOST_GIB}
    specs = {
        "limited": spec_of(batch, limited, **engine),
        "overridden": spec_of(batch, limited, **engine, num_gpu_blocks_override=2000),
    }
    return run_engines(folder, specs)


def test_host_memory_limits_the_blocks(runs: Runs) -> None:
    assert runs["limited"]["num_blocks"] == int(HOST_GIB * 2**30) // V_BLOCK == 1024


def test_override_beyond_the_host_is_refused(runs: Runs) -> None:
    assert runs.outcomes["overridden"]["code"] == 1
    message = "num_gpu_blocks_override=2000: the rows of that many blocks"
    assert message in runs.error_of("overridden")
