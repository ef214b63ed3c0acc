"""The dense feed-forward: a SwiGLU, or gated by another activation."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.mlp import MLP

from spikingbrain_train.architecture.feed_forwards import FeedForwardKind
from spikingbrain_train.config.model import ActivationFunc
from spikingbrain_train.models.feed_forwards.gated_activation import gated_submodules, with_activation
from spikingbrain_train.models.feed_forwards.submodule import Submodule, mlp
from spikingbrain_train.models.layer_build import LayerBuild
from spikingbrain_train.models.transformer_config import HybridTransformerConfig


def spec(_kind: FeedForwardKind, build: LayerBuild) -> Submodule:
    """megatron-core's MLP; its width comes from the TransformerConfig when it is built."""
    is_swiglu = build.model.activation_func is ActivationFunc.silu
    return mlp(MLP if is_swiglu else GatedMLP, gated_submodules(build, build.model.ffn_hidden_size))


class GatedMLP(MLP):
    """megatron-core's MLP with another activation of its gate than silu."""

    def __init__(self, config: HybridTransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(with_activation(config), *args, **kwargs)
