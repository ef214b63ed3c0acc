"""fla's Triton kernels, interpreted on the CPU, beside the recurrences that they compute.

A process of its own: Triton has to be told before anything imports it, and the environment of the tests is
without. `test_interpreted_kernels.py` starts it; by hand:

    make kernels && PYTHONPATH=.venv-kernels:. .venv/bin/python tests/ops/interpreted_kernels.py [NAME ...]

For each call of `CASES` one line of JSON: its name and the error of output, final state and every gradient,
relative to the norm of what the recurrence gives in float64 on the same numbers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.ops.triton_interpreter import prepare

if __name__ == "__main__":
    prepare()

import torch
from torch import Tensor

from spikingbrain_train.hf import gdn_spikingbrain, ops_gla_swa
from spikingbrain_train.ops.gated_delta_rule import dispatch as delta_rule
from spikingbrain_train.ops.gated_linear_attention import dispatch as linear_attention
from spikingbrain_train.ops.l2_norm import l2_norm

Op = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Case:
    """One call."""

    op: str
    """``gla`` or ``gdn``, or these as exports call them: ``gla export``, ``gdn export``."""
    shape: tuple[int, int, int, int, int, int]
    """B, T, H, G, K, V."""
    bounds: tuple[int, ...] | None = None
    """Of documents: [0, end of the first, ..., T]."""
    dtype: torch.dtype = torch.float32
    """Of q, k and v; gates stay in float32, as the mixers have them. NumPy has no bfloat16, and the
    interpreter computes with its bits as if they were integers: float16 stands for
    the mixed dtypes of half precision."""
    has_state: bool = True
    """Whether it begins with states, and gradients reach those it ends with."""
    forgets: bool = False
    """Whether some log gates are -inf."""


CASES = {
    "gla, rows": Case("gla", (2, 19, 2, 1, 16, 8)),
    # The second document has more than one chunk of 64 tokens, and none begins where a chunk does.
    "gla, documents": Case("gla", (1, 90, 2, 1, 16, 8), (0, 3, 72, 90)),
    "gla, no state, widths that are no powers of two": Case("gla", (1, 9, 3, 3, 24, 12), has_state=False),
    "gla, gates that forget": Case("gla", (1, 19, 4, 2, 16, 8), forgets=True),
    "gla, fp16 documents": Case("gla", (1, 30, 2, 1, 16, 16), (0, 11, 30), torch.float16),
    "gla export, rows": Case("gla export", (2, 19, 2, 1, 16, 8)),
    "gla export, documents": Case("gla export", (1, 30, 2, 1, 16, 8), (0, 11, 30), has_state=False),
    "gla export, gates that forget": Case("gla export", (1, 19, 2, 1, 16, 8), forgets=True),
    "gdn, rows": Case("gdn", (2, 19, 2, 1, 16, 8)),
    "gdn, documents": Case("gdn", (1, 90, 2, 1, 16, 8), (0, 3, 72, 90)),
    "gdn, no state, widths that are no powers of two": Case("gdn", (1, 9, 3, 3, 24, 12), has_state=False),
    "gdn, gates that forget": Case("gdn", (1, 19, 4, 2, 16, 8), forgets=True),
    "gdn, fp16 documents": Case("gdn", (1, 30, 2, 1, 16, 16), (0, 11, 30), torch.float16),
    "gdn export, rows": Case("gdn export", (2, 19, 2, 1, 16, 8)),
}

INPUTS = {"gla": ("q", "k", "v", "log_gate"), "gdn": ("q", "k", "v", "log_gate", "beta")}


def inputs_of(case: Case) -> list[Tensor]:
    """q, k, v and gates, and where the case has one the state, in the dtypes that mixers call with."""
    B, T, H, G, K, V = case.shape
    torch.manual_seed(0)
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, G, K), torch.randn(B, T, G, V)
    gated_a_channel = case.op.startswith("gla")
    log_gate = -0.3 * torch.rand(B, T, G, K) if gated_a_channel else -0.3 * torch.rand(B, T, G)
    if case.forgets:
        log_gate[torch.rand(log_gate.shape) < 0.2] = float("-inf")
    gates = [log_gate] if gated_a_channel else [log_gate, torch.rand(B, T, G)]
    if not gated_a_channel:
        q, k = l2_norm(q), l2_norm(k)
    states = [torch.randn(B if case.bounds is None else len(case.bounds) - 1, G, K, V)] * case.has_state
    return [*(x.to(case.dtype) for x in (q, k, v)), *gates, *states]


def kernel_of(case: Case) -> Op:
    """What runs on GPUs, from the op's entry point down."""
    if case.op == "gla export":
        return gla_export
    if case.op == "gdn export":
        return gdn_export
    return linear_attention.gated_linear_attention if case.op == "gla" else delta_rule.gated_delta_rule


def gla_export(*inputs: Tensor, initial_state: Tensor | None, cu_seqlens: Any, **_: Any) -> Any:
    kernel = ops_gla_swa._chunk_gla_kernel()
    assert kernel is not None
    q, *others = inputs
    starts = None
    if cu_seqlens is not None:
        starts = torch.zeros(q.shape[:2], dtype=torch.bool)
        starts[:, list(cu_seqlens[1:-1])] = True
    # The state that exports go on from is the last document's.
    return ops_gla_swa.gated_linear_attention_by_kernel(
        kernel, q * q.shape[-1] ** -0.5, *others, initial_state, starts
    )


def gdn_export(*inputs: Tensor, initial_state: Tensor | None, **_: Any) -> Any:
    kernel = gdn_spikingbrain._kernel()
    assert kernel is not None
    return gdn_spikingbrain._by_kernel(kernel, inputs, initial_state)  # type: ignore[arg-type]


def run(op: Op, case: Case, inputs: Sequence[Tensor], **options: Any) -> dict[str, Tensor]:
    """Output, final state and the gradient of every input, of a sum with fixed random weights."""
    names = [*INPUTS[case.op.split()[0]], *(["state"] if case.has_state else [])]
    leaves = dict(zip(names, [x.detach().clone().requires_grad_() for x in inputs], strict=True))
    state = leaves.get("state")
    o, final = op(
        *(leaves[name] for name in names if name != "state"),
        initial_state=state,
        output_final_state=case.has_state,
        cu_seqlens=case.bounds,
        **options,
    )
    torch.manual_seed(1)
    loss = (o * torch.randn(o.shape)).double().sum()
    results = {"o": o.detach()}
    if case.has_state:
        assert final is not None
        results["final state"] = final.detach()
        loss = loss + (final * torch.randn(final.shape)).double().sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return results | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def errors(case: Case) -> dict[str, float]:
    """Of the kernel, from the recurrence in float64 on the same numbers."""
    inputs = inputs_of(case)
    op = linear_attention.gated_linear_attention if "gla" in case.op else delta_rule.gated_delta_rule
    expected = run(op, case, [x.double() for x in inputs], backend="naive")
    options = {} if "export" in case.op else {"backend": "fla"}
    found = run(kernel_of(case), case, inputs, **options)
    return {name: _relative(found[name], x) for name, x in expected.items()}


def _relative(found: Tensor, expected: Tensor) -> float:
    # A shape that is broadcast would hide a layout that is not the one asked for.
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return ((found.double() - expected).norm() / expected.norm()).item()


def main(names: Sequence[str]) -> None:
    # Without a GPU the ops would refuse fla: here the names asked for count.
    linear_attention.choose_backend = lambda backend, *_: backend  # type: ignore[assignment]
    delta_rule.choose_backend = lambda backend, *_: backend  # type: ignore[assignment]
    for name, case in CASES.items():
        if not names or name in names:
            print(json.dumps([name, errors(case)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
