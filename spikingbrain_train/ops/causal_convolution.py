"""A short causal convolution of every channel by itself, as in front of recurrent mixers.

    y_t = bias + sum_w weight[w] x_{t - W + 1 + w}

(Mamba, arXiv 2312.00752, section 3.4; Gated DeltaNet, arXiv 2412.06464.) What a text leaves behind are its
last W - 1 inputs.

Shape legend: B batch, T time, D channels, W width of the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from spikingbrain_train.ops.document_bounds import document_bounds


def naive_causal_convolution(
    x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor | None, state_BSD: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum that defines it, token by token: y [B, T, D] and the last W - 1 inputs [B, W - 1, D]."""
    W = weight_DW.shape[1]
    window, outputs = list(state_BSD.unbind(1)), []
    for x_BD in x_BTD.unbind(1):
        window.append(x_BD)
        y = torch.zeros_like(x_BD) if bias_D is None else bias_D.expand(x_BD.shape)
        for w in range(W):
            y = y + weight_DW[:, w] * window[w - W]
        outputs.append(y)
    last = window[len(window) - W + 1 :]
    return torch.stack(outputs, dim=1), torch.stack(last, dim=1) if last else state_BSD


def causal_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Convolve along time, every channel with its own kernel.

    Differentiable with respect to all tensors.

    Args:
        x: inputs [B, T, D].
        weight: kernels [D, W] in x's dtype; the last tap multiplies the token itself.
        bias: [D] or None.
        initial_state: inputs before the first token, the oldest first [B, W - 1, D]; zeros by default. With
            ``cu_seqlens``, before the first token of every document [documents, W - 1, D].
        output_final_state: also return the last W - 1 inputs, those of ``initial_state`` included.
        cu_seqlens: documents that do not see each other: [0, end of the first, ..., T]. B must be 1.

    Returns:
        y [B, T, D], and the final state, shaped as ``initial_state``, or None.

    Raises:
        ValueError: shapes or documents do not fit.
    """
    if x.dim() != 3 or x.shape[1] == 0 or weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(
            f"x must be [B, T, D] with at least one token, and weight [D, W], not {list(x.shape)} and "
            f"{list(weight.shape)}."
        )
    bounds = None if cu_seqlens is None else document_bounds(cu_seqlens, *x.shape[:2])
    before = weight.shape[1] - 1
    num_states = x.shape[0] if bounds is None else len(bounds) - 1
    expected = (num_states, before, x.shape[2])
    if initial_state is None:
        initial_state = x.new_zeros(expected)
    elif initial_state.shape != expected:
        raise ValueError(f"initial_state must be {list(expected)}, not {list(initial_state.shape)}.")
    initial_state = initial_state.to(x.dtype)
    if bounds is None:
        inputs = torch.cat((initial_state, x), dim=1)
        y = _convolve(inputs, weight, bias)
        return y, inputs[:, inputs.shape[1] - before :] if output_final_state else None
    # Every document with the inputs before it, one behind the other: one convolution, of which the outputs
    # that reach over an end are left out.
    lengths = [end - start for start, end in pairwise(bounds)]
    pieces = zip(initial_state.split(1), x.split(lengths, dim=1), strict=True)
    inputs = torch.cat([part for piece in pieces for part in piece], dim=1)
    split = [part for length in lengths for part in (length, before)][: 2 * len(lengths) - 1]
    outputs = _convolve(inputs, weight, bias).split(split, dim=1)
    y = torch.cat(outputs[::2], dim=1)
    if not output_final_state:
        return y, None
    documents = inputs.split([before + length for length in lengths], dim=1)
    return y, torch.cat([document[:, document.shape[1] - before :] for document in documents])


def _convolve(inputs_BSD: Tensor, weight_DW: Tensor, bias_D: Tensor | None) -> Tensor:
    """[B, S - W + 1, D]"""
    channels = weight_DW.shape[0]
    x_BDS = inputs_BSD.transpose(1, 2)
    return F.conv1d(x_BDS, weight_DW.unsqueeze(1), bias_D, groups=channels).transpose(1, 2)
