"""Which kernels a run gets on this machine.

Classes of linears and experts are chosen here, because a model is built of them. Attention chooses for
itself, call by call: its ``choose_backend`` alone decides, and what stands here asks it at start-up about the
calls that this run will make, so that a name that cannot work is refused before the first step and the log
says what ``auto`` will take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spikingbrain_train.architecture.layers import dense_twin, softmax_attention_of
from spikingbrain_train.config.model import Mixer, ModelConfig, SpikingConfig
from spikingbrain_train.config.parallel import (
    AcceleratorKind,
    ExpertBackend,
    KernelConfig,
    ParallelLinearBackend,
)
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.errors import ConfigurationError, PlatformError
from spikingbrain_train.ops import gated_linear_attention, softmax_attention
from spikingbrain_train.parallel.context_parallel.sequence_layout import SequenceLayout
from spikingbrain_train.parallel.context_parallel.softmax_attention import num_text_keys
from spikingbrain_train.planning.kernel_limits import SoftmaxAttentionCall, grouped_gemm_limit
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.runtime.accelerator import Accelerator
from spikingbrain_train.runtime.bf16 import PARAMS_DTYPE
from spikingbrain_train.runtime.megatron_versions import HAS_GROUPED_MLP, MEGATRON_VERSION
from spikingbrain_train.runtime.packages import has_package, package_failure


@dataclass(frozen=True)
class _Need:
    """What a backend cannot do without."""

    package: str | None = None
    gpu: bool = False


_NEEDS: dict[str, dict[str, _Need]] = {
    "gated_linear_attention": {"fla": _Need("fla", gpu=True)},
    "softmax_attention": {
        "flash_attn": _Need("flash_attn", gpu=True),
        "flex": _Need("triton", gpu=True),
    },
    "parallel_linear": {"transformer_engine": _Need("transformer_engine", gpu=True)},
    "experts": {
        "transformer_engine": _Need("transformer_engine", gpu=True),
        "grouped_gemm": _Need("grouped_gemm", gpu=True),
    },
}


def resolve_kernels(
    kernels: KernelConfig,
    accelerator: Accelerator,
    *,
    spiking: SpikingConfig | None = None,
    precision: Precision = Precision.bf16,
) -> KernelConfig:
    """Replace ``auto`` of linears and experts by the best backend here and check the rest.

    ``auto`` of attention stays: each call decides.

    Args:
        kernels: choices of the config.
        accelerator: this process's platform and packages.
        spiking: spikes of the model, which not every backend can encode; None is a model without.
        precision: of weights and activations, of which not every backend takes all.

    Raises:
        PlatformError: a backend is asked for by name whose package or GPU is missing.
        ConfigurationError: a backend is asked for by name that cannot do what the run needs.
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
        gated_linear_attention=kernels.gated_linear_attention,
        softmax_attention=kernels.softmax_attention,
        parallel_linear=parallel_linear,
        experts=_experts(
            kernels.experts, parallel_linear, accelerator, spiking or SpikingConfig(), precision
        ),
    )


def _usable(package: str, accelerator: Accelerator) -> bool:
    return accelerator.has(package) and has_package(package)


def _parallel_linear(choice: ParallelLinearBackend, accelerator: Accelerator) -> ParallelLinearBackend:
    if choice is not ParallelLinearBackend.auto:
        return choice
    # Transformer Engine is written for NVIDIA's GPUs; a package of that name elsewhere is not known to work.
    if accelerator.kind is AcceleratorKind.cuda and _usable("transformer_engine", accelerator):
        return ParallelLinearBackend.transformer_engine
    return ParallelLinearBackend.megatron


def _experts(
    choice: ExpertBackend,
    parallel_linear: ParallelLinearBackend,
    accelerator: Accelerator,
    spiking: SpikingConfig,
    precision: Precision,
) -> ExpertBackend:
    on_transformer_engine = parallel_linear is ParallelLinearBackend.transformer_engine
    if choice is ExpertBackend.transformer_engine and not on_transformer_engine:
        raise PlatformError(
            "cluster.kernels.experts=transformer_engine needs cluster.kernels.parallel_linear="
            f"transformer_engine, which is {parallel_linear.value}; choose auto."
        )
    if choice is ExpertBackend.transformer_engine and not _has_grouped_linears():
        raise PlatformError(
            "cluster.kernels.experts=transformer_engine needs Transformer Engine 1.9 or later, with grouped "
            "linears; update it or choose auto."
        )
    if choice is ExpertBackend.grouped_gemm:
        limit = grouped_gemm_limit(precision, spiking)
        if not HAS_GROUPED_MLP:
            raise PlatformError(
                "cluster.kernels.experts=grouped_gemm needs megatron-core 0.16, but "
                f"{MEGATRON_VERSION} is installed; choose auto."
            )
        if limit is not None:
            raise ConfigurationError(f"cluster.kernels.experts=grouped_gemm {limit}; choose auto.")
    if choice is not ExpertBackend.auto:
        return choice
    if on_transformer_engine:
        if _has_grouped_linears():
            return ExpertBackend.transformer_engine
    elif (
        HAS_GROUPED_MLP
        and grouped_gemm_limit(precision, spiking) is None
        and _usable("grouped_gemm", accelerator)
    ):
        return ExpertBackend.grouped_gemm
    return ExpertBackend.sequential


def _has_grouped_linears() -> bool:
    """Whether megatron-core has classes for Transformer Engine's grouped linears (1.9 and later)."""
    from megatron.core.extensions import transformer_engine

    return getattr(transformer_engine, "TEColumnParallelGroupedLinear", None) is not None


@dataclass(frozen=True)
class AttentionChoices:
    """What the attention of a run is computed by: kernel -> the attentions that it computes, in words."""

    gated_linear_attention: dict[str, list[str]]
    softmax_attention: dict[str, list[str]]
    set_aside: dict[str, str]
    """Packages that are installed but cannot be used, and why."""


def attention_choices(config: RunConfig, kernels: KernelConfig, accelerator: Accelerator) -> AttentionChoices:
    """What computes the attention of a run here, asked of the ops themselves.

    Args:
        config: the run; its precision is fp32 or bf16.
        kernels: what :func:`resolve_kernels` returned.
        accelerator: this process's platform and packages.

    Raises:
        ConfigurationError: a kernel is asked for by name that cannot do what the run needs.
        PlatformError: a kernel is asked for by name that is not here.
    """
    device, dtype = accelerator.device_type, PARAMS_DTYPE[config.precision]
    linear: dict[str, list[str]] = {}
    softmax: dict[str, list[str]] = {}
    try:
        if any(mixer.has_linear_branch for mixer in config.model.layer_mixers()):
            name = gated_linear_attention.choose_backend(kernels.gated_linear_attention.value, dtype, device)
            linear[name] = [Mixer.gla.name]
        for what, call in softmax_attention_calls(config):
            name = softmax_attention.choose_backend(kernels.softmax_attention.value, call, device)
            computed = softmax.setdefault(name, [])
            if what not in computed:
                computed.append(what)
    except ValueError as error:
        raise ConfigurationError(f"cluster.kernels.{error}") from error
    set_aside = {}
    for package in ("fla", "flash_attn", "transformer_engine", "grouped_gemm"):
        if accelerator.has(package) and (failure := package_failure(package)) is not None:
            set_aside[package] = failure
    return AttentionChoices(linear, softmax, set_aside)


def describe_kernels(kernels: KernelConfig, choices: AttentionChoices) -> str:
    """One line for the log."""
    text = (
        f"kernels: gated linear attention {_describe(choices.gated_linear_attention)}, softmax attention "
        f"{_describe(choices.softmax_attention)}, parallel linears {kernels.parallel_linear.value}, experts "
        f"{kernels.experts.value}"
    )
    for package, failure in choices.set_aside.items():
        text += f"; {package} is not used: it {failure}"
    return text


def _describe(choices: dict[str, list[str]]) -> str:
    """``flash_attn``, or ``flash_attn (full) and flex (swa)``."""
    if len(choices) < 2:
        return next(iter(choices), "in no layer")
    return " and ".join(f"{name} ({', '.join(whats)})" for name, whats in choices.items())


def softmax_attention_calls(config: RunConfig) -> Iterator[tuple[str, SoftmaxAttentionCall]]:
    """The calls of softmax attention that all ranks of a run will make, each with whose attention it is."""
    model, stage = config.model, config.stage
    # Evaluations see the sinks in any stage.
    sinks = {model.num_sink_tokens}
    kind = kind_of(stage)
    students = [("", model, sinks if kind.sees_sinks else sinks | {0})]
    teachers = [("the teacher's ", dense_twin(model), {0})] if kind.needs_teacher(stage) else []
    for whose, network, sink_counts in [*students, *teachers]:
        for branch in softmax_attention_of(network):
            for num_sink_tokens in sorted(sink_counts):
                window = branch.window(network)
                for call in _calls(config, network, window, num_sink_tokens):
                    documents = " of several documents" if call.has_documents else ""
                    yield f"{whose}{branch.name}{documents}", call


def _calls(
    config: RunConfig, model: ModelConfig, window: int | None, num_sink_tokens: int
) -> Iterator[SoftmaxAttentionCall]:
    ranks, method = config.parallel.context_parallel_size, config.parallel.context_parallel
    for has_documents in (False, True) if config.data.reset_at_documents else (False,):
        for rank in range(ranks):
            layout = SequenceLayout(config.stage.seq_length, num_sink_tokens, rank, ranks)
            yield SoftmaxAttentionCall(
                dtype=str(PARAMS_DTYPE[config.precision]).removeprefix("torch."),
                key_dim=model.kv_channels,
                value_dim=model.kv_channels,
                num_text_keys=num_text_keys(layout, window, method.sliding_window_attention),
                window=window,
                num_sink_tokens=num_sink_tokens,
                has_documents=has_documents,
            )
