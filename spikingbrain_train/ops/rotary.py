"""Frequencies of rotary positions, scaled as transformers' ``ROPE_INIT_FUNCTIONS`` do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spikingbrain_train.config.enum_tables import entry_of
from spikingbrain_train.config.rope_scaling import RopeScalingConfig, RopeType


def scaled_frequencies(
    inv_freq: Tensor, base: float, scaling: RopeScalingConfig, text_length: int = 0
) -> Tensor:
    """Angles per token of each pair of channels.

    Args:
        inv_freq: [kv_channels / 2] float32, unscaled.
        base: the rotary base that they are of.
        scaling: its parameters.
        text_length: tokens of the text, of which two kinds of scaling depend.

    Returns:
        [kv_channels / 2] float32.
    """
    if scaling.rope_type is RopeType.default:
        return inv_freq
    functions = {
        RopeType.linear: _linear,
        RopeType.dynamic: _dynamic,
        RopeType.yarn: _yarn,
        RopeType.llama3: _llama3,
        RopeType.longrope: _longrope,
    }
    function = entry_of(scaling.rope_type, functions, "the frequencies of rotary positions")
    return function(inv_freq, base, scaling, text_length)


def _linear(inv_freq: Tensor, base: float, scaling: RopeScalingConfig, text_length: int) -> Tensor:
    """Position interpolation (Chen et al., arXiv 2306.15595): positions are divided, and so are angles."""
    return inv_freq / scaling.factor


def _dynamic(inv_freq: Tensor, base: float, scaling: RopeScalingConfig, text_length: int) -> Tensor:
    """A base that grows with the text, beyond the original context."""
    original, width = scaling.original_max_position_embeddings, 2 * len(inv_freq)
    if text_length <= original:
        return inv_freq
    stretch = scaling.factor * text_length / original - (scaling.factor - 1)
    base = base * stretch ** (width / (width - 2))
    return 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32, device=inv_freq.device) / width)


def _yarn(inv_freq: Tensor, base: float, scaling: RopeScalingConfig, text_length: int) -> Tensor:
    """NTK by parts (Peng et al., arXiv 2309.00071, section 3.2), with the ramp over channels."""
    width = 2 * len(inv_freq)

    def channel(turns: float) -> float:
        """The channel (not whole) that turns so often in the original context."""
        original = scaling.original_max_position_embeddings
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    channels = torch.arange(len(inv_freq), dtype=torch.float32, device=inv_freq.device)
    scaled = ((channels - low) / (high - low)).clamp(0.0, 1.0)
    return inv_freq / scaling.factor * scaled + inv_freq * (1 - scaled)


def _llama3(inv_freq: Tensor, base: float, scaling: RopeScalingConfig, text_length: int) -> Tensor:
    """Long wavelengths slow down by ``factor``, short ones stay, a ramp between."""
    original = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq


def _longrope(inv_freq: Tensor, base: float, scaling: RopeScalingConfig, text_length: int) -> Tensor:
    """Divisors that a search found (Ding et al., arXiv 2402.13753), others beyond the original context."""
    is_long = text_length > scaling.original_max_position_embeddings
    factors = scaling.long_factor if is_long else scaling.short_factor
    return inv_freq / torch.tensor(factors, dtype=torch.float32, device=inv_freq.device)
