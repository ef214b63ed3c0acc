"""Builds one rank's share of a run without memory for it, to see that the plan is what the modules are.

The parameters are tensors on torch's meta device, and the process groups talk to nobody: torch's "fake"
process group, in a world with as few data-parallel replicas as the degrees allow, since they change no shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

# torch has no other place for it; importing the module registers the backend.
from torch.testing._internal.distributed.fake_pg import FakeStore

from spikingbrain_train.architecture.layers import Layer, feed_forwards_of
from spikingbrain_train.config.parallel import AcceleratorKind, KernelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.models.kernels import resolve_kernels
from spikingbrain_train.parallel.process_groups import destroy, form_groups
from spikingbrain_train.planning.costs import active_parameters, total_parameters
from spikingbrain_train.planning.memory import MemoryEstimate
from spikingbrain_train.planning.plan_report.layers import alike, layer_rows
from spikingbrain_train.planning.planner import Plan, smallest_stage
from spikingbrain_train.planning.precision import PrecisionChoice
from spikingbrain_train.reporting.quantities import quantity, size
from spikingbrain_train.reporting.tables import facts, table, terminal_width
from spikingbrain_train.runtime import megatron_versions, patches
from spikingbrain_train.runtime.accelerator import detect
from spikingbrain_train.runtime.bf16 import choose_precision
from spikingbrain_train.runtime.meta_device import without_all_reduce
from spikingbrain_train.training.callbacks.named import check_named_classes


@dataclass(frozen=True)
class BuiltLayer:
    """A decoder layer as it was built."""

    layer: int
    """0-based, over the whole model."""
    kind: Layer
    """What it was planned to be, and is."""
    mixer_parameters: int
    feed_forward_parameters: int
    parameters: int
    """Both and the norms in front of them."""


@dataclass(frozen=True)
class RankShare:
    """What one rank of a run holds. ``print(share.render())`` shows it."""

    plan: Plan
    rank: int
    group_ranks: dict[str, int]
    """The rank within its group of every kind of parallelism, from 0."""
    parameters: int
    layers: list[BuiltLayer]
    otherwise: PrecisionChoice | None = None
    """What torch makes of ``precision=auto`` on this machine, where that is not what the plan expected."""

    @property
    def memory(self) -> MemoryEstimate:
        """Bytes on this rank."""
        return self.plan.stages[self.group_ranks["pipeline"]].memory

    def render(self, width: int | None = None) -> str:
        """The share as text of so many columns, by default the terminal's."""
        model, parallel = self.plan.config.model, self.plan.config.parallel
        group_ranks = ", ".join(f"{kind} {group_rank}" for kind, group_rank in self.group_ranks.items())
        parts = ", ".join(f"{name} {size(part)}" for name, part in vars(self.memory).items() if part > 0)
        rows = [
            ("rank", f"{self.rank} of {self.plan.world_size}: {group_ranks} (counted from 0)"),
            ("parameters", f"{self.parameters:,} built on this rank, as planned"),
            (
                "active",
                f"{quantity(active_parameters(model))} of the model's {quantity(total_parameters(model))} "
                f"for each token, vocabulary included",
            ),
            ("memory", f"{size(self.memory.total)}: {parts}"),
        ]
        if self.otherwise is not None:
            rows.append(("warning", f"a run here would have {self.otherwise.describe()}, unlike the plan"))
        if any(layer.kind.feed_forward.routes_tokens for layer in self.layers):
            number = max(kind.num_experts(model) for kind in feed_forwards_of(model))
            held = number // parallel.expert_model_parallel_size
            first = self.group_ranks["expert"] * held
            rows.append(("experts", f"{first} to {first + held - 1} of each layer's {number}"))
        lines = [*facts(rows, width or terminal_width()), "", "parameters of this rank's layers (each)"]
        return "\n".join([*lines, *table(self._layer_rows(), left=4)])

    def _layer_rows(self) -> list[list[str]]:
        """Layers that were built alike in one row."""
        rows = [["layers", "number", "mixer", "feed-forward", "of mixer", "of feed-forward", "in all"]]
        keys = [
            (
                layer.kind.mixer_name,
                layer.kind.feed_forward.name,
                layer.mixer_parameters,
                layer.feed_forward_parameters,
                layer.parameters,
            )
            for layer in self.layers
        ]
        for (mixer, feed_forward, *parameters), numbers in alike(
            keys, (layer.layer for layer in self.layers)
        ).items():
            cells = [mixer, feed_forward, *(f"{number:,}" for number in parameters)]
            rows += layer_rows(numbers, cells)
        return rows


def _group_ranks(plan: Plan, rank: int) -> dict[str, int]:
    """What ``rank`` is in each of its groups.

    In megatron-core's order: tensor, context, data, pipeline; the same ranks of a pipeline stage once more as
    expert tensor, expert, expert data.
    """
    parallel = plan.config.parallel
    pipeline, in_stage = divmod(rank, plan.world_size // parallel.pipeline_model_parallel_size)
    replica, in_replica = divmod(
        in_stage, parallel.tensor_model_parallel_size * parallel.context_parallel_size
    )
    context, tensor = divmod(in_replica, parallel.tensor_model_parallel_size)
    expert, expert_tensor = divmod(in_stage, parallel.expert_tensor_size)
    return {
        "data": replica,
        "tensor": tensor,
        "pipeline": pipeline,
        "context": context,
        "expert": expert % parallel.expert_model_parallel_size,
        "expert tensor": expert_tensor,
    }


@contextmanager
def _reduced_world(plan: Plan, rank: int) -> Iterator[None]:
    """Process groups as ``rank`` has them, with as few replicas as the degrees allow."""
    parallel = plan.config.parallel
    pipeline, in_stage = divmod(rank, plan.world_size // parallel.pipeline_model_parallel_size)
    # Every degree but data parallelism divides the reduced stage: the remainder keeps the rank in its groups.
    stage_ranks = smallest_stage(parallel)
    try:
        torch.distributed.init_process_group(
            "fake",
            store=FakeStore(),
            rank=pipeline * stage_ranks + in_stage % stage_ranks,
            world_size=parallel.pipeline_model_parallel_size * stage_ranks,
        )
        form_groups(parallel, timeout_minutes=plan.config.cluster.timeout_minutes)
        yield
    finally:
        destroy()


def build_share(plan: Plan) -> RankShare:
    """Build what rank ``dry_run_rank`` of the planned run would hold.

    Call it in a process that has joined no world. The host's kernels stand in for those of the config: no
    shape depends on them.

    Raises:
        ConfigurationError: a class that the config names is not there.
        RuntimeError: the modules are not what the plan says, which is a mistake of this project.
    """
    config, rank = plan.config, plan.config.dry_run_rank
    check_named_classes(config)
    megatron_versions.check_version()
    host = detect(AcceleratorKind.cpu)
    patches.apply(host)
    from spikingbrain_train.models.gpt_model import build_model
    from spikingbrain_train.models.transformer_config import transformer_config

    group_ranks = _group_ranks(plan, rank)
    with _reduced_world(plan, rank), without_all_reduce():
        megatron_config = transformer_config(
            config.model, config.parallel, config.precision, on_cpu=True, initialize=False
        )
        kernels = resolve_kernels(KernelConfig(), host)
        model = build_model(config.model, megatron_config, kernels, torch.device("meta"))
    stage = plan.stages[group_ranks["pipeline"]]
    pairs = zip(model.layers, stage.kinds, strict=True)
    built = [_describe(layer, kind, config) for layer, kind in pairs]
    share = RankShare(plan, rank, group_ranks, _count(model), built, _other_precision(plan))
    if share.parameters != stage.parameters:
        raise RuntimeError(
            f"rank {rank} was built with {share.parameters:,} parameters, but planned with "
            f"{stage.parameters:,}; architecture/ does not describe the modules"
        )
    return share


def _other_precision(plan: Plan) -> PrecisionChoice | None:
    """torch's choice of the precision if it differs from the plan's; None for a plan of another machine."""
    kind = plan.config.cluster.accelerator
    if not plan.precision.assumed or kind not in (AcceleratorKind.cpu, AcceleratorKind.auto):
        return None
    choice = choose_precision(detect(kind))
    return None if choice.precision is plan.precision.precision else choice


def _describe(layer: Any, kind: Layer, config: RunConfig) -> BuiltLayer:
    """What a megatron-core TransformerLayer holds, held against the weights that its kinds describe.

    Raises:
        RuntimeError: they are not the same.
    """
    model, parallel, number = config.model, config.parallel, layer.layer_number - 1
    sizes = {name: weight.numel() for name, weight in _weights(layer.self_attention)}
    planned = {
        weight.name.removeprefix("self_attention."): weight.numel_on_rank(parallel)
        for weight in kind.mixer_weights(model)
    }
    if sizes != planned:
        raise RuntimeError(
            f"the mixer of layer {number} was built with {sizes}, but {kind.mixer_name} is described with "
            f"{planned}"
        )
    feed_forward = sum(weight.numel_on_rank(parallel) for weight in kind.feed_forward_weights(model))
    if _count(layer.mlp) != feed_forward:
        raise RuntimeError(
            f"the feed-forward of layer {number} was built with {_count(layer.mlp):,} parameters, but "
            f"{kind.feed_forward.name} is described with {feed_forward:,}"
        )
    return BuiltLayer(number, kind, sum(sizes.values()), feed_forward, _count(layer))


def _count(module: torch.nn.Module) -> int:
    return sum(weight.numel() for _, weight in _weights(module))


def _weights(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and the buffers that are stored with them."""
    yield from module.named_parameters()
    for name, owner in module.named_modules():
        for buffer, tensor in owner.named_buffers(prefix=name, recurse=False):
            if buffer.rpartition(".")[2] not in owner._non_persistent_buffers_set:
                yield buffer, tensor
