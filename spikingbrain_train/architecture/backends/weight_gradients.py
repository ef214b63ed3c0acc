"""Backends of the sum of weight gradients over micro-batches (models/weight_gradients.py)."""

from __future__ import annotations

from dataclasses import dataclass

from spikingbrain_train.architecture.backends.backend import AUTO, Backend, Backends, Machine
from spikingbrain_train.config.parallel import AcceleratorKind, EngineKind


@dataclass(frozen=True)
class WeightGradientsCall:
    """What decides who can add weight gradients within the product that gives them."""

    parallel_linear: str
    """Backend of the linears; ``auto`` while it is not chosen."""
    platform: AcceleratorKind
    engine: EngineKind = EngineKind.megatron
    """Who keeps the gradients."""


def _engine_limit(call: WeightGradientsCall) -> str | None:
    if call.engine is EngineKind.megatron:
        return None
    return (
        "adds to the float32 gradients of megatron-core's data parallelism, but parallel.engine is "
        f"{call.engine.value}"
    )


def _transformer_engine_limit(call: WeightGradientsCall) -> str | None:
    if call.parallel_linear not in (AUTO, "transformer_engine"):
        return f"needs cluster.kernels.parallel_linear=transformer_engine, which is {call.parallel_linear}"
    return _engine_limit(call)


def _apex_limit(call: WeightGradientsCall) -> str | None:
    if call.parallel_linear not in (AUTO, "megatron"):
        return f"needs cluster.kernels.parallel_linear=megatron, which is {call.parallel_linear}"
    return _engine_limit(call)


def _apex_limit_here(call: WeightGradientsCall, machine: Machine) -> str | None:
    if machine.defines("megatron.core.tensor_parallel.layers:fused_weight_gradient_mlp_cuda"):
        return None
    return "needs Apex built with its CUDA extensions, among them fused_weight_gradient_mlp_cuda"


def _preference(call: WeightGradientsCall, on_gpu: bool) -> tuple[str, ...]:
    """Apex is NVIDIA's; a package of that name elsewhere is not known to work."""
    on_nvidia = on_gpu and call.platform is AcceleratorKind.cuda
    return ("transformer_engine", "apex", "autograd") if on_nvidia else ("autograd",)


WEIGHT_GRADIENTS: Backends[WeightGradientsCall] = Backends(
    "weight_gradients",
    (
        Backend("transformer_engine", "transformer_engine", gpu=True, limit=_transformer_engine_limit),
        Backend("apex", "apex", gpu=True, limit=_apex_limit, limit_here=_apex_limit_here),
        Backend("autograd"),
    ),
    _preference,
)
