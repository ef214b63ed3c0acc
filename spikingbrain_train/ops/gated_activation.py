"""The product inside a feed-forward whose gate has zeros: ``relu(gate) * up``, with a threshold, or squared.

ProSparse (arXiv 2402.13516, section 3.2); the square is that of BitNet b1.58 2B4T (arXiv 2504.12285). What
autograd keeps of it is its input alone, as of a fused SwiGLU; the naive form keeps the activated gate, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def naive_gated_relu(gate_up: Tensor, threshold: float = 0.0, *, squared: bool = False) -> Tensor:
    """As the papers have it, of plain tensor operations; see :func:`gated_relu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    activated = torch.relu(gate) if threshold == 0 else torch.where(gate >= threshold, gate, 0)
    return (activated.square() if squared else activated) * up


def gated_relu(
    gate_up: Tensor,
    threshold: float = 0.0,
    penalty: float | Tensor | None = None,
    *,
    squared: bool = False,
) -> Tensor:
    """``FATReLU(gate) * up`` with ``FATReLU(x) = x if x >= threshold else 0``; ReLU where the threshold is 0.

    A gate or an input that is NaN stays NaN.

    Args:
        gate_up: [..., 2 f] gate and up projection side by side.
        threshold: at least 0.
        penalty: gradients are those of what comes behind plus ``penalty * output.abs().sum()``, [] on the
            device of ``gate_up`` where it is a tensor; None adds nothing. So an L1 loss costs no tensor.
        squared: ``FATReLU(gate)^2 * up``.

    Returns:
        [..., f] in the dtype of ``gate_up``.
    """
    return _GatedReLU.apply(gate_up, threshold, penalty, squared)


def _silent(gate: Tensor, threshold: float) -> Tensor:
    """Where the gate is closed; not where it is NaN."""
    return gate <= 0 if threshold == 0 else gate < threshold


class _GatedReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_up: Tensor, threshold: float, penalty: float | Tensor | None, squared: bool
    ) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        ctx.save_for_backward(gate_up)
        ctx.threshold, ctx.penalty, ctx.squared = threshold, penalty, squared
        activated = gate.masked_fill(_silent(gate, threshold), 0)
        return (activated.square_() if squared else activated).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        silent = _silent(gate, ctx.threshold)
        if ctx.penalty is not None:
            # Where the gate is open it is positive, and the product has the sign of the other factor.
            grad = torch.sign(up).mul_(ctx.penalty).add_(grad)
        # Written where it belongs: nothing is as wide as the input but the result.
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, up, out=grad_gate)
        torch.mul(grad, gate, out=grad_up)
        if ctx.squared:
            grad_gate.mul_(gate).mul_(2)
            grad_up.mul_(gate)
        grad_gate.masked_fill_(silent, 0)
        grad_up.masked_fill_(silent, 0)
        return grad_gate_up, None, None, None
