"""The torch side of tests/plugins/relu_squared.py: megatron-core's MLP without its gate."""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from spikingbrain_train.architecture.feed_forwards import FeedForwardKind
from spikingbrain_train.models.feed_forwards.submodule import Submodule, mlp
from spikingbrain_train.models.layer_build import LayerBuild, mlp_submodules


def spec(kind: FeedForwardKind, build: LayerBuild) -> Submodule:
    """The feed-forward as ``mlp`` of a layer."""
    return mlp(ReluSquaredMLP, mlp_submodules(build), scale=kind.own_settings(build.model).scale)


class ReluSquaredMLP(MLP):
    """megatron-core's MLP with another activation.

    Args:
        config: of the model, whose own activation is a SwiGLU.
        scale: factor of the squares.
    """

    def __init__(self, config: TransformerConfig, *args: Any, scale: float, **kwargs: Any) -> None:
        config = copy(config)
        config.gated_linear_unit = False
        config.bias_activation_fusion = False
        config.activation_func = partial(_relu_squared, scale)
        super().__init__(config, *args, **kwargs)


def _relu_squared(scale: float, x: Tensor) -> Tensor:
    return scale * torch.relu(x).square()
