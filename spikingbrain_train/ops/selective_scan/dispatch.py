"""The one entry point of the selective scan: checks the inputs and chooses a backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from spikingbrain_train.architecture.backends.selective_scan import SELECTIVE_SCAN, SelectiveScanCall
from spikingbrain_train.ops.document_bounds import document_bounds, run_documents
from spikingbrain_train.ops.selective_scan.chunk import chunk_selective_scan
from spikingbrain_train.ops.selective_scan.mamba_ssm import mamba_ssm_selective_scan
from spikingbrain_train.ops.selective_scan.naive import naive_selective_scan
from spikingbrain_train.runtime.packages import machine_of


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
    cu_seqlens: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Selective scan: ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t``, ``y_t = C_t h_t + D x_t``.

    Source: Mamba, arXiv 2312.00752, section 3.2 and algorithm 2, discretised as in its code. Every channel
    has a state of its own; B and C are shared by all. Differentiable once with respect to all tensors.

    Args:
        x: inputs [B, T, D], floating point.
        dt: step sizes [B, T, D], not negative (behind their softplus); any floating dtype, float32
            recommended.
        A: [D, N], not positive.
        B: how inputs are written [B, T, N].
        C: how states are read [B, T, N].
        D: skip connection [D]; None has none.
        initial_state: state before the first token [B, D, N]; zeros by default. With ``cu_seqlens``, before
            the first token of every document [documents, D, N].
        output_final_state: also return the state after the last token.
        backend: ``naive`` (the recurrence, slow), ``chunk`` (PyTorch, any device), ``mamba_ssm`` (CUDA), or
            ``auto``: see :func:`choose_backend`.
        cu_seqlens: documents that do not see each other: [0, end of the first, ..., T]. B must be 1.

    Returns:
        y [B, T, D] in x's dtype, and the final state [B, D, N] (with ``cu_seqlens`` [documents, D, N]) in
        float32 (float64 for float64 inputs) or None.

    Raises:
        ValueError: shapes, dtypes, documents or the backend name do not fit, or the backend asked for cannot
            do what is asked of it.
        PlatformError: the backend asked for needs a package or a GPU that is missing.
    """
    bounds = None if cu_seqlens is None else document_bounds(cu_seqlens, *x.shape[:2])
    _check(x, dt, A, B, C, D, initial_state, bounds)
    # A final state that nobody differentiates may come from any backend.
    passes_states = initial_state is not None or (output_final_state and torch.is_grad_enabled())
    name = choose_backend(backend, x.dtype, x.device.type, A.shape[1], passes_states=passes_states)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if initial_state is None:
        num_states = x.shape[0] if bounds is None else len(bounds) - 1
        initial_state = torch.zeros(num_states, *A.shape, dtype=dtype, device=x.device)
    run, states = partial(_run, name, A), initial_state.to(dtype)
    if bounds is None or len(bounds) == 2:
        y, final_state = run(x, dt, B, C, states)
    else:
        y, final_state = run_documents(run, (x, dt, B, C), states, bounds)
    if D is not None:
        y = torch.addcmul(y, x, D.to(x.dtype))
    return y, final_state if output_final_state else None


def _run(
    name: str, A: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One document a row."""
    if name == "mamba_ssm":  # is chosen only where states are zeros
        return mamba_ssm_selective_scan(x, dt, A, B, C)
    run = naive_selective_scan if name == "naive" else chunk_selective_scan
    return run(x, dt, A, B, C, state)


def choose_backend(
    backend: str, dtype: torch.dtype, device_type: str, state_size: int, *, passes_states: bool = False
) -> str:
    """The kernel that computes a call: the one asked for, or under ``auto`` the best that is here and can.

    What each of them needs and which is best: architecture/backends/selective_scan.py.

    Args:
        backend: as in :func:`selective_scan`.
        dtype: of x.
        device_type: ``cuda``, ``cpu`` or another of torch's.
        state_size: N.
        passes_states: whether the call begins with a state, or gradients reach the one that it ends with.

    Raises:
        ValueError: the name does not exist, or what it names cannot do this.
        PlatformError: what it names needs a package or a GPU that is missing.
    """
    call = SelectiveScanCall(str(dtype).removeprefix("torch."), state_size, passes_states)
    return SELECTIVE_SCAN.choose(backend, call, machine_of(device_type))


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    bounds: tuple[int, ...] | None,
) -> None:
    if x.dim() != 3 or A.dim() != 2:
        raise ValueError(f"x must be [B, T, D] and A [D, N], not {list(x.shape)} and {list(A.shape)}.")
    rows, T, channels = x.shape
    N = A.shape[1]
    if T == 0:
        raise ValueError("selective_scan needs at least one token: T is 0.")
    num_states = rows if bounds is None else len(bounds) - 1
    shapes = (
        ("dt", dt, (rows, T, channels)),
        ("A", A, (channels, N)),
        ("B", B, (rows, T, N)),
        ("C", C, (rows, T, N)),
        ("D", D, (channels,)),
        ("initial_state", initial_state, (num_states, channels, N)),
    )
    for name, tensor, expected in shapes:
        if tensor is not None and tensor.shape != expected:
            raise ValueError(f"{name} must be {list(expected)} to go with x and A, not {list(tensor.shape)}.")
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {tensor.dtype}.")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, not {x.dtype}.")
