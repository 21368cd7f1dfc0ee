# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests that make vLLM configurations in this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from tests.integration.tiny_models import CONFIGS, model_folder


@pytest.fixture(scope="module")
def quick_vllm() -> Iterator[None]:
    """vLLM looks at each model class in a process of its own, to keep CUDA out of this one.

    Here it may look in this process: the same code, without the seconds of a start.
    """
    # The CPU platform leaves variables behind that must not reach servers of other tests.
    before = dict(os.environ)
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    with pytest.MonkeyPatch.context() as patch:
        from vllm.model_executor.models import registry

        patch.setattr(registry, "_run_in_subprocess", lambda function: function())
        yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Path of a model of tiny_models.py, by name."""
    parent = tmp_path_factory.mktemp("models")
    return lambda name: model_folder(parent / name.replace(" ", "_"), CONFIGS[name])
