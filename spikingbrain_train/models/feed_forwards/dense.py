"""The dense feed-forward: a SwiGLU, or gated by another activation."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from spikingbrain_train.architecture.feed_forwards import FeedForwardKind
from spikingbrain_train.config.model import ActivationFunc
from spikingbrain_train.hf.zeros_sparsellama import active_product, can_skip
from spikingbrain_train.models.feed_forwards.gated_activation import gated_submodules, with_activation
from spikingbrain_train.models.feed_forwards.submodule import Submodule, mlp
from spikingbrain_train.models.layer_build import LayerBuild
from spikingbrain_train.models.transformer_config import HybridTransformerConfig


def spec(_kind: FeedForwardKind, build: LayerBuild) -> Submodule:
    """megatron-core's MLP; its width comes from the TransformerConfig when it is built."""
    is_swiglu = build.model.activation_func is ActivationFunc.silu
    return mlp(MLP if is_swiglu else GatedMLP, gated_submodules(build, build.model.ffn_hidden_size))


class GatedMLP(MLP):
    """megatron-core's MLP with another activation of its gate than silu.

    Few tokens on a CPU, as text is generated, are computed without the weights that meet zeros, as in
    exports, by the code that travels with them. A whole feed-forward on one rank, of plain linears, can be.
    """

    def __init__(self, config: HybridTransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(with_activation(config), *args, **kwargs)
        self._down: tuple[tuple[int, int], Tensor] | None = None
        """Which weight of the second projection, and its transposed copy, [f, hidden_size]."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[..., hidden_size] to the same, and no bias or that of the second projection."""
        more = [*args, *kwargs.values()]  # a router's weights, a mask of padding
        if all(each is None for each in more) and self._can_skip_zeros(hidden_states):
            output = self._without_zeros(hidden_states.reshape(-1, hidden_states.shape[-1]))
            if output is not None:
                return output.view_as(hidden_states), None
        return super().forward(hidden_states, *args, **kwargs)

    def train(self, mode: bool = True) -> GatedMLP:
        """What is made of weights does not outlive them."""
        if mode:
            self._down = None
        return super().train(mode)

    def _can_skip_zeros(self, hidden_states: Tensor) -> bool:
        if self.training or not can_skip(hidden_states) or self.config.tensor_model_parallel_size > 1:
            return False
        is_plain = (
            type(self.linear_fc1) is ColumnParallelLinear and type(self.linear_fc2) is RowParallelLinear
        )
        is_watched = self.activation_func._forward_hooks or self.linear_fc2._forward_pre_hooks
        return is_plain and not self.activation_func.squared and not is_watched

    def _without_zeros(self, x_ND: Tensor) -> Tensor | None:
        gate_FD, up_FD = self.linear_fc1.weight.chunk(2)
        gate_NF = torch.nn.functional.linear(x_ND, gate_FD)
        return active_product(x_ND, gate_NF, self.activation_func.threshold, up_FD, None, self._down_rows())

    def _down_rows(self) -> Tensor:
        weight = self.linear_fc2.weight
        which = (weight.data_ptr(), weight._version)
        if self._down is None or self._down[0] != which:
            self._down = which, weight.detach().t().contiguous()
        return self._down[1]
