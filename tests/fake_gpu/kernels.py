"""Kernels of optional packages that compute nothing: they hold their callers to what the real ones ask for.

Each takes what the real function takes, refuses what that would refuse or compute wrongly, and returns a
tensor of the right shape and dtype through which gradients reach every input.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

from spikingbrain_train.config.parallel import KernelConfig
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


def wgrad_gemm_accum_fp32(input: Tensor, d_output: Tensor, d_weight: Tensor) -> None:
    """Apex's fused_weight_gradient_mlp_cuda: reads rows that lie one behind the other."""
    _on_gpu(input=input, d_output=d_output, d_weight=d_weight)
    assert input.dtype == d_output.dtype and d_weight.dtype == torch.float32
    assert input.is_contiguous() and d_output.is_contiguous() and d_weight.is_contiguous()
    assert d_weight.shape == (d_output.shape[-1], input.shape[-1]) and len(input) == len(d_output)


def multi_tensor_applier(op: Any, overflow: Tensor, lists: list[list[Tensor]], *settings: Any) -> Any:
    """Transformer Engine's and Apex's: one kernel over all tensors."""
    tensors = [each for each in lists[0] if each is not None]
    _on_gpu(overflow=overflow, **{f"tensor {number}": each for number, each in enumerate(tensors)})
    assert all(each.dtype == torch.float32 for each in tensors)
    return overflow.new_ones(1, dtype=torch.float32), None


def apply_rotary_pos_emb(t: Tensor, freqs: Tensor) -> Tensor:
    """transformer_engine.pytorch.attention.rope.apply_rotary_pos_emb, fused."""
    _on_gpu(t=t, freqs=freqs)
    assert freqs.dtype == torch.float32 and freqs.shape == (len(t), 1, 1, t.shape[3])
    return _touch(torch.empty_like(t), t)


def permute_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """transformer_engine.pytorch.permutation.moe_permute_with_probs."""
    _on_gpu(inp=inp, probs=probs, routing_map=routing_map)
    assert probs.shape == routing_map.shape and len(inp) == len(routing_map) and int(num_out_tokens) > 0
    copies = inp.new_empty(int(num_out_tokens), inp.shape[1])
    row_id_map = routing_map.new_empty(len(inp), 2 * routing_map.shape[1] + 1, dtype=torch.int32)
    return _touch(copies, inp), _touch(probs.new_empty(len(copies)), probs), row_id_map


def unpermute(
    inp: Tensor, row_id_map: Tensor, merging_probs: None = None, restore_shape: Any = None
) -> Tensor:
    """transformer_engine.pytorch.permutation.moe_unpermute."""
    _on_gpu(inp=inp, row_id_map=row_id_map)
    assert merging_probs is None and row_id_map.dtype == torch.int32 and len(row_id_map) == restore_shape[0]
    return _touch(inp.new_empty(restore_shape), inp)


def sort_chunks_by_index(inp: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> Tensor:
    """transformer_engine.pytorch.permutation.moe_sort_chunks_by_index."""
    _on_gpu(inp=inp, split_sizes=split_sizes, sorted_index=sorted_index)
    assert split_sizes.shape == sorted_index.shape
    return _touch(torch.empty_like(inp), inp)


def sort_chunks_by_index_with_probs(
    inp: Tensor, probs: Tensor, split_sizes: Tensor, sorted_index: Tensor
) -> tuple[Tensor, Tensor]:
    """transformer_engine.pytorch.permutation.moe_sort_chunks_by_index_with_probs."""
    _on_gpu(probs=probs)
    assert probs.shape == inp.shape[:1]
    return sort_chunks_by_index(inp, split_sizes, sorted_index), _touch(torch.empty_like(probs), probs)


_PERMUTATIONS = (permute_with_probs, unpermute, sort_chunks_by_index, sort_chunks_by_index_with_probs)
_FUSED = {f"fused_{each.__name__}": each for each in _PERMUTATIONS}

_MODULES = {
    "fla.ops.gla": {"chunk_gla": chunk_gla},
    "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": chunk_gated_delta_rule},
    "flash_attn": {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func},
    "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan_fn},
}


def packages_of(kernels: KernelConfig) -> tuple[str, ...]:
    """What is installed for a run: these, and libraries that it asks for by name."""
    chosen = {each.value for each in vars(kernels).values()}
    return (*PACKAGES, *(name for name in ("apex", "transformer_engine") if name in chosen))


def _found_by_megatron(names: Collection[str]) -> Iterator[Any]:
    """What megatron-core imports of Apex and Transformer Engine where it can."""
    if "apex" in names:
        own = sys.modules[__name__]
        yield mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", own, create=True)
    if "transformer_engine" in names:
        yield mock.patch.multiple(moe_utils, create=True, HAVE_TE=True, **_FUSED)
        turn = {"fused_apply_rotary_pos_emb": apply_rotary_pos_emb}
        yield mock.patch.multiple(transformer_engine, create=True, **turn)
    if {"apex", "transformer_engine"} & set(names):
        yield mock.patch.object(packages, "defines", lambda name: True)
        yield mock.patch.object(clip_grads, "multi_tensor_applier", multi_tensor_applier)


@contextlib.contextmanager
def installed(names: Collection[str] = PACKAGES, *, with_engine: bool = False) -> Iterator[None]:
    """These packages are here, and no other optional one; Transformer Engine's linears, if asked for."""
    from spikingbrain_train.ops.softmax_attention import flex

    modules = {}
    for name, functions in _MODULES.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(functions)

    def failure(name: str) -> str | None:
        return None if name in names else "is not installed"

    sys.modules.update(modules)  # and not mock.patch.dict, which would forget what is imported within
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(packages, "package_failure", failure))
        stack.enter_context(mock.patch.object(flex, "_compiled_flex_attention", lambda: flex_attention))
        if with_engine:
            stack.enter_context(engine.installed())
        else:
            for patch in _found_by_megatron(names):
                stack.enter_context(patch)
        yield
    for name in modules:
        del sys.modules[name]
