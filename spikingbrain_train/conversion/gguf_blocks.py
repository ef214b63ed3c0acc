"""Ternary matrices in the blocks of llama.cpp's types (ggml/src/ggml-quants.c), and rows as it wants them.

Shape letters: O outputs, I inputs, N blocks in a row, S inputs in a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain_train.conversion.formats.gguf import Q2_0, Q4_0, TQ2_0, BlockType
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.ops.ternary import magnitude_sum, ternary_codes, ternary_scales


def turned(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head reordered so that rotary positions turn neighbours: 0, D/2, 1, D/2 + 1, ...

    Args:
        tensor: [heads * D, ...] of a projection to queries or keys, weight or bias.
        heads: how many.
    """
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def ternary_scale(weight: Tensor) -> Tensor:
    """[1] the scale that training has of a matrix [O, I] of parameters."""
    return ternary_scales(magnitude_sum(weight), weight.numel(), weight.dtype).reshape(1)


def ternary_blocks(weight: Tensor, kind: BlockType, has_scale_beside: bool = False) -> Tensor:
    """The ternary numbers that training made of a matrix, as blocks.

    Args:
        weight: [O, I] of parameters; a block's size divides I.
        kind: of the blocks.
        has_scale_beside: the blocks' own scales are 1.

    Returns:
        [O, I / S * bytes of a block] uint8.

    Raises:
        CheckpointError: float16 has no eleven bits for the scale.
    """
    scale = ternary_scale(weight)
    half = (torch.ones_like(scale) if has_scale_beside else scale).to(torch.float16)
    smallest, largest = torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max
    if not has_scale_beside and not smallest <= float(scale) <= largest:
        raise CheckpointError(
            f"a ternary matrix has scale {float(scale):.2g}, which the float16 scales of GGUF hold with few "
            "bits or none; export in another format"
        )
    codes = ternary_codes(weight, scale).to(torch.int8).unflatten(-1, (-1, kind.size))
    packed = _PACKERS[kind.name](codes)
    scales = half.view(torch.uint8).expand(*packed.shape[:-1], 2)
    parts = (packed, scales) if kind is TQ2_0 else (scales, packed)
    return torch.cat(parts, dim=-1).flatten(1)


def _fours(digits: Tensor) -> Tensor:
    """[..., 4, n] uint8 below 4 -> [..., n], the first in the lowest bits."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).unsqueeze(-1)
    return (digits << shifts).sum(-2, dtype=torch.uint8)


def _tq2_0(codes: Tensor) -> Tensor:
    """[O, N, 256] -> [O, N, 64]: of each half block 32 bytes, each of four numbers 32 apart."""
    return _fours((codes + 1).to(torch.uint8).unflatten(-1, (2, 4, 32))).flatten(-2)


def _q2_0(codes: Tensor) -> Tensor:
    """[O, N, 64] -> [O, N, 16]: four neighbours in a byte."""
    return _fours((codes + 1).to(torch.uint8).unflatten(-1, (16, 4)).transpose(-1, -2))


def _q4_0(codes: Tensor) -> Tensor:
    """[O, N, 32] -> [O, N, 16]: a byte has two numbers 16 apart, 8 added to each."""
    first, second = (codes + 8).to(torch.uint8).unflatten(-1, (2, 16)).unbind(-2)
    return first | second << 4


_PACKERS = {TQ2_0.name: _tq2_0, Q2_0.name: _q2_0, Q4_0.name: _q4_0}
