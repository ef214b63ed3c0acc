"""Backends of the parallel linears and of routed experts: whose classes a model is built of."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

from spikingbrain_train.architecture.backends.backend import AUTO, Backend, Backends, Machine
from spikingbrain_train.config.model import ActivationFunc
from spikingbrain_train.config.parallel import AcceleratorKind
from spikingbrain_train.config.run import Precision


@dataclass(frozen=True)
class LinearsCall:
    """What decides whose parallel linears a model can have."""

    platform: AcceleratorKind


def _preference_of_linears(call: LinearsCall, on_gpu: bool) -> tuple[str, ...]:
    """Transformer Engine is NVIDIA's; a package of that name elsewhere is not known to work."""
    on_nvidia = on_gpu and call.platform is AcceleratorKind.cuda
    return ("transformer_engine", "megatron") if on_nvidia else ("megatron",)


PARALLEL_LINEAR: Backends[LinearsCall] = Backends(
    "parallel_linear",
    (Backend("transformer_engine", "transformer_engine", gpu=True), Backend("megatron")),
    _preference_of_linears,
)


@dataclass(frozen=True)
class ExpertsCall:
    """What decides who can multiply the routed experts of a model."""

    parallel_linear: str
    """Backend of the linears; ``auto`` while it is not chosen."""
    transforms: tuple[str, ...] = ()
    """What linears inside experts do to their inputs and weights, and which settings ask for it, in words
    behind "cannot"."""
    precision: Precision = Precision.bf16
    activation: ActivationFunc = ActivationFunc.silu
    """Of the experts' gates."""
    in_fp8: bool = False
    """Whether they are multiplied in FP8."""


def _transformer_engine_limit(call: ExpertsCall) -> str | None:
    if call.parallel_linear in (AUTO, "transformer_engine"):
        return None
    return f"needs cluster.kernels.parallel_linear=transformer_engine, which is {call.parallel_linear}"


def _transformer_engine_limit_here(call: ExpertsCall, machine: Machine) -> str | None:
    if machine.defines("megatron.core.extensions.transformer_engine:TEColumnParallelGroupedLinear"):
        return None
    return "needs Transformer Engine 1.9 or later, with grouped linears"


def _grouped_gemm_limit(call: ExpertsCall) -> str | None:
    if call.precision is Precision.fp32:
        return "multiplies bfloat16 only, but precision=fp32"
    if call.in_fp8:
        return "multiplies bfloat16 only, but fp8.format asks for FP8"
    if call.activation is not ActivationFunc.silu:
        return f"cannot compute model.activation_func={call.activation.value}"
    return f"cannot {call.transforms[0]}" if call.transforms else None


def _grouped_gemm_limit_here(call: ExpertsCall, machine: Machine) -> str | None:
    if machine.defines("megatron.core.transformer.moe.experts:GroupedMLP"):
        return None
    return f"needs megatron-core 0.16, but {version('megatron-core')} is installed"


def _preference_of_experts(call: ExpertsCall, on_gpu: bool) -> tuple[str, ...]:
    return ("transformer_engine", "grouped_gemm", "sequential") if on_gpu else ("sequential",)


EXPERTS: Backends[ExpertsCall] = Backends(
    "experts",
    (
        Backend(
            "transformer_engine",
            "transformer_engine",
            gpu=True,
            limit=_transformer_engine_limit,
            limit_here=_transformer_engine_limit_here,
        ),
        Backend(
            "grouped_gemm",
            "grouped_gemm",
            gpu=True,
            limit=_grouped_gemm_limit,
            limit_here=_grouped_gemm_limit_here,
            varies="gives no promise of equal bits",
        ),
        Backend("sequential"),
    ),
    _preference_of_experts,
)
