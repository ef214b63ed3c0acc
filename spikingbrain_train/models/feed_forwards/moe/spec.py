"""A mixture of gated experts as ``mlp`` of a layer."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules

from spikingbrain_train.architecture.backends.linears import EXPERTS, ExpertsCall
from spikingbrain_train.architecture.feed_forwards import FeedForwardKind
from spikingbrain_train.architecture.linear_transforms import in_experts
from spikingbrain_train.architecture.moe import active_channels
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.parallel import ExpertBackend
from spikingbrain_train.config.require import require
from spikingbrain_train.models.feed_forwards.gated_activation import gated_submodules
from spikingbrain_train.models.feed_forwards.moe import experts as expert_classes
from spikingbrain_train.models.feed_forwards.moe.experts import (
    SequentialExperts,
    SharedExperts,
    TEGroupedExperts,
)
from spikingbrain_train.models.feed_forwards.moe.replicated_experts import ReplicatingMoELayer
from spikingbrain_train.models.feed_forwards.moe.router import SequenceBalancedRouter
from spikingbrain_train.models.feed_forwards.submodule import (
    BUILDERS_INSTEAD_OF_SPECS,
    Submodule,
    submodule,
)
from spikingbrain_train.models.layer_build import LayerBuild


def spec(_kind: FeedForwardKind, build: LayerBuild) -> Submodule:
    """megatron-core's MoELayer with our router; sizes come from the TransformerConfig when it is built.

    Raises:
        ConfigurationError: inputs or weights of experts are to be transformed that have no linear layers.
    """
    backend = build.kernels.experts
    require(
        not build.replicates_experts or backend is ExpertBackend.sequential,
        f"parallel.replicate_expert_load copies experts that are modules, but cluster.kernels.experts="
        f"{backend.value} computes all of a rank in one product; choose sequential, or set the former "
        f"to null",
    )
    submodules = MoESubmodules(
        experts=_routed_experts(build),
        shared_experts=submodule(SharedExperts, gated_submodules(build, active_channels(build.model))),
        router=SequenceBalancedRouter,
    )
    if not build.replicates_experts:
        return submodule(MoELayer, submodules)
    if BUILDERS_INSTEAD_OF_SPECS:
        return submodule(ReplicatingMoELayer, submodules)
    # megatron-core 0.16 warns of a ModuleSpec of a class that it does not know.
    init = partialmethod(ReplicatingMoELayer.__init__, submodules=submodules)
    return type("ReplicatingMoELayer", (ReplicatingMoELayer,), {"__init__": init})


def _routed_experts(build: LayerBuild) -> Submodule:
    backend, linears = build.kernels.experts, build.linears
    if backend is ExpertBackend.sequential:
        return submodule(SequentialExperts, gated_submodules(build, active_channels(build.model)))
    if backend is ExpertBackend.grouped_gemm:
        call = ExpertsCall(
            linears.backend.value, in_experts(build.model), activation=build.model.activation_func
        )
        limit = EXPERTS.limit(backend.value, call)
        require(limit is None, f"cluster.kernels.experts={backend.value} {limit}; choose sequential")
        return submodule(expert_classes.GroupedGemmExperts)
    assert backend is ExpertBackend.transformer_engine, f"unresolved experts backend {backend}"
    grouped: dict[str, Any] = {
        "linear_fc1": linears.grouped_column(Projection.mlp_fc1),
        "linear_fc2": linears.grouped_row(Projection.mlp_fc2),
        "activation_func": gated_submodules(build, active_channels(build.model)).activation_func,
    }
    if not BUILDERS_INSTEAD_OF_SPECS:
        return submodule(TEGroupedExperts, MLPSubmodules(**grouped))
    from megatron.core.transformer.moe.experts import GroupedMLPSubmodules

    return submodule(TEGroupedExperts, GroupedMLPSubmodules(**grouped))
