"""The causal convolution against the sum that defines it, with documents and states."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spikingbrain_train.ops.causal_convolution import causal_convolution, naive_causal_convolution


def _gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(2)
    loss = sum((output * torch.randn(output.shape).double()).sum() for output in outputs)
    assert isinstance(loss, Tensor)
    return [*outputs, *torch.autograd.grad(loss, leaves, materialize_grads=True)]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_convolution_equals_its_sum_over_documents_and_states(data: st.DataObject) -> None:
    # Sums of W products in float64, in another order: 1e-12 is a thousand roundings.
    T, D, W = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 7)), data.draw(st.integers(1, 5))
    bounds = [0, *sorted(data.draw(st.sets(st.integers(1, T), max_size=5)) | {T})]
    has_bias = data.draw(st.booleans())
    torch.manual_seed(T)
    shapes = [(1, T, D), (D, W), (len(bounds) - 1, W - 1, D), (D,)]
    leaves = [torch.randn(shape).double().requires_grad_() for shape in shapes]
    x, weight, state, bias = leaves
    used = leaves if has_bias else leaves[:3]
    y, final = causal_convolution(
        x,
        weight,
        bias if has_bias else None,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=bounds,
    )
    assert final is not None
    documents = [
        naive_causal_convolution(x[:, start:end], weight, bias if has_bias else None, one)
        for (start, end), one in zip(pairwise(bounds), state.split(1), strict=True)
    ]
    expected = tuple(
        torch.cat(parts, dim) for parts, dim in zip(zip(*documents, strict=True), (1, 0), strict=True)
    )
    for actual, reference in zip(_gradients((y, final), used), _gradients(expected, used), strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-12, atol=1e-12)


def test_a_text_in_two_parts_is_the_text_at_once() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 9, 5).double(), torch.randn(5, 4).double(), torch.randn(5).double()
    whole, last = causal_convolution(x, weight, bias, output_final_state=True)
    first, state = causal_convolution(x[:, :2], weight, bias, output_final_state=True)  # shorter than W - 1
    rest, end = causal_convolution(x[:, 2:], weight, bias, initial_state=state, output_final_state=True)
    torch.testing.assert_close(torch.cat((first, rest), dim=1), whole, rtol=0, atol=1e-14)
    assert last is not None and end is not None and torch.equal(last, end)
    assert torch.equal(last, x[:, 6:])


def test_wrong_shapes_are_named() -> None:
    x, weight = torch.randn(2, 5, 3), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"weight \[D, W\], not \[2, 5, 3\] and \[2, 4\]"):
        causal_convolution(x, weight[:2])
    with pytest.raises(ValueError, match=r"initial_state must be \[2, 3, 3\], not \[1, 3, 3\]"):
        causal_convolution(x, weight, initial_state=torch.randn(1, 3, 3))
    with pytest.raises(ValueError, match="needs B = 1"):
        causal_convolution(x, weight, cu_seqlens=[0, 5])
