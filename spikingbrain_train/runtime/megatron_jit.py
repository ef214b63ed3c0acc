"""Spares processes on machines without a GPU the import of torch's compiler, which they never use.

megatron-core wraps its small fused functions in torch.compile as it is imported. With megatron-core 0.16 and
torch 2.13 nothing else imports Inductor, which takes two of the five seconds of processor time of a start; on
CPU the plain functions are put back before anything runs (``no_compiled_fusions`` in megatron_cpu.py).
megatron-core 0.19 compiles one function itself, and torch 2.6 imports TorchDynamo: there a start gains a
second or nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

from spikingbrain_train.planning.launch import has_gpu_device
from spikingbrain_train.runtime.patch import ON_CPU, Moment, Patch

_MODULE = "megatron.core.jit"


class _WithoutCompiler(importlib.abc.Loader):
    """Another loader's megatron.core.jit, which wraps nothing where there is no GPU."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if not has_gpu_device():
            module.disable_jit_fuser()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds megatron.core.jit where it lies, once, and nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _WithoutCompiler(spec.loader)
        return spec


def leave_fusions_uncompiled() -> None:
    """Have megatron-core wrap nothing in torch.compile when it is imported on a machine without a GPU."""
    if _MODULE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


PATCHES = (
    Patch(
        name="no_import_of_the_compiler",
        changes="megatron.core.jit.jit_fuser leaves functions as they are, on machines without a GPU",
        reason="each start would import TorchDynamo and Inductor, in up to two seconds, and compile nothing",
        apply=leave_fusions_uncompiled,
        platforms=ON_CPU,
        moment=Moment.importing,
    ),
)
