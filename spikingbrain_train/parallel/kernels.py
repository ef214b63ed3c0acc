"""Turns the config's kernel choices into ones that this machine has.

A backend that is asked for by name and missing is an error; ``auto`` falls back, and the log says to what.
"""

from __future__ import annotations

from dataclasses import dataclass

from spikingbrain_train.config.errors import PlatformError
from spikingbrain_train.config.model import SpikingConfig
from spikingbrain_train.config.parallel import (
    AcceleratorKind,
    ExpertBackend,
    KernelConfig,
    LinearAttentionBackend,
    ParallelLinearBackend,
    SoftmaxAttentionBackend,
)
from spikingbrain_train.parallel.accelerator import Accelerator
from spikingbrain_train.parallel.megatron_versions import HAS_GROUPED_MLP, MEGATRON_VERSION


@dataclass(frozen=True)
class _Need:
    """What a backend cannot do without."""

    package: str | None = None
    gpu: bool = False


_NEEDS: dict[str, dict[str, _Need]] = {
    "gated_linear_attention": {"fla": _Need("fla", gpu=True)},
    "softmax_attention": {"flash_attn": _Need("flash_attn", gpu=True), "flex": _Need(gpu=True)},
    "parallel_linear": {"transformer_engine": _Need("transformer_engine", gpu=True)},
    "experts": {
        "transformer_engine": _Need("transformer_engine", gpu=True),
        "grouped_gemm": _Need("grouped_gemm", gpu=True),
    },
}


def resolve_kernels(
    kernels: KernelConfig, accelerator: Accelerator, *, spiking: SpikingConfig | None = None
) -> KernelConfig:
    """Replace every ``auto`` by the best backend here and check the rest.

    Args:
        kernels: choices of the config.
        accelerator: this process's platform and packages.
        spiking: spikes of the model, which not every backend can encode; None is a model without.

    Raises:
        PlatformError: a backend is asked for by name whose package or GPU is missing.
    """
    for field, needs in _NEEDS.items():
        name = getattr(kernels, field).value
        need = needs.get(name)
        if need is None:
            continue
        setting = f"cluster.kernels.{field}={name}"
        if need.gpu and not accelerator.is_gpu:
            raise PlatformError(f"{setting} needs a GPU; choose auto.")
        if need.package is not None:
            accelerator.require(need.package, setting)
    parallel_linear = _parallel_linear(kernels.parallel_linear, accelerator)
    return KernelConfig(
        gated_linear_attention=_linear_attention(kernels.gated_linear_attention, accelerator),
        softmax_attention=_softmax_attention(kernels.softmax_attention, accelerator),
        parallel_linear=parallel_linear,
        experts=_experts(kernels.experts, parallel_linear, accelerator, spiking or SpikingConfig()),
    )


def describe_kernels(kernels: KernelConfig) -> str:
    """One line for the log."""
    return (
        f"kernels: gated linear attention {kernels.gated_linear_attention.value}, softmax attention "
        f"{kernels.softmax_attention.value}, parallel linears {kernels.parallel_linear.value}, experts "
        f"{kernels.experts.value}"
    )


def _linear_attention(choice: LinearAttentionBackend, accelerator: Accelerator) -> LinearAttentionBackend:
    if choice is not LinearAttentionBackend.auto:
        return choice
    return LinearAttentionBackend.fla if accelerator.has("fla") else LinearAttentionBackend.chunk


def _softmax_attention(choice: SoftmaxAttentionBackend, accelerator: Accelerator) -> SoftmaxAttentionBackend:
    if choice is not SoftmaxAttentionBackend.auto:
        return choice
    if not accelerator.is_gpu:
        return SoftmaxAttentionBackend.blocked
    return (
        SoftmaxAttentionBackend.flash_attn if accelerator.has("flash_attn") else SoftmaxAttentionBackend.flex
    )


def _parallel_linear(choice: ParallelLinearBackend, accelerator: Accelerator) -> ParallelLinearBackend:
    if choice is not ParallelLinearBackend.auto:
        return choice
    # MetaX images carry no Transformer Engine, and builds that claim to are not NVIDIA's.
    if accelerator.kind is AcceleratorKind.cuda and accelerator.has("transformer_engine"):
        return ParallelLinearBackend.transformer_engine
    return ParallelLinearBackend.megatron


def _experts(
    choice: ExpertBackend,
    parallel_linear: ParallelLinearBackend,
    accelerator: Accelerator,
    spiking: SpikingConfig,
) -> ExpertBackend:
    on_transformer_engine = parallel_linear is ParallelLinearBackend.transformer_engine
    if choice is ExpertBackend.transformer_engine and not on_transformer_engine:
        raise PlatformError(
            "cluster.kernels.experts=transformer_engine needs cluster.kernels.parallel_linear="
            f"transformer_engine, which is {parallel_linear.value}; choose auto."
        )
    if choice is ExpertBackend.grouped_gemm and not HAS_GROUPED_MLP:
        raise PlatformError(
            f"cluster.kernels.experts=grouped_gemm needs megatron-core 0.16, but {MEGATRON_VERSION} is "
            "installed; choose auto."
        )
    if choice is not ExpertBackend.auto:
        return choice
    if on_transformer_engine:
        return ExpertBackend.transformer_engine
    if accelerator.has("grouped_gemm") and HAS_GROUPED_MLP and not spiking.in_experts:
        return ExpertBackend.grouped_gemm
    return ExpertBackend.sequential
