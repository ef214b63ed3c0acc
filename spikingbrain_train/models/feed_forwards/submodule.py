"""What stands in a spec for a module: a ModuleSpec for megatron-core 0.16, a builder for 0.19."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from spikingbrain_train.runtime.megatron_versions import layers_are_built_by_callables

BUILDERS_INSTEAD_OF_SPECS = layers_are_built_by_callables()

Submodule: TypeAlias = ModuleSpec | Callable[..., Any]


def submodule(module: type, submodules: Any = None) -> Submodule:
    """``module`` with its submodules, as a part of another module's submodules."""
    if BUILDERS_INSTEAD_OF_SPECS:
        return partial(module, submodules=submodules) if submodules is not None else module
    return ModuleSpec(module=module, submodules=submodules)


def mlp(module: type[MLP], submodules: MLPSubmodules) -> Submodule:
    """An MLP as ``mlp`` of a layer."""
    if BUILDERS_INSTEAD_OF_SPECS:
        return partial(module.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=module, submodules=submodules)
