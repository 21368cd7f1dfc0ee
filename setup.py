# SPDX-License-Identifier: Apache-2.0
"""Build script: the CUDA extension. What setuptools can read from pyproject.toml is there."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
import build as cuda_build


class BuildCuda(build_ext):
    """Hands the one extension to csrc/build.py, which calls nvcc."""

    def build_extension(self, ext: Extension) -> None:
        cuda_build.build(Path(self.get_ext_fullpath(ext.name)))


def extensions() -> list[Extension]:
    """The extension, unless this machine cannot build or use it; then a notice says so."""
    reason = cuda_build.reason_not_to_build()
    if reason is not None and "KCACHE_CUDA_ARCHS" not in os.environ:
        print(f"vllm-kcache: the CUDA extension is not built: {reason}", file=sys.stderr)
        return []
    return [Extension("vllm_kcache._C", sources=[], py_limited_api=True)]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildCuda},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
