"""The activation of gated feed-forwards that are no SwiGLUs, where megatron-core lets a module compute it.

megatron-core's MLP, shared experts and experts of Transformer Engine give the output of their first
projection, gate and up side by side, to a module where their config says ``use_te_activation_func``: a seam
made for Transformer Engine's operations, which takes any module. SwiGLUs stay what megatron-core makes of
them.
"""

from __future__ import annotations

from copy import copy

from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from spikingbrain_train.config.model import ActivationFunc
from spikingbrain_train.models.layer_build import LayerBuild, mlp_submodules
from spikingbrain_train.models.transformer_config import HybridTransformerConfig
from spikingbrain_train.ops.gated_activation import gated_relu


class GatedActivation(MegatronModule):
    """``relu(gate) * up`` or ``fatrelu(gate) * up``.

    Args:
        config: of the model; its activation is not silu.
    """

    config: HybridTransformerConfig

    def __init__(self, config: HybridTransformerConfig) -> None:
        super().__init__(config=config)
        assert config.gated_activation is not ActivationFunc.silu, "a SwiGLU is megatron-core's"
        has_threshold = config.gated_activation is ActivationFunc.fatrelu
        self.threshold = config.fatrelu_threshold if has_threshold else 0.0

    def forward(self, gate_up: Tensor) -> Tensor:
        """[..., 2 f] -> [..., f]."""
        return gated_relu(gate_up, self.threshold)


def gated_submodules(build: LayerBuild) -> MLPSubmodules:
    """Parts of a feed-forward whose gate goes through ``model.activation_func``.

    The module that is built of them takes the config that :func:`with_activation` gives.
    """
    submodules = mlp_submodules(build)
    if build.model.activation_func is not ActivationFunc.silu:
        submodules.activation_func = GatedActivation
    return submodules


def with_activation(config: HybridTransformerConfig) -> HybridTransformerConfig:
    """The config of a module that is built of :func:`gated_submodules`.

    That of the model is left as it is: other kinds of feed-forwards have activations of their own.
    """
    if config.gated_activation is ActivationFunc.silu:
        return config
    config = copy(config)
    config.use_te_activation_func, config.bias_activation_fusion = True, False
    return config
