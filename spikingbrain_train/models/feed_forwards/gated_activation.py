"""The activation of gated feed-forwards that are no SwiGLUs, where megatron-core lets a module compute it.

megatron-core's MLP, shared experts and experts of Transformer Engine give the output of their first
projection, gate and up side by side, to a module where their config says ``use_te_activation_func``: a seam
made for Transformer Engine's operations, which takes any module. SwiGLUs stay what megatron-core makes of
them.
"""

from __future__ import annotations

from copy import copy
from functools import partialmethod

import torch
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from spikingbrain_train.config.model import ActivationFunc
from spikingbrain_train.models.layer_build import LayerBuild, mlp_submodules
from spikingbrain_train.models.transformer_config import HybridTransformerConfig
from spikingbrain_train.ops.gated_activation import gated_relu


class GatedActivation(MegatronModule):
    """``relu(gate) * up``, with a threshold or squared, with an L1 loss on it and counts of its zeros.

    The loss of a token is ``l1_factor`` times the mean magnitude of the ``channels`` products that it has in
    the layer; losses of layers add up (ProSparse, arXiv 2402.13516, section 3.2; that the norm is a mean over
    the width is read out of the size of its factors). A rank adds what its own channels, experts and tokens
    contribute: the sum over ranks is the loss, and gradients are its gradients, however channels
    (tensor-parallel ranks), experts and tokens are spread. Sums are over tokens, like the cross entropy, of
    which the training step takes the mean per token; a stage where few tokens carry loss scales them.

    Args:
        config: of the model; its activation is not silu.
        channels: products of a token in the layer, over all ranks: the width, or that of all its experts.
    """

    config: HybridTransformerConfig
    sums: Tensor
    counts: Tensor
    auxiliary_metric = "train/l1_loss"

    def __init__(self, config: HybridTransformerConfig, *, channels: int) -> None:
        super().__init__(config=config)
        assert config.gated_activation is not ActivationFunc.silu, "a SwiGLU is megatron-core's"
        has_threshold = config.gated_activation is ActivationFunc.fatrelu
        self.threshold = config.fatrelu_threshold if has_threshold else 0.0
        self.squared = config.gated_activation is ActivationFunc.relu2
        self.channels = channels
        self.l1_factor = 0.0
        """Weight of the loss; set before every step that has one."""
        self.is_counting = False
        """Whether zeros are counted: in steps that are reported."""
        self.is_repeated = False
        """Whether what runs has been counted before: recomputation with gradients in both passes."""
        self._loss_scale: Tensor | None = None
        self.register_buffer("sums", torch.zeros((), dtype=torch.float64), persistent=False)
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64), persistent=False)

    def forward(self, gate_up: Tensor) -> Tensor:
        """[..., 2 f] -> [..., f]; recomputation runs it twice, and only the second time with gradients."""
        if not (self.training and torch.is_grad_enabled()):
            return gated_relu(gate_up, self.threshold, squared=self.squared)
        penalty: float | Tensor | None = None
        if self.l1_factor:
            penalty = self.l1_factor / self.channels
            penalty = penalty if self._loss_scale is None else penalty * self._loss_scale
        product = gated_relu(gate_up, self.threshold, penalty, squared=self.squared)
        if self.is_repeated:
            return product
        with torch.no_grad():
            if penalty is not None:
                wide = torch.promote_types(product.dtype, torch.float32)
                self.sums += penalty * torch.linalg.vector_norm(product, 1, dtype=wide).double()
            if self.is_counting:
                nonzero = torch.count_nonzero(product)
                self.counts += torch.stack([product.numel() - nonzero, nonzero])
        return product

    def reset(self, *, is_counting: bool) -> None:
        """Begin a step; ``is_counting`` says whether its zeros are counted."""
        self.sums.zero_()
        self.counts.zero_()
        self.is_counting = is_counting

    def auxiliary_loss(self) -> Tensor:
        """[] float64: what the loss has added to the sum of token losses; this rank's share."""
        return self.sums

    def scale_auxiliary_loss(self, scale: Tensor) -> None:
        """Weigh it by ``scale``, [], from the next forward pass on."""
        self._loss_scale = scale


def activations_in(module: torch.nn.Module) -> list[GatedActivation]:
    """Those of a model or a layer that are no SwiGLUs, in the order of its modules."""
    return [each for each in module.modules() if isinstance(each, GatedActivation)]


def gated_submodules(build: LayerBuild, channels: int) -> MLPSubmodules:
    """Parts of a feed-forward whose gate goes through ``model.activation_func``.

    The module that is built of them takes the config that :func:`with_activation` gives.

    Args:
        build: what specs are made from.
        channels: see :class:`GatedActivation`.
    """
    submodules = mlp_submodules(build)
    if build.model.activation_func is not ActivationFunc.silu:
        init = partialmethod(GatedActivation.__init__, channels=channels)
        submodules.activation_func = type("GatedActivation", (GatedActivation,), {"__init__": init})
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
