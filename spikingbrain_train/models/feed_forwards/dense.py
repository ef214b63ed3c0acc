"""The dense SwiGLU, and the projections that experts share with it."""

from __future__ import annotations

from megatron.core.transformer.mlp import MLP, MLPSubmodules

from spikingbrain_train.architecture.feed_forwards import FeedForwardKind
from spikingbrain_train.config.model import Projection
from spikingbrain_train.models.feed_forwards.submodule import Submodule, mlp
from spikingbrain_train.models.layer_build import LayerBuild


def swiglu_projections(build: LayerBuild) -> MLPSubmodules:
    """Gate and up projection, and down projection."""
    return MLPSubmodules(
        linear_fc1=build.linears.column(Projection.mlp_fc1),
        linear_fc2=build.linears.row(Projection.mlp_fc2),
    )


def spec(_kind: FeedForwardKind, build: LayerBuild) -> Submodule:
    """megatron-core's MLP; its width comes from the TransformerConfig when it is built."""
    return mlp(MLP, swiglu_projections(build))
