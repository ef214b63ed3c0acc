"""Small triangular systems as products against LAPACK's solver, float64: 1e-12 of the largest element."""

from __future__ import annotations

import pytest
import torch

from spikingbrain_train.ops.gated_delta_rule.unit_lower import solve_unit_lower


@pytest.mark.parametrize("size", [8, 16, 64])
def test_solution_and_gradients_are_those_of_lapack(size: int) -> None:
    torch.manual_seed(0)
    A = torch.randn(3, 2, size, size, dtype=torch.float64, requires_grad=True)  # of which a half counts
    right = torch.randn(3, 2, size, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(right)
    found = solve_unit_lower(A, right)
    expected = torch.linalg.solve_triangular(A.tril(-1), right, upper=False, unitriangular=True)
    pairs = [(found, expected)]
    pairs += zip(
        *(torch.autograd.grad((each * weight).sum(), (A, right)) for each in (found, expected)), strict=True
    )
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()
