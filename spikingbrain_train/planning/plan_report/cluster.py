"""What the choice of a cluster means: platform, collectives, kernels, devices."""

from __future__ import annotations

from typing import Any

from spikingbrain_train.architecture.backends.backend import AUTO
from spikingbrain_train.architecture.backends.linears import EXPERTS, PARALLEL_LINEAR, LinearsCall
from spikingbrain_train.architecture.backends.rotary import ROTARY, on_platform
from spikingbrain_train.architecture.backends.tables import TABLES
from spikingbrain_train.architecture.backends.token_permutation import TOKEN_PERMUTATION
from spikingbrain_train.architecture.backends.weight_gradients import WEIGHT_GRADIENTS
from spikingbrain_train.architecture.layers import has_experts
from spikingbrain_train.config.parallel import AcceleratorKind, ClusterConfig
from spikingbrain_train.config.run import Precision
from spikingbrain_train.planning.fit import Fit, device_memory
from spikingbrain_train.planning.kernel_calls import (
    asked_for,
    experts_call,
    mixer_calls,
    rotary_calls,
    token_permutation_call,
    weight_gradients_call,
)
from spikingbrain_train.planning.launch import expects_gpu
from spikingbrain_train.planning.memory import GIB
from spikingbrain_train.planning.plan_report.section import Section
from spikingbrain_train.planning.planner import Plan
from spikingbrain_train.reporting.quantities import size
from spikingbrain_train.reporting.tables import facts

_PLATFORMS = {
    AcceleratorKind.cuda: "NVIDIA GPUs, collectives over NCCL",
    AcceleratorKind.metax: "MetaX GPUs, collectives over MCCL (which torch calls nccl)",
    AcceleratorKind.cpu: "CPUs, collectives over gloo",
}
_FIT_WORDS = {Fit.fits: "fits", Fit.tight: "is tight", Fit.too_large: "does not fit"}
_WORDS = {"parallel_linear": "linears"}
_COLLECTIVES = {
    AcceleratorKind.cuda: "nccl",
    AcceleratorKind.metax: "mccl",
    AcceleratorKind.cpu: "gloo",
}


def cluster_section(plan: Plan) -> Section:
    """The platform, and what will compute on it."""
    cluster = plan.config.cluster
    platform, kernels = _platform(cluster), expected_kernels(plan)
    memory = device_memory(cluster, plan.world_size)
    values: dict[str, Any] = {
        "accelerator": cluster.accelerator.value,
        "platform": platform.value,
        "collectives": _COLLECTIVES[platform],
        "timeout_minutes": cluster.timeout_minutes,
        "kernels": kernels,
        "memory_bytes": None if memory is None else memory.bytes,
        "peak_tflops": cluster.peak_tflops,
    }

    def text(width: int) -> list[str]:
        return facts(
            [
                ("cluster", _describe_platform(cluster, platform)),
                ("kernels", _describe_kernels(cluster, kernels)),
                ("device", _describe_device(plan)),
                ("memory", _describe_fit(plan)),
            ],
            width,
        )

    return Section("cluster", values, text)


def _platform(cluster: ClusterConfig) -> AcceleratorKind:
    if cluster.accelerator is not AcceleratorKind.auto:
        return cluster.accelerator
    return AcceleratorKind.cuda if expects_gpu(cluster) else AcceleratorKind.cpu


def _describe_platform(cluster: ClusterConfig, platform: AcceleratorKind) -> str:
    text = f"{cluster.accelerator.value}: {_PLATFORMS[platform]}"
    if cluster.accelerator is AcceleratorKind.auto:
        shows = "a GPU" if expects_gpu(cluster) else "no GPU"
        text += f", because this machine shows {shows} (for another machine choose cluster=...)"
    return f"{text}; one that waits longer than {cluster.timeout_minutes:g} minutes fails the run"


def expected_kernels(plan: Plan) -> dict[str, dict[str, list[str]]]:
    """What will compute the run where every optional package is installed.

    Returns:
        Setting of ``cluster.kernels`` -> backend -> what it computes, in words; none for linears and experts.
    """
    cluster = plan.config.cluster
    on_gpu, platform = expects_gpu(cluster), _platform(cluster)
    found: dict[str, dict[str, list[str]]] = {}
    for what, kind, call in mixer_calls(plan.config):
        if kind.backends is None:
            continue
        setting = kind.backends.setting
        name = kind.backends.expected(asked_for(cluster.kernels, setting), call, on_gpu=on_gpu)
        computed = found.setdefault(setting, {}).setdefault(name, [])
        if what not in computed:
            computed.append(what)
    linear = PARALLEL_LINEAR.expected(
        cluster.kernels.parallel_linear.value, LinearsCall(platform), on_gpu=on_gpu
    )
    found["parallel_linear"] = {linear: []}
    gradients = weight_gradients_call(plan.config, linear, platform)
    name = WEIGHT_GRADIENTS.expected(cluster.kernels.weight_gradients.value, gradients, on_gpu=on_gpu)
    found["weight_gradients"] = {name: []}
    if has_experts(plan.config.model):
        call = experts_call(plan.config, linear)
        found["experts"] = {EXPERTS.expected(cluster.kernels.experts.value, call, on_gpu=on_gpu): []}
        permutation = token_permutation_call(plan.config, platform)
        name = TOKEN_PERMUTATION.expected(cluster.kernels.token_permutation.value, permutation, on_gpu=on_gpu)
        found["token_permutation"] = {name: []}
    rotary = on_platform(cluster.kernels.rotary, platform)
    for what, turn in rotary_calls(plan.config):
        name = ROTARY.expected(rotary.value, turn, on_gpu=on_gpu)
        found.setdefault("rotary", {}).setdefault(name, []).append(what)
    order = [*TABLES, *found]
    return dict(sorted(found.items(), key=lambda choice: order.index(choice[0])))


def _describe_kernels(cluster: ClusterConfig, kernels: dict[str, dict[str, list[str]]]) -> str:
    parts, automatic = [], False
    for setting, choices in kernels.items():
        automatic = automatic or asked_for(cluster.kernels, setting) == AUTO
        names = [
            f"{name} ({', '.join(whats)})" if len(choices) > 1 and whats else name
            for name, whats in choices.items()
        ]
        parts.append(f"{_WORDS.get(setting, setting.replace('_', ' '))} {' and '.join(names)}")
    text = ", ".join(parts)
    if automatic and expects_gpu(cluster):
        text += "; where auto chooses, that is the best if every package is installed, and a run's log says "
        text += "what it found"
    return text


def _describe_device(plan: Plan) -> str:
    cluster = plan.config.cluster
    memory = device_memory(cluster, plan.world_size)
    if memory is None:
        parts = ["memory not stated: cluster.memory_gib=... says whether it fits"]
    elif cluster.memory_gib is None:
        parts = [f"memory is {memory.source}"]
    else:
        parts = [f"{memory.bytes / GIB:.1f} GiB"]
    if cluster.peak_tflops is not None:
        parts.append(f"peak {cluster.peak_tflops:g} TFLOP/s")
        if plan.config.precision is Precision.fp32 and expects_gpu(cluster):
            parts[-1] += " (the presets give that of bf16; precision=fp32 has a lower one)"
    elif expects_gpu(cluster):
        parts.append("peak not stated: cluster.peak_tflops=... gives hours")
    if expects_gpu(cluster) and (memory is None or cluster.peak_tflops is None):
        parts.append("cluster=a800, h100, h200 and c550 state both")
    return "; ".join(parts)


def _describe_fit(plan: Plan) -> str:
    device = device_memory(plan.config.cluster, plan.world_size)
    needed, where = plan.fullest.memory.total, plan.stages.index(plan.fullest)
    of_stage = f" (stage {where})" if len(plan.stages) > 1 else ""
    text = f"the fullest rank{of_stage} needs {size(needed)} by the estimate below"
    if device is None:
        return text
    fit = device.fit(needed)
    if fit is Fit.too_large:
        text += f", {size(needed - device.bytes)} more than there are"
    return f"{text}: it {_FIT_WORDS[fit]}"
