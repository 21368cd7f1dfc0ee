# SPDX-License-Identifier: Apache-2.0
"""Build script: the CUDA extension. What setuptools can read from pyproject.toml is there."""

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


EXTENSION = Extension("vllm_kcache._C", sources=[], py_limited_api=True)

setup(
    ext_modules=[EXTENSION] if cuda_build.wanted() else [],
    # The build backend asks for these before it builds: pyproject.toml cannot name requirements of
    # some machines only, and a machine without a GPU should not download a CUDA compiler.
    setup_requires=cuda_build.requirements(),
    cmdclass={"build_ext": BuildCuda},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
