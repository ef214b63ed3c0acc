"""The gated feed-forward of a `spikingbrain` model, dense or an expert, which skips zeros of its gate.

Part of the modelling code of a checkpoint.
"""

from __future__ import annotations

from torch import Tensor

from .activation_spikingbrain import activation_of
from .configuration_spikingbrain import SpikingBrainConfig
from .mixers_gla_swa import GLAswaMLP
from .spikes_gla_swa import encoders_of
from .zeros_sparsellama import sparse_mlp


class SpikingBrainMLP(GLAswaMLP):
    """Gate, up and down projection; where it has zeros, few tokens on a CPU are computed without them."""

    def __init__(
        self, config: SpikingBrainConfig, width: int, bias: bool = False, sub_norm: bool = False
    ) -> None:
        encoder = encoders_of(config.spiking)
        eps = config.rms_norm_eps if sub_norm else None
        super().__init__(config.hidden_size, width, activation_of(config), encoder, bias, eps)
        # Spikes and norms stand between the activation and the down projection, which reads what they make
        # of it.
        self.skip_zeros = config.skip_zeros and config.spiking is None and not sub_norm

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """[..., hidden_size] to the same; `weight` [..., 1] is what the output counts, None is 1."""
        if self.skip_zeros:
            y = sparse_mlp(x, self.gate_proj, self.up_proj, self.down_proj, self.act_fn)
            if y is not None:
                return y if weight is None else (y * weight).to(x.dtype)
        return super().forward(x, weight)


__all__ = ["SpikingBrainMLP"]
