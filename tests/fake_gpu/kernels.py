"""Kernels of optional packages that compute nothing: they hold their callers to what the real ones ask for.

Each takes what the real function takes, refuses what that would refuse or compute wrongly, and returns a
tensor of the right shape and dtype through which gradients reach every input.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from spikingbrain_train.runtime import packages
from tests.fake_gpu import engine

PACKAGES = ("triton", "fla", "flash_attn", "mamba_ssm")


def _on_gpu(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        assert x is None or x.is_cuda, f"{name} is on the CPU"


def _touch(like: Tensor, *inputs: Tensor | None) -> Tensor:
    """``like``, with a gradient for every input."""
    for x in inputs:
        if x is not None:
            like = like + x.sum().to(like.dtype)
    return like


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """fla.ops.gla.chunk_gla: one head a state, gates a channel."""
    assert q.shape == k.shape == g.shape and v.shape[:3] == q.shape[:3], "one key, value and gate a head"
    return _recurrence(q, k, v, g, None, initial_state, output_final_state, cu_seqlens)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """fla.ops.gated_delta_rule.chunk_gated_delta_rule: one head a state, gates a head."""
    assert q.shape == k.shape and v.shape[:3] == q.shape[:3] == g.shape == beta.shape
    return _recurrence(q, k, v, g, beta, initial_state, output_final_state, cu_seqlens)


def _recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    _on_gpu(q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, cu_seqlens=cu_seqlens)
    assert q.dtype == k.dtype == v.dtype
    assert g.dtype == torch.float32, f"gates in {g.dtype} are too coarse"
    documents = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    states = (documents, q.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None:
        assert initial_state.dtype == torch.float32 and initial_state.shape == states
    o = _touch(v, q, k, g, beta, initial_state)
    final = _touch(q.new_zeros(states, dtype=torch.float32), k, v, g, beta) if output_final_state else None
    return o, final


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    **_: Any,
) -> Tensor:
    """flash_attn.flash_attn_func."""
    _on_gpu(q=q, k=k, v=v)
    assert q.dtype == k.dtype == v.dtype in (torch.float16, torch.bfloat16)
    assert (
        q.shape[2] % k.shape[2] == 0 and q.shape[3] <= 256 and q.stride(3) == k.stride(3) == v.stride(3) == 1
    )
    return _touch(q, k, v)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
) -> Tensor:
    """flash_attn.flash_attn_varlen_func."""
    _on_gpu(cu_q=cu_q, cu_k=cu_k)
    assert cu_q.dtype == cu_k.dtype == torch.int32 and type(max_q) is type(max_k) is int
    return flash_attn_func(q[None], k[None], v[None], **options)[0]


def flex_attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """torch's flex attention, compiled: heads in front of tokens."""
    _on_gpu(q=q, k=k, v=v)
    assert q.dtype == k.dtype == v.dtype
    return _touch(q, k, v)


def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, return_last_state: bool
) -> tuple[Tensor, Tensor]:
    """mamba_ssm's selective_scan_fn: time last, A in float32."""
    _on_gpu(u=u, delta=delta, A=A, B=B, C=C)
    assert u.dtype == delta.dtype == B.dtype == C.dtype and A.dtype == torch.float32
    state = u.new_zeros(u.shape[0], *A.shape, dtype=torch.float32)
    return _touch(u, delta, A, B, C), state


_MODULES = {
    "fla.ops.gla": {"chunk_gla": chunk_gla},
    "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": chunk_gated_delta_rule},
    "flash_attn": {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func},
    "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan_fn},
}


@contextlib.contextmanager
def installed(*, with_engine: bool = False) -> Iterator[None]:
    """These packages are here, and no other optional one but for Transformer Engine, if asked for."""
    from spikingbrain_train.ops.softmax_attention import flex

    modules = {}
    for name, functions in _MODULES.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(functions)

    def failure(name: str) -> str | None:
        is_here = name in PACKAGES or (with_engine and name == "transformer_engine")
        return None if is_here else "is not installed"

    sys.modules.update(modules)  # and not mock.patch.dict, which would forget what is imported within
    with (
        mock.patch.object(packages, "package_failure", failure),
        mock.patch.object(flex, "_compiled_flex_attention", lambda: flex_attention),
        engine.installed() if with_engine else contextlib.nullcontext(),
    ):
        yield
    for name in modules:
        del sys.modules[name]
