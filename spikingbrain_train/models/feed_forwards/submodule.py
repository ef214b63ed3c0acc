"""What stands in a spec for a module: a ModuleSpec for megatron-core 0.16, a builder for 0.19."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, partialmethod
from typing import Any, TypeAlias

from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.transformer import TransformerConfig
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


def mlp(module: type[MLP], submodules: MLPSubmodules, **arguments: Any) -> Submodule:
    """An MLP as ``mlp`` of a layer.

    Args:
        module: megatron-core's, or a class that is made from it.
        submodules: its projections.
        arguments: what ``module`` takes beside what megatron-core gives it.
    """
    if arguments:
        module = type(module.__name__, (module,), {"__init__": partialmethod(module.__init__, **arguments)})
    if BUILDERS_INSTEAD_OF_SPECS:
        return partial(module.as_mlp_submodule, submodules=submodules)
    if module is MLP:
        return ModuleSpec(module=module, submodules=submodules)
    return _with_group(module, submodules)


def _with_group(module: type[MLP], submodules: MLPSubmodules) -> type[MLP]:
    """``module`` as megatron-core 0.16 can make it from a config alone.

    That release gives the tensor-parallel group to classes of its own only.
    """

    def __init__(self: MLP, config: TransformerConfig) -> None:
        group = get_tensor_model_parallel_group()
        module.__init__(self, config, submodules, tp_group=group)

    return type(module.__name__, (module,), {"__init__": __init__})
