"""How the config's kernel choices become ones that a machine has."""

from __future__ import annotations

import pytest

from spikingbrain_train.config.errors import PlatformError
from spikingbrain_train.config.model import SpikingConfig, SpikingProjection
from spikingbrain_train.config.parallel import (
    AcceleratorKind,
    ExpertBackend,
    KernelConfig,
    LinearAttentionBackend,
    ParallelLinearBackend,
    SoftmaxAttentionBackend,
)
from spikingbrain_train.parallel import kernels as kernels_module
from spikingbrain_train.parallel.accelerator import Accelerator
from spikingbrain_train.parallel.kernels import describe_kernels, resolve_kernels

EVERYTHING = {"fla": "0.6", "flash_attn": "2.7", "transformer_engine": "2.0"}


def machine(kind: AcceleratorKind, packages: dict[str, str]) -> Accelerator:
    return Accelerator(kind, "a device", 0 if kind is AcceleratorKind.cpu else 1, packages)


def names(kernels: KernelConfig) -> tuple[str, str, str]:
    return (
        kernels.gated_linear_attention.value,
        kernels.softmax_attention.value,
        kernels.parallel_linear.value,
    )


@pytest.mark.parametrize(
    ("kind", "packages", "expected"),
    [
        (AcceleratorKind.cpu, {}, ("chunk", "blocked", "megatron")),
        (AcceleratorKind.cpu, EVERYTHING, ("chunk", "blocked", "megatron")),
        (AcceleratorKind.cuda, {}, ("chunk", "flex", "megatron")),
        (AcceleratorKind.cuda, EVERYTHING, ("fla", "flash_attn", "transformer_engine")),
        (AcceleratorKind.metax, EVERYTHING, ("fla", "flash_attn", "megatron")),
    ],
    ids=["cpu", "cpu with GPU packages", "bare GPU", "NVIDIA with everything", "MetaX"],
)
def test_auto_takes_the_best_that_is_there(
    kind: AcceleratorKind, packages: dict[str, str], expected: tuple[str, str, str]
) -> None:
    assert names(resolve_kernels(KernelConfig(), machine(kind, packages))) == expected


def test_an_explicit_choice_is_kept() -> None:
    chosen = KernelConfig(
        gated_linear_attention=LinearAttentionBackend.recurrent,
        softmax_attention=SoftmaxAttentionBackend.reference,
        parallel_linear=ParallelLinearBackend.megatron,
    )
    resolved = resolve_kernels(chosen, machine(AcceleratorKind.cuda, EVERYTHING))
    assert names(resolved) == ("recurrent", "reference", "megatron")
    line = describe_kernels(resolved)
    assert all(name in line for name in names(resolved))


@pytest.mark.parametrize(
    ("kind", "packages", "has_grouped_mlp", "expected"),
    [
        (AcceleratorKind.cpu, EVERYTHING | {"grouped_gemm": "1.1"}, True, "sequential"),
        (AcceleratorKind.cuda, EVERYTHING, True, "transformer_engine"),
        (AcceleratorKind.metax, {"grouped_gemm": "1.1"}, True, "grouped_gemm"),
        (AcceleratorKind.metax, {"grouped_gemm": "1.1"}, False, "sequential"),
        (AcceleratorKind.metax, {}, True, "sequential"),
    ],
    ids=["cpu", "NVIDIA", "MetaX with grouped_gemm", "the same on megatron-core 0.19", "bare MetaX"],
)
def test_experts_follow_the_linears_or_the_packages(
    monkeypatch: pytest.MonkeyPatch,
    kind: AcceleratorKind,
    packages: dict[str, str],
    has_grouped_mlp: bool,
    expected: str,
) -> None:
    monkeypatch.setattr(kernels_module, "HAS_GROUPED_MLP", has_grouped_mlp)
    resolved = resolve_kernels(KernelConfig(), machine(kind, packages))
    assert resolved.experts.value == expected
    assert f"experts {expected}" in describe_kernels(resolved)


def test_grouped_experts_are_refused_where_they_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = machine(AcceleratorKind.cuda, EVERYTHING | {"grouped_gemm": "1.1"})
    monkeypatch.setattr(Accelerator, "require", lambda *_: None)  # would import the package
    monkeypatch.setattr(kernels_module, "HAS_GROUPED_MLP", False)
    with pytest.raises(PlatformError, match=r"experts=grouped_gemm needs megatron-core 0\.16"):
        resolve_kernels(KernelConfig(experts=ExpertBackend.grouped_gemm), gpu)
    mixed = KernelConfig(
        experts=ExpertBackend.transformer_engine, parallel_linear=ParallelLinearBackend.megatron
    )
    with pytest.raises(PlatformError, match=r"needs cluster\.kernels\.parallel_linear=transformer_engine"):
        resolve_kernels(mixed, gpu)


GPU_CHOICES = [
    ("gated_linear_attention", LinearAttentionBackend.fla),
    ("softmax_attention", SoftmaxAttentionBackend.flash_attn),
    ("softmax_attention", SoftmaxAttentionBackend.flex),
    ("parallel_linear", ParallelLinearBackend.transformer_engine),
    ("experts", ExpertBackend.transformer_engine),
    ("experts", ExpertBackend.grouped_gemm),
]


@pytest.mark.parametrize(("field", "choice"), GPU_CHOICES, ids=lambda x: getattr(x, "value", x))
def test_gpu_kernels_are_refused_on_cpu(field: str, choice) -> None:
    with pytest.raises(
        PlatformError, match=rf"cluster\.kernels\.{field}={choice.value} needs a GPU; choose auto"
    ):
        resolve_kernels(KernelConfig(**{field: choice}), machine(AcceleratorKind.cpu, EVERYTHING))


@pytest.mark.parametrize(
    ("field", "choice"),
    [case for case in GPU_CHOICES if case[1] is not SoftmaxAttentionBackend.flex],
    ids=lambda x: getattr(x, "value", x),
)
def test_a_missing_package_is_named_with_the_setting(field: str, choice) -> None:
    with pytest.raises(PlatformError) as refusal:
        resolve_kernels(KernelConfig(**{field: choice}), machine(AcceleratorKind.cuda, {}))
    assert f"cluster.kernels.{field}={choice.value}" in str(refusal.value)


def test_experts_that_encode_spikes_are_made_of_linears() -> None:
    on_metax = machine(AcceleratorKind.metax, {"grouped_gemm": "1.1"})
    spiking = SpikingConfig(projections=[SpikingProjection.mlp_fc2])
    assert resolve_kernels(KernelConfig(), on_metax, spiking=spiking).experts is ExpertBackend.sequential
