"""What stands for ``mlp`` in a layer: a dense SwiGLU, or a mixture of SwiGLU experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from spikingbrain_train.config.kinds import of_kind
from spikingbrain_train.config.model import FeedForward, SpikingProjection
from spikingbrain_train.config.parallel import ExpertBackend, KernelConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.models.moe import experts as expert_classes
from spikingbrain_train.models.moe.experts import SequentialExperts, SharedExperts, TEGroupedExperts
from spikingbrain_train.models.moe.router import SequenceBalancedRouter
from spikingbrain_train.models.parallel_linears import ParallelLinears
from spikingbrain_train.runtime.megatron_versions import layers_are_built_by_callables

_BUILDERS_INSTEAD_OF_SPECS = layers_are_built_by_callables()


def feed_forward_spec(
    kind: FeedForward, kernels: KernelConfig, linears: ParallelLinears
) -> ModuleSpec | Callable[..., Any]:
    """The ``mlp`` of a layer's spec: a ModuleSpec for megatron-core 0.16, a builder for 0.19.

    Args:
        kind: dense or mixture of experts; sizes come from the TransformerConfig at build time.
        kernels: resolved kernel choices.
        linears: classes of the projections.

    Raises:
        ConfigurationError: spikes are asked for inside experts that have no linear layers.
    """
    build = of_kind(kind, FEED_FORWARDS, "the modules of a feed-forward")
    swiglu = MLPSubmodules(
        linear_fc1=linears.column(SpikingProjection.mlp_fc1),
        linear_fc2=linears.row(SpikingProjection.mlp_fc2),
    )
    return build(swiglu, kernels, linears)


def _dense(
    swiglu: MLPSubmodules, kernels: KernelConfig, linears: ParallelLinears
) -> ModuleSpec | Callable[..., Any]:
    if _BUILDERS_INSTEAD_OF_SPECS:
        return partial(MLP.as_mlp_submodule, submodules=swiglu)
    return ModuleSpec(module=MLP, submodules=swiglu)


def _mixture_of_experts(
    swiglu: MLPSubmodules, kernels: KernelConfig, linears: ParallelLinears
) -> ModuleSpec | Callable[..., Any]:
    submodules = MoESubmodules(
        experts=_routed_experts(kernels.experts, swiglu, linears),
        shared_experts=_module(SharedExperts, swiglu),
        router=SequenceBalancedRouter,
    )
    return _module(MoELayer, submodules)


FEED_FORWARDS: dict[
    FeedForward,
    Callable[[MLPSubmodules, KernelConfig, ParallelLinears], ModuleSpec | Callable[..., Any]],
] = {FeedForward.dense: _dense, FeedForward.moe: _mixture_of_experts}
"""The registry of feed-forwards: what stands for ``mlp`` in a layer of each kind."""


def _module(module: type, submodules: Any = None) -> ModuleSpec | Callable[..., Any]:
    if _BUILDERS_INSTEAD_OF_SPECS:
        return partial(module, submodules=submodules) if submodules is not None else module
    return ModuleSpec(module=module, submodules=submodules)


def _routed_experts(
    backend: ExpertBackend, dense: MLPSubmodules, linears: ParallelLinears
) -> ModuleSpec | Callable[..., Any]:
    if backend is ExpertBackend.sequential:
        return _module(SequentialExperts, dense)
    if backend is ExpertBackend.grouped_gemm:
        if linears.spiking.in_experts:
            raise ConfigurationError(
                "cluster.kernels.experts=grouped_gemm cannot encode spikes inside experts, which "
                "model.spiking.projections asks for; choose cluster.kernels.experts=sequential."
            )
        return _module(expert_classes.GroupedGemmExperts)
    assert backend is ExpertBackend.transformer_engine, f"unresolved experts backend {backend}"
    grouped = {
        "linear_fc1": linears.grouped_column(SpikingProjection.mlp_fc1),
        "linear_fc2": linears.grouped_row(SpikingProjection.mlp_fc2),
    }
    if not _BUILDERS_INSTEAD_OF_SPECS:
        return _module(TEGroupedExperts, MLPSubmodules(**grouped))
    from megatron.core.transformer.moe.experts import GroupedMLPSubmodules

    return _module(TEGroupedExperts, GroupedMLPSubmodules(**grouped))
