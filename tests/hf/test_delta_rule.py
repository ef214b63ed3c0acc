"""The delta rule of exports against the recurrence in float64 (to 1e-9), its convolution against torch's."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spikingbrain_train.hf import gdn_spikingbrain as export
from spikingbrain_train.ops.gated_delta_rule.naive import naive_gated_delta_rule
from tests.ops.test_gated_delta_rule import make_inputs

TOLERANCE = 1e-9


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() <= TOLERANCE * expected.norm()


@pytest.mark.parametrize("kind", ["weak", "Qwen3-Next", "strong", "infinite"])
@pytest.mark.parametrize("T", [1, 2, 63, 130])
def test_it_is_the_recurrence_for_any_gate(kind: str, T: int) -> None:
    *inputs, state = make_inputs(2, T, 6, 2, 8, 8, kind)
    found = export.gated_delta_rule(tuple(inputs), state)  # type: ignore[arg-type]
    for ours, theirs in zip(found, naive_gated_delta_rule(*inputs, state, scale=8**-0.5), strict=True):
        assert_close(ours, theirs)


def test_documents_begin_at_the_first_state() -> None:
    *inputs, state = make_inputs(2, 100, 4, 2, 8, 8, "weak")
    starts = torch.zeros(2, 100, dtype=torch.bool)
    starts[0, [1, 70]] = starts[1, 64] = True
    o, final = export.gated_delta_rule(tuple(inputs), state, starts)  # type: ignore[arg-type]
    for row, bounds in enumerate(((0, 1, 70, 100), (0, 64, 100))):
        for start, end in zip(bounds, bounds[1:], strict=False):
            document = [x[row : row + 1, start:end] for x in inputs]
            expected, last = naive_gated_delta_rule(*document, state[row : row + 1], scale=8**-0.5)
            assert_close(o[row : row + 1, start:end], expected)
        assert_close(final[row : row + 1], last)


def test_the_kernel_gets_heads_and_gates_that_it_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(q, k, v, g, beta, *, scale, initial_state, output_final_state):  # type: ignore[no-untyped-def]
        assert q.shape == k.shape and v.shape[:3] == g.shape == beta.shape and g.isfinite().all()
        return naive_gated_delta_rule(q, k, v, g, beta, initial_state, scale=scale)

    package = types.ModuleType("fla.ops.gated_delta_rule")
    vars(package).update(chunk_gated_delta_rule=kernel)
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", package)
    *inputs, state = make_inputs(1, 20, 4, 2, 8, 8, "infinite")
    found_kernel = export._kernel.__wrapped__()
    assert found_kernel is kernel
    found = export._by_kernel(found_kernel, tuple(inputs), state)  # type: ignore[arg-type]
    for ours, theirs in zip(found, naive_gated_delta_rule(*inputs, state, scale=8**-0.5), strict=True):
        assert_close(ours, theirs)


def convolved(x_TD: Tensor, weight_DW: Tensor) -> Tensor:
    padded = F.pad(x_TD.t(), (weight_DW.shape[1] - 1, 0))
    return F.conv1d(padded, weight_DW.unsqueeze(1), groups=len(weight_DW)).t()


def test_a_convolution_leaves_out_padding_and_goes_on_from_its_last_inputs() -> None:
    x, weight = torch.randn(3, 20, 5, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    valid = torch.ones(3, 20, dtype=torch.bool)
    valid[0, :7] = valid[1, 4:13] = valid[2, 18:] = False
    state, outputs = None, []
    for part in (slice(0, 2), slice(2, 9), slice(9, 10), slice(10, 20)):
        y, state = export.short_convolution(x[:, part], weight, state, valid[:, part])
        outputs.append(y)
    found = torch.cat(outputs, dim=1)
    for row in range(3):
        text = x[row, valid[row]]
        assert_close(found[row, valid[row]], convolved(text, weight))
        assert state is not None and torch.equal(state[row], text[-3:])


def test_a_convolution_does_not_reach_into_another_document() -> None:
    x, weight = torch.randn(1, 12, 5, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    starts = torch.zeros(1, 12, dtype=torch.bool)
    starts[0, [1, 3, 9]] = True
    y, _ = export.short_convolution(x, weight, starts_BT=starts)
    bounds = (0, 1, 3, 9, 12)
    expected = [convolved(x[0, a:b], weight) for a, b in zip(bounds, bounds[1:], strict=False)]
    assert_close(y[0], torch.cat(expected))
