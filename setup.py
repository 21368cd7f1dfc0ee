# SPDX-License-Identifier: Apache-2.0
"""Build script; everything that setuptools can read from pyproject.toml is there."""

from setuptools import setup

setup()
