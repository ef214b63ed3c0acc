"""Newton-Schulz is its polynomial of the singular values, and torch's where torch has it."""

from __future__ import annotations

import pytest
import torch

from spikingbrain_train.ops.newton_schulz import COEFFICIENTS, orthogonalized

SHAPES = [(24, 40), (40, 24), (17, 17), (1, 9), (33, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_go_through_the_polynomial_and_vectors_stay(shape: tuple[int, int]) -> None:
    """Against a singular value decomposition in float64."""
    a, b, c = COEFFICIENTS
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    expected = left @ torch.diag(values) @ right
    assert values.min() > 0.6 and values.max() < 1.3  # so that it is about orthogonal
    torch.testing.assert_close(orthogonalized(matrix, 5, torch.float64), expected, rtol=1e-10, atol=1e-10)
    # fp32 rounds at 6e-8, which five iterations of slope 3.4 at most make 500 times as much.
    found = orthogonalized(matrix.float(), 5, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_bf16_it_is_that_of_torch(shape: tuple[int, int]) -> None:
    muon = pytest.importorskip("torch.optim._muon", reason="torch.optim.Muon came with torch 2.9")
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    expected = muon._zeropower_via_newtonschulz(matrix, COEFFICIENTS, 5, 1e-7)
    assert torch.equal(orthogonalized(matrix, 5, torch.bfloat16), expected)


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not orthogonalized(torch.zeros(4, 6), 5, torch.float32).any()
