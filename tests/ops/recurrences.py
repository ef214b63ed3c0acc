"""How forms of a recurrence are held together: outputs, final states and the gradients of everything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def outputs_and_gradients(
    op: Callable[..., tuple[Tensor, Tensor | None]], inputs: Sequence[Tensor], use: str, **options: Any
) -> list[Tensor]:
    """Output, final state and the gradients of all inputs.

    Args:
        op: with ``initial_state`` and ``output_final_state``.
        inputs: its tensors, the initial state last.
        use: what is differentiated, by random weights: ``output``, ``state`` or ``both``.
        options: of the op.
    """
    *leaves, state = [x.detach().clone().requires_grad_() for x in inputs]
    output, final = op(*leaves, initial_state=state, output_final_state=True, **options)
    assert final is not None
    torch.manual_seed(1)
    output_weight, state_weight = torch.randn(output.shape).double(), torch.randn(final.shape).double()
    loss = torch.zeros((), dtype=torch.float64)
    if use in ("output", "both"):
        loss = loss + (output * output_weight).sum()
    if use in ("state", "both"):
        loss = loss + (final * state_weight).sum()
    gradients = torch.autograd.grad(loss, [*leaves, state], materialize_grads=True)
    return [output.detach(), final.detach(), *gradients]


def relative_errors(
    names: Sequence[str],
    actual: Sequence[Tensor],
    expected: Sequence[Tensor],
    smallest: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Error of each, relative to the norm of what is expected, or to ``smallest`` where that is less."""
    return {
        name: ((a.double() - e).norm() / e.norm().clamp_min((smallest or {}).get(name, 1e-30))).item()
        for name, a, e in zip(names, actual, expected, strict=True)
    }
