"""Spares processes on machines without a GPU the import of torch's compiler, which they never use.

megatron-core wraps its small fused functions in torch.compile as it is imported. With megatron-core 0.16 and
torch 2.13 nothing else imports Inductor, which takes two of the five seconds of processor time of a start; on
CPU the plain functions are put back before anything runs (``no_compiled_fusions`` in megatron_cpu.py).
megatron-core 0.19 compiles one function itself, and torch 2.6 imports TorchDynamo: there a start gains a
second or nothing.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from spikingbrain_train.planning.launch import has_gpu_device
from spikingbrain_train.runtime.import_hook import import_with
from spikingbrain_train.runtime.patch import ON_CPU, Moment, Patch

if TYPE_CHECKING:
    from importlib.abc import Loader


def _without_compiler(loader: Loader, module: ModuleType) -> None:
    loader.exec_module(module)
    if not has_gpu_device():
        module.disable_jit_fuser()


def leave_fusions_uncompiled() -> None:
    """Have megatron-core wrap nothing in torch.compile when it is imported on a machine without a GPU."""
    import_with("megatron.core.jit", _without_compiler)


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
