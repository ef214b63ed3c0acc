"""Something done around the first import of one module of another package, and nothing before."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

Execute = Callable[[importlib.abc.Loader, ModuleType], None]
"""Executes a module by its own loader, ``loader.exec_module(module)``, and does more before or behind."""


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, execute: Execute) -> None:
        self.loader = loader
        self.execute = execute

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.execute(self.loader, module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module where it lies, once, and nothing else."""

    def __init__(self, name: str, execute: Execute) -> None:
        self.name = name
        self.execute = execute

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.execute)
        return spec


def import_with(name: str, execute: Execute) -> None:
    """Have the module ``name`` executed by ``execute`` when it is imported, unless it already is.

    Calling it again for the same module changes nothing.
    """
    waiting = any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path)
    if name not in sys.modules and not waiting:
        sys.meta_path.insert(0, _Finder(name, execute))
