# SPDX-License-Identifier: Apache-2.0
"""Be there before vLLM parses its first argument.

vLLM loads general plugins inside `EngineArgs.__post_init__`: too late for the first
`LLM(kv_backend=...)`, and `vllm bench latency` builds its parser before any plugin is loaded. A
platform plugin, however, is asked while vLLM is being imported. Ours names no platform; it only
asks Python to call `register` as soon as `vllm.engine.arg_utils` has been imported. That module may
be the very one whose imports made vLLM ask: then it is half imported, and its spec tells us when it
is whole. This module imports nothing of vLLM.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

from vllm_kcache.integration import vllm_cpu

_TARGET = "vllm.engine.arg_utils"


class _RegisterAfter(importlib.abc.Loader):
    """Loads the module as its own loader would, then registers the plugin."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds only the target, once."""

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


class _RegisterWhenImported(importlib.machinery.ModuleSpec):
    """Class given to the spec of a module that is being imported, until it is imported.

    Python clears `_initializing` when the module's code has run.
    """

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = importlib.machinery.ModuleSpec  # type: ignore[assignment]
            # A module whose code failed has been taken out again.
            if self.name in sys.modules:
                _register()


def _register() -> None:
    from vllm_kcache.integration.plugin import register

    register()


def install() -> None:
    """Register the plugin now if vLLM's arguments are loaded, or as soon as they are."""
    module = sys.modules.get(_TARGET)
    if module is not None:
        spec = module.__spec__
        if getattr(spec, "_initializing", False):
            spec.__class__ = _RegisterWhenImported  # type: ignore[assignment,union-attr]
        else:
            _register()
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def no_platform() -> None:
    """Entry point `vllm.platform_plugins`: names no platform, installs the hook."""
    vllm_cpu.mend()
    install()
