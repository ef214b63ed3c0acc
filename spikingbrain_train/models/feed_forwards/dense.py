"""The dense SwiGLU."""

from __future__ import annotations

from megatron.core.transformer.mlp import MLP

from spikingbrain_train.architecture.feed_forwards import FeedForwardKind
from spikingbrain_train.models.feed_forwards.submodule import Submodule, mlp
from spikingbrain_train.models.layer_build import LayerBuild, mlp_submodules


def spec(_kind: FeedForwardKind, build: LayerBuild) -> Submodule:
    """megatron-core's MLP; its width comes from the TransformerConfig when it is built."""
    return mlp(MLP, mlp_submodules(build))
