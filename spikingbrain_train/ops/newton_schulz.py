"""The nearest matrix whose singular values are all about 1, by a polynomial iteration: the update of Muon.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). Each iteration applies an
odd polynomial to the singular values; five of them bring what is not tiny to between about 0.7 and 1.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of a x + b x^3 + c x^5, as published."""
_SMALLEST_NORM = 1e-7  # a matrix of zeros stays one


def orthogonalized(matrix: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """U f(S) V^T of a matrix U S V^T, where f is the polynomial, applied ``steps`` times.

    Args:
        matrix: [rows, columns], any dtype.
        steps: iterations; 5 are usual.
        dtype: of the products: bfloat16 as published, float32 where hardware does not multiply that.

    Returns:
        [rows, columns] of ``dtype``.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix).to(dtype)  # so that X X^T is the smaller product
    x = x / x.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
