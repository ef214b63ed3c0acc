"""What recurrences over the states of key/value groups share, whatever tokens do to a state.

Gated linear attention and the gated delta rule keep one state [K, V] a group, which the heads of the group
read.

Shape legend: B batch, T time, H query heads, G key/value groups, K key dim, V value dim; D documents, or B
without documents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spikingbrain_train.ops.document_bounds import run_documents

Run = Callable[..., tuple[Tensor, Tensor]]
"""Of q, k, v, gates and the state before them: outputs and the state behind them."""


def check_inputs(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor],
    initial_state: Tensor | None,
    bounds: Sequence[int] | None,
    *,
    gate_a_channel: bool,
) -> None:
    """See that what an op is called with fits together.

    Args:
        op: its name, for errors.
        q: queries [B, T, H, K].
        k: keys [B, T, G, K].
        v: values [B, T, G, V].
        gates: by name, each [B, T, G, K] or [B, T, G].
        initial_state: [D, G, K, V].
        bounds: of documents.
        gate_a_channel: which of both gates are.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have four dimensions [B, T, heads or groups, dim], not {list(x.shape)}."
            )
    B, T, H, K = q.shape
    G, V = v.shape[2:]
    if T == 0:
        raise ValueError(f"{op} needs at least one token: T is 0.")
    if G == 0 or H % G:
        raise ValueError(f"The number of query heads ({H}) must be a multiple of the number of groups ({G}).")
    of_gates: tuple[int, ...] = (B, T, G, K) if gate_a_channel else (B, T, G)
    shapes: dict[str, tuple[Tensor, tuple[int, ...]]] = {"k": (k, (B, T, G, K)), "v": (v, (B, T, G, V))}
    shapes |= {name: (gate, of_gates) for name, gate in gates.items()}
    for name, (x, expected) in shapes.items():
        if x.shape != expected:
            raise ValueError(f"{name} must be {list(expected)} to go with q and v, not {list(x.shape)}.")
    of_states = (B if bounds is None else len(bounds) - 1, G, K, V)
    if initial_state is not None and initial_state.shape != of_states:
        raise ValueError(f"initial_state must be {list(of_states)}, not {list(initial_state.shape)}.")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating dtype, not {q.dtype}, {k.dtype} and {v.dtype}.")
    for name, gate in gates.items():
        if not gate.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {gate.dtype}.")


def run_from_states(
    run: Run, inputs: Sequence[Tensor], initial_state: Tensor | None, bounds: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Run a form over a sequence, or over each of its documents.

    Args:
        run: the form.
        inputs: q, k, v and gates.
        initial_state: before the sequence or every document [D, G, K, V]; None: zeros.
        bounds: of documents; None: rows are sequences.

    Returns:
        Outputs [B, T, H, V] in q's dtype, and final states [D, G, K, V] in float32 (float64 for float64
        inputs).
    """
    q, k, v = inputs[:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if initial_state is None:
        B, _, G, K = k.shape
        num_states = B if bounds is None else len(bounds) - 1
        initial_state = torch.zeros(num_states, G, K, v.shape[-1], dtype=dtype, device=q.device)
    states = initial_state.to(dtype)
    if bounds is None or len(bounds) == 2:
        return run(*inputs, states)
    return run_documents(run, inputs, states, bounds)


def run_steps(step: Run, *inputs_and_state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Run the step of a recurrence over T tokens: the naive form.

    Exact for every gate; differentiable through autograd; slow (one Python step a token).

    Args:
        step: of q [B, H, K], k [B, G, K], v [B, G, V], gates of one token and the state.
        inputs_and_state: the same for T tokens [B, T, ...], then the state [B, G, K, V].
        scale: factor of the output.

    Returns:
        Outputs [B, T, H, V] in q's dtype, and the final state [B, G, K, V].
    """
    *inputs, state = inputs_and_state
    outputs = []
    for t in range(inputs[0].shape[1]):
        o, state = step(*(x[:, t] for x in inputs), state, scale=scale)
        outputs.append(o)
    return torch.stack(outputs, dim=1), state


def run_by_heads(
    kernel: Callable[..., tuple[Tensor, Tensor | None]],
    q: Tensor,
    of_groups: Sequence[Tensor],
    initial_state: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Call a kernel that knows one query head a state, as those of flash-linear-attention.

    What heads of a group share is repeated from groups to heads. All heads of a group then end in the same
    state, of which the first is returned.

    Args:
        kernel: of q, the repeated tensors, ``initial_state`` and options.
        q: queries [B, T, H, K].
        of_groups: keys, values and gates [B, T, G, ...].
        initial_state: [D, G, K, V].
        options: handed on.

    Returns:
        Outputs [B, T, H, V], and the final state [D, G, K, V] or None, as the kernel has it.
    """
    heads_per_group = q.shape[2] // of_groups[0].shape[2]
    if initial_state is not None:
        initial_state = initial_state.float().repeat_interleave(heads_per_group, dim=1)
    of_heads = (x.repeat_interleave(heads_per_group, dim=2) for x in of_groups)
    o, final_state = kernel(q, *of_heads, initial_state=initial_state, **options)
    return o, None if final_state is None else final_state[:, ::heads_per_group]
