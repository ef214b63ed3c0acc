"""Activations as whole numbers of spikes, in front of linear projections (arXiv 2509.05276, eq. 19-21).

Part of the modelling code of a checkpoint; needs torch only. A model that was trained with spikes says so
under `spiking` in config.json, and its projections read what a `SpikeEncoder` makes of their input:

    Vth = mean(|x|) / k, clamped to [1e-5, 1e4]        one threshold a token, over the whole input
    y = round(x / Vth) * Vth                           the signed number of spikes times the threshold

The gradient is straight-through: dy/dx = 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

MIN_THRESHOLD, MAX_THRESHOLD = 1e-5, 1e4

MakeEncoder = Callable[[str, int], nn.Module]
"""What stands in front of matrix number n (from 0) of a projection."""


class SpikeEncoder(nn.Module):
    """Every channel of a token as its number of spikes times the token's threshold.

    Args:
        k: spikes of an average channel; more are closer to the input.
    """

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = k

    def counts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Signed spikes [..., D], whole numbers, and Vth [..., 1], both in at least float32.

        Magnitudes of float32 inputs are summed in float64: on which side of a rounding boundary a channel
        falls must not depend on the order of summation.
        """
        wide = torch.float64 if x.dtype in (torch.float32, torch.float64) else torch.float32
        magnitude = torch.linalg.vector_norm(x, ord=1, dim=-1, keepdim=True, dtype=wide)
        threshold = (magnitude / (x.shape[-1] * self.k)).clamp(MIN_THRESHOLD, MAX_THRESHOLD)
        threshold = threshold.to(torch.promote_types(x.dtype, torch.float32))
        return (x.to(threshold.dtype) / threshold).round(), threshold

    def forward(self, x: Tensor) -> Tensor:
        return _StraightThrough.apply(x, self)

    def extra_repr(self) -> str:
        return f"k={self.k:g}"


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, encoder: SpikeEncoder) -> Tensor:
        counts, threshold = encoder.counts(x)
        return (counts * threshold).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def no_encoder(projection: str, matrix: int = 0) -> nn.Module:
    """`MakeEncoder` of a model without spikes."""
    return nn.Identity()


def encoders_of(spiking: dict | None) -> MakeEncoder:
    """`MakeEncoder` of the key `spiking` of a configuration.

    `projections` names those that read spikes: "qkv", "gate", "attention_output", "mlp_fc1", "mlp_fc2". The
    second matrix of a low-rank gate does with `gate_encoding` "each_matrix" only. `queries` says whether
    queries of softmax layers do, behind rotary positions, with a threshold for every token and head.
    """
    if not spiking:
        return no_encoder

    def make(projection: str, matrix: int = 0) -> nn.Module:
        everywhere = spiking.get("gate_encoding", "once") == "each_matrix"
        encoded = projection in spiking["projections"] and (matrix == 0 or everywhere)
        encoded = encoded or (projection == "queries" and spiking.get("queries", False))
        return SpikeEncoder(spiking["k"]) if encoded else nn.Identity()

    return make


__all__ = ["SpikeEncoder"]
