"""The matrix product over a train of spikes, driven by its events: ``y = sum_t w_t (W s_t)``.

SpikingBrain, arXiv 2509.05276, section 3.3. Where a spike is, its channel's column of the weight is added or
subtracted; where none is, nothing happens, and nothing is multiplied but a step's sum by what the step is
worth, a power of two. It is what event-driven hardware computes; on a CPU or GPU the product of the counts
themselves is faster.

Shape letters: T steps, N tokens (all leading dimensions), D input channels, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.spiking.spike_train import SpikeTrain

_GATHERED_ELEMENTS = 1 << 22
"""Of weight columns that are added at a time."""


def event_driven_product(train: SpikeTrain, weight: Tensor) -> Tensor:
    """What a linear computes of the counts that a train carries.

    Args:
        train: of [..., D] counts.
        weight: [O, D], integer (of W8ASpike: int8) or floating.

    Returns:
        [..., O]: for integer weights int64, equal to the product of the integers; for floating ones in the
        weight's dtype, added up step by step, which rounds otherwise than a product of the counts does.

    Raises:
        ConfigurationError: shapes that do not fit, or integers whose product could pass int64.
    """
    *leading, D = train.spikes.shape[1:] or (0,)
    if train.spikes.dim() < 2 or weight.dim() != 2 or weight.shape[1] != D:
        raise ConfigurationError(
            f"spikes {tuple(train.spikes.shape)} do not fit a weight {tuple(weight.shape)}; give spikes "
            "[steps, ..., channels] and a weight [outputs, channels]"
        )
    is_whole = not weight.is_floating_point()
    if is_whole:
        _check_range(train, weight)
    dtype = torch.int64 if is_whole else weight.dtype
    columns_DO = weight.t().contiguous()
    product_NO = torch.zeros(max(1, _product(leading)), weight.shape[0], dtype=dtype, device=weight.device)
    if not _product(leading):
        return product_NO[:0].view(*leading, weight.shape[0])
    for spikes, step_weight in zip(train.spikes, train.step_weights, strict=True):
        sums_NO = torch.zeros_like(product_NO)
        _add_events(sums_NO, spikes.reshape(-1, D), columns_DO)
        product_NO.add_(sums_NO, alpha=step_weight)
    return product_NO.view(*leading, weight.shape[0])


def _add_events(sums_NO: Tensor, spikes_ND: Tensor, columns_DO: Tensor) -> None:
    at_a_time = max(1, _GATHERED_ELEMENTS // max(1, columns_DO.shape[1]))
    for sign in (1, -1):
        tokens, channels = (spikes_ND == sign).nonzero(as_tuple=True)
        for of_tokens, of_channels in zip(tokens.split(at_a_time), channels.split(at_a_time), strict=True):
            sums_NO.index_add_(0, of_tokens, columns_DO[of_channels].to(sums_NO.dtype), alpha=sign)


def _check_range(train: SpikeTrain, weight: Tensor) -> None:
    largest = max(abs(int(weight.min())), abs(int(weight.max()))) if weight.numel() else 0
    # A step's sum, too, must fit: its spikes count, not only what they come to.
    worth = torch.zeros(train.spikes.shape[1:], dtype=torch.float64, device=train.spikes.device)
    for spikes, step_weight in zip(train.spikes, train.step_weights, strict=True):
        worth.add_(spikes.abs().to(torch.float64), alpha=abs(step_weight))
    most = float(worth.sum(-1).max()) if worth.numel() else 0.0
    if largest * most >= 2.0**62:
        raise ConfigurationError(
            f"weights up to {largest} times a token's {most:.3g} spikes could pass int64; give smaller ones"
        )


def _product(sizes: list[int]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count
