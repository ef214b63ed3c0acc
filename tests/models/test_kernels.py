"""How the config's kernel choices become ones that a machine has.

Packages are made up: those of a test are installed and can be called, and no others.
"""

from __future__ import annotations

import pytest

from spikingbrain_train.architecture.backends.tables import TABLES
from spikingbrain_train.config.linear_transforms import Projection, SpikingConfig
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import (
    AcceleratorKind,
    EngineKind,
    ExpertBackend,
    KernelConfig,
    LinearAttentionBackend,
    ParallelConfig,
    ParallelLinearBackend,
    RotaryBackend,
    SoftmaxAttentionBackend,
    TokenPermutationBackend,
    WeightGradientBackend,
)
from spikingbrain_train.config.run import Precision
from spikingbrain_train.errors import ConfigurationError, PlatformError
from spikingbrain_train.models.kernels import resolve_kernels
from spikingbrain_train.runtime import packages
from spikingbrain_train.runtime.accelerator import Accelerator

EVERYTHING = {"fla": "0.6", "flash_attn": "2.7", "transformer_engine": "2.0", "triton": "3.2"}
CAN_BE_CALLED = {*EVERYTHING, "grouped_gemm", "apex"}


@pytest.fixture(autouse=True)
def installed_packages_can_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        packages, "package_failure", lambda name: None if name in CAN_BE_CALLED else "is not installed"
    )
    monkeypatch.setattr(packages, "defines", lambda name: True)


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """The installed releases lack these names."""
    monkeypatch.setattr(packages, "defines", lambda name: name.partition(":")[2] not in missing)


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
        (AcceleratorKind.cpu, {}, "megatron"),
        (AcceleratorKind.cpu, EVERYTHING, "megatron"),
        (AcceleratorKind.cuda, {}, "megatron"),
        (AcceleratorKind.cuda, EVERYTHING, "transformer_engine"),
        (AcceleratorKind.metax, EVERYTHING, "megatron"),
    ],
    ids=["cpu", "cpu with GPU packages", "bare GPU", "NVIDIA with everything", "MetaX"],
)
def test_auto_takes_the_best_linears_and_leaves_attention_to_its_calls(
    kind: AcceleratorKind, packages: dict[str, str], expected: str
) -> None:
    resolved = resolve_kernels(KernelConfig(), machine(kind, packages))
    assert names(resolved) == ("auto", "auto", expected)


def test_an_explicit_choice_is_kept() -> None:
    chosen = KernelConfig(
        gated_linear_attention=LinearAttentionBackend.naive,
        softmax_attention=SoftmaxAttentionBackend.naive,
        parallel_linear=ParallelLinearBackend.megatron,
    )
    resolved = resolve_kernels(chosen, machine(AcceleratorKind.cuda, EVERYTHING))
    assert names(resolved) == ("naive", "naive", "megatron")


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
    if not has_grouped_mlp:
        without(monkeypatch, "GroupedMLP")
    resolved = resolve_kernels(KernelConfig(), machine(kind, packages))
    assert resolved.experts.value == expected


def test_grouped_experts_are_refused_where_they_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = machine(AcceleratorKind.cuda, EVERYTHING | {"grouped_gemm": "1.1"})
    without(monkeypatch, "GroupedMLP")
    with pytest.raises(PlatformError, match=r"experts=grouped_gemm needs megatron-core 0\.16"):
        resolve_kernels(KernelConfig(experts=ExpertBackend.grouped_gemm), gpu)
    mixed = KernelConfig(
        experts=ExpertBackend.transformer_engine, parallel_linear=ParallelLinearBackend.megatron
    )
    with pytest.raises(ConfigurationError, match=r"needs cluster\.kernels\.parallel_linear=transformer_eng"):
        resolve_kernels(mixed, gpu)


GPU_CHOICES = [
    ("gated_linear_attention", LinearAttentionBackend.fla),
    ("gated_delta_rule", LinearAttentionBackend.fla),
    ("softmax_attention", SoftmaxAttentionBackend.flash_attn),
    ("softmax_attention", SoftmaxAttentionBackend.flex),
    ("parallel_linear", ParallelLinearBackend.transformer_engine),
    ("experts", ExpertBackend.transformer_engine),
    ("experts", ExpertBackend.grouped_gemm),
    ("weight_gradients", WeightGradientBackend.apex),
    ("weight_gradients", WeightGradientBackend.transformer_engine),
    ("token_permutation", TokenPermutationBackend.transformer_engine),
    ("rotary", RotaryBackend.transformer_engine),
]


@pytest.mark.parametrize(("field", "choice"), GPU_CHOICES, ids=lambda x: getattr(x, "value", x))
def test_gpu_kernels_are_refused_on_cpu(field: str, choice) -> None:
    with pytest.raises(
        PlatformError, match=rf"cluster\.kernels\.{field}={choice.value} needs a GPU; choose auto"
    ):
        resolve_kernels(KernelConfig(**{field: choice}), machine(AcceleratorKind.cpu, EVERYTHING))


@pytest.mark.parametrize(("field", "choice"), GPU_CHOICES, ids=lambda x: getattr(x, "value", x))
def test_a_missing_package_is_named_with_the_setting(field: str, choice) -> None:
    with pytest.raises(PlatformError) as refusal:
        resolve_kernels(KernelConfig(**{field: choice}), machine(AcceleratorKind.cuda, {}))
    assert f"cluster.kernels.{field}={choice.value}" in str(refusal.value)


def test_experts_that_encode_spikes_are_made_of_linears() -> None:
    on_metax = machine(AcceleratorKind.metax, {"grouped_gemm": "1.1"})
    model = ModelConfig(spiking=SpikingConfig(projections=[Projection.mlp_fc2]))
    assert resolve_kernels(KernelConfig(), on_metax, model=model).experts is ExpertBackend.sequential


def test_grouped_gemm_multiplies_bfloat16_only() -> None:
    on_metax = machine(AcceleratorKind.metax, {"grouped_gemm": "1.1"})
    by_itself = resolve_kernels(KernelConfig(), on_metax, precision=Precision.fp32)
    assert by_itself.experts is ExpertBackend.sequential
    with pytest.raises(ConfigurationError, match="grouped_gemm multiplies bfloat16 only"):
        resolve_kernels(KernelConfig(experts=ExpertBackend.grouped_gemm), on_metax, precision=Precision.fp32)


def test_an_old_transformer_engine_without_grouped_linears_is_used_for_what_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without(monkeypatch, "TEColumnParallelGroupedLinear")
    on_nvidia = machine(AcceleratorKind.cuda, {"transformer_engine": "1.7"})
    resolved = resolve_kernels(KernelConfig(), on_nvidia)
    assert resolved.parallel_linear is ParallelLinearBackend.transformer_engine
    assert resolved.experts is ExpertBackend.sequential
    with pytest.raises(PlatformError, match=r"experts=transformer_engine needs Transformer Engine 1\.9"):
        resolve_kernels(KernelConfig(experts=ExpertBackend.transformer_engine), on_nvidia)
    with_both = machine(AcceleratorKind.cuda, {"transformer_engine": "1.7", "grouped_gemm": "1.1"})
    assert resolve_kernels(KernelConfig(), with_both).experts is ExpertBackend.grouped_gemm


@pytest.mark.parametrize(
    ("kind", "packages", "expected"),
    [
        (AcceleratorKind.cpu, EVERYTHING | {"apex": "0.1"}, ("autograd", "megatron")),
        (AcceleratorKind.cuda, {}, ("autograd", "megatron")),
        (AcceleratorKind.cuda, {"apex": "0.1"}, ("apex", "megatron")),
        (AcceleratorKind.cuda, EVERYTHING, ("transformer_engine", "transformer_engine")),
        (AcceleratorKind.cuda, EVERYTHING | {"apex": "0.1"}, ("transformer_engine", "transformer_engine")),
        (AcceleratorKind.metax, EVERYTHING | {"apex": "0.1"}, ("autograd", "megatron")),
    ],
    ids=["cpu", "bare GPU", "Apex alone", "Transformer Engine", "both", "MetaX"],
)
def test_gradients_follow_the_linears_and_tokens_the_packages(
    kind: AcceleratorKind, packages: dict[str, str], expected: tuple[str, str]
) -> None:
    resolved = resolve_kernels(KernelConfig(), machine(kind, packages))
    assert (resolved.weight_gradients.value, resolved.token_permutation.value) == expected


def test_apex_without_its_kernel_and_an_old_transformer_engine_are_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = machine(AcceleratorKind.cuda, {"apex": "0.1", "transformer_engine": "2.0"})
    without(monkeypatch, "fused_weight_gradient_mlp_cuda", "fused_permute_with_probs")
    own = KernelConfig(parallel_linear=ParallelLinearBackend.megatron)
    resolved = resolve_kernels(own, gpu)
    assert resolved.weight_gradients is WeightGradientBackend.autograd
    assert resolved.token_permutation is TokenPermutationBackend.megatron
    for setting, choice, words in (
        ("weight_gradients", WeightGradientBackend.apex, "needs Apex built with its CUDA extensions"),
        (
            "token_permutation",
            TokenPermutationBackend.transformer_engine,
            r"Transformer Engine 2\.1 or later",
        ),
    ):
        chosen = KernelConfig(parallel_linear=ParallelLinearBackend.megatron, **{setting: choice})
        with pytest.raises(PlatformError, match=words):
            resolve_kernels(chosen, gpu)


def test_rotary_positions_choose_call_by_call_on_nvidia_alone() -> None:
    for kind in AcceleratorKind:
        if kind is not AcceleratorKind.auto:
            expected = RotaryBackend.auto if kind is AcceleratorKind.cuda else RotaryBackend.megatron
            assert resolve_kernels(KernelConfig(), machine(kind, EVERYTHING)).rotary is expected


def test_what_weight_gradients_are_added_to_is_of_megatron_cores_engine() -> None:
    gpu = machine(AcceleratorKind.cuda, EVERYTHING | {"apex": "0.1"})
    deepspeed = ParallelConfig(engine=EngineKind.deepspeed)
    resolved = resolve_kernels(KernelConfig(), gpu, parallel=deepspeed)
    assert resolved.weight_gradients is WeightGradientBackend.autograd
    for choice in (WeightGradientBackend.apex, WeightGradientBackend.transformer_engine):
        linears = "megatron" if choice is WeightGradientBackend.apex else "transformer_engine"
        chosen = KernelConfig(weight_gradients=choice, parallel_linear=ParallelLinearBackend(linears))
        assert resolve_kernels(chosen, gpu).weight_gradients is choice
        with pytest.raises(ConfigurationError, match=r"but parallel\.engine is deepspeed; choose auto"):
            resolve_kernels(chosen, gpu, parallel=deepspeed)
        other = "megatron" if linears == "transformer_engine" else "transformer_engine"
        mixed = KernelConfig(weight_gradients=choice, parallel_linear=ParallelLinearBackend(other))
        with pytest.raises(ConfigurationError, match=f"parallel_linear={linears}, which is {other}"):
            resolve_kernels(mixed, gpu)


def test_tokens_of_replicated_experts_are_left_out_by_megatron_core() -> None:
    gpu = machine(AcceleratorKind.cuda, EVERYTHING)
    replicating = ParallelConfig(expert_model_parallel_size=2, replicate_expert_load=2.0)
    resolved = resolve_kernels(KernelConfig(), gpu, parallel=replicating)
    assert resolved.token_permutation is TokenPermutationBackend.megatron
    asked = KernelConfig(token_permutation=TokenPermutationBackend.transformer_engine)
    with pytest.raises(ConfigurationError, match=r"as parallel\.replicate_expert_load may; choose auto"):
        resolve_kernels(asked, gpu, parallel=replicating)


def test_auto_passes_over_a_package_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "package_failure", lambda name: "is installed but does not import (ABI)")
    resolved = resolve_kernels(KernelConfig(), machine(AcceleratorKind.cuda, EVERYTHING))
    assert names(resolved) == ("auto", "auto", "megatron")


@pytest.mark.parametrize("setting", TABLES)
def test_the_config_names_what_the_tables_hold(setting: str) -> None:
    kinds = type(getattr(KernelConfig(), setting))
    assert {kind.value for kind in kinds} == set(TABLES[setting].names)
    assert set(TABLES) == set(vars(KernelConfig()))


@pytest.mark.parametrize("setting", TABLES)
def test_an_unknown_backend_is_an_error_that_names_the_known_ones(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}=fast is unknown: choose one of auto, "):
        TABLES[setting].choose("fast", None, machine(AcceleratorKind.cuda, EVERYTHING).machine())
