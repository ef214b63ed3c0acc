"""The calls of ops that a run will make, and whether the kernels that its config names can make them.

Pure Python: the start-up check asks before torch is imported, and the machine is asked about the same calls
when the run begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spikingbrain_train.architecture.backends.backend import AUTO
from spikingbrain_train.architecture.backends.linears import ExpertsCall
from spikingbrain_train.architecture.backends.rotary import RotaryCall
from spikingbrain_train.architecture.backends.tables import TABLES
from spikingbrain_train.architecture.backends.token_permutation import TokenPermutationCall
from spikingbrain_train.architecture.backends.weight_gradients import WeightGradientsCall
from spikingbrain_train.architecture.layers import dense_source, mixers_of, rotary_limit
from spikingbrain_train.architecture.linear_transforms import in_experts
from spikingbrain_train.architecture.mixers import MixerKind
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import AcceleratorKind, KernelConfig
from spikingbrain_train.config.require import require
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.planning.stages.registry import kind_of


def mixer_calls(config: RunConfig) -> Iterator[tuple[str, MixerKind, Any]]:
    """What the mixers of all ranks will ask of their ops, each call once.

    Returns:
        Whose call it is, in words, the kind of mixer, and the call as the table of its backends knows it.
    """
    seen = set()
    for whose, network, num_sink_tokens, are_padding in _networks(config):
        for kind in sorted(mixers_of(network), key=lambda kind: kind.name):
            apart = config.data.reset_at_documents or kind_of(config.stage).reads_examples
            for has_documents in (False, True) if apart else (False,):
                documents = " of several documents" if has_documents else ""
                for layout in _layouts(config, num_sink_tokens, are_padding):
                    call = kind.op_call(config, network, layout, has_documents)
                    if call is not None and (whose, kind, call) not in seen:
                        seen.add((whose, kind, call))
                        yield f"{whose}{kind.name}{documents}", kind, call


def _networks(config: RunConfig) -> Iterator[tuple[str, ModelConfig, int, bool]]:
    """Networks that run, the sinks in front of their text, and whether those are padding."""
    model, stage = config.model, kind_of(config.stage)
    yield "", model, model.num_sink_tokens, False
    if stage.reads_source:
        yield "", model, model.num_sink_tokens, True
    if stage.needs_teacher(config.stage):
        yield "the teacher's ", dense_source(model), model.num_sink_tokens, True


def _layouts(config: RunConfig, num_sink_tokens: int, are_padding: bool) -> Iterator[SequenceLayout]:
    ranks = config.parallel.context_parallel_size
    for rank in range(ranks):
        yield SequenceLayout(
            config.stage.seq_length, num_sink_tokens, rank, ranks, sinks_are_padding=are_padding
        )


def experts_call(config: RunConfig, parallel_linear: str) -> ExpertsCall:
    """What decides who multiplies the routed experts of a run, on linears of this backend."""
    model = config.model
    return ExpertsCall(
        parallel_linear,
        in_experts(model),
        config.precision,
        model.activation_func,
        in_fp8=config.fp8.format is not None,
    )


def rotary_calls(config: RunConfig) -> Iterator[tuple[str, RotaryCall]]:
    """What the mixers of all ranks will ask of who turns queries and keys, each call once, and in words."""
    if all(rotary_limit(network) is None for _, network, _, _ in _networks(config)):
        return
    yield "texts", RotaryCall(rows_differ=False)
    apart = config.data.reset_at_documents or kind_of(config.stage).reads_examples
    if apart and config.stage.micro_batch_size > 1:
        yield "rows of documents", RotaryCall(rows_differ=True)


def weight_gradients_call(
    config: RunConfig, parallel_linear: str, platform: AcceleratorKind
) -> WeightGradientsCall:
    """What decides who adds weight gradients of a run, on linears of this backend."""
    return WeightGradientsCall(parallel_linear, platform, config.parallel.engine)


def token_permutation_call(config: RunConfig, platform: AcceleratorKind) -> TokenPermutationCall:
    """What decides who sorts the tokens of a run by experts."""
    return TokenPermutationCall(platform, config.parallel.replicate_expert_load is not None)


def check_kernels(config: RunConfig) -> None:
    """Kernels that are asked for by name against what the network needs of them, and the platform.

    Raises:
        ConfigurationError: one cannot do what it is asked for, on any machine or on this platform.
    """
    kernels = config.cluster.kernels
    calls = [(kind.backends, call) for _, kind, call in mixer_calls(config) if kind.backends is not None]
    calls += [(TABLES["rotary"], call) for _, call in rotary_calls(config)]
    linear, platform = kernels.parallel_linear.value, config.cluster.accelerator
    calls.append((TABLES["experts"], experts_call(config, linear)))
    calls.append((TABLES["weight_gradients"], weight_gradients_call(config, linear, platform)))
    calls.append((TABLES["token_permutation"], token_permutation_call(config, platform)))
    for table, call in calls:
        name = asked_for(kernels, table.setting)
        limit = table.limit(name, call)
        sentence = f"cluster.kernels.{table.setting}={name} {limit}; choose auto, which takes it where it can"
        require(limit is None, sentence)
    if config.cluster.accelerator is not AcceleratorKind.cpu:
        return
    for table in TABLES.values():
        name = asked_for(kernels, table.setting)
        require(
            name in table.names_on_cpu,
            f"cluster.kernels.{table.setting}={name} runs on GPUs only, but cluster.accelerator is cpu; "
            f"on the CPU choose {' or '.join(table.names_on_cpu)}",
        )


def asked_for(kernels: KernelConfig, setting: str) -> str:
    """What ``cluster.kernels.<setting>`` says: a name, or ``auto`` where a plugin's op has none."""
    choice = getattr(kernels, setting, None)
    return AUTO if choice is None else str(choice.value)
