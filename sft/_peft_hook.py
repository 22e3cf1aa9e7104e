"""Register our methods with PEFT when PEFT is imported, so that `import sft` need not import it."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType


def install() -> None:
    """Register now if PEFT is loaded, otherwise as soon as it has been."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def _register() -> None:
    importlib.import_module("sft.engines.partitioned")  # so that adapters can read ZeRO-3's weights
    # a module of ours that imports PEFT is half imported now; then our configurations register
    if not any(_half_imported(name) for name in tuple(sys.modules)):
        importlib.import_module("sft.adapters.registry").register_all()


def _half_imported(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return name.startswith("sft.adapters.") and getattr(spec, "_initializing", False)


class _PeftFinder(importlib.abc.MetaPathFinder):
    """Finds PEFT as usual and lets registration follow its import; steps aside afterwards.

    Others look PEFT up without importing it, so the finder stays until the import happens.
    """

    _asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "peft" or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(self, spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, finder: _PeftFinder, loader: importlib.abc.Loader) -> None:
        self._finder = finder
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        # what PEFT and others see afterwards is its own loader
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()
