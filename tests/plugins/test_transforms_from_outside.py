"""A transform that only a plug-in knows (weights rounded to multiples of a step), alone and behind spikes.

The reference is a model of plain linears whose parameters were rounded beforehand: since rounding is
straight-through, its gradients are those of the transformed one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from spikingbrain_train.architecture.backends.linears import EXPERTS, ExpertsCall
from spikingbrain_train.architecture.layers import layers, model_weights
from spikingbrain_train.architecture.linear_transforms import in_experts, without_transforms
from spikingbrain_train.architecture.model_checks import check_model
from spikingbrain_train.config.linear_transforms import GateEncoding, Projection, SpikingConfig
from spikingbrain_train.config.model import ModelConfig, MoEConfig
from spikingbrain_train.config.parallel import KernelConfig, ParallelConfig, ParallelLinearBackend, Recompute
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.config.sections import with_sections
from spikingbrain_train.planning.activations import layer_activations, layer_weight_copies
from spikingbrain_train.planning.plan_report.report import render
from spikingbrain_train.planning.planner import plan_run
from tests.distributed.gradients import CASES, Case, assemble, loss_and_gradients
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import MODEL, run_config
from tests.planning import test_activations

if TYPE_CHECKING:
    from spikingbrain_train.parallel.process_groups import ProcessGroups

pytestmark = pytest.mark.usefixtures("plugins")

STEP = 0.5
TOLERANCE = 1e-5
EVERYWHERE = list(Projection)
PLAIN = replace(
    CASES["7B-like, packed documents"].model,
    num_layers=2,
    mixers=["gla", "swa"],
    feed_forwards=["moe", "dense"],
    moe=MoEConfig(num_experts=4, router_topk=2, num_shared_experts=1),
)
SPIKES = SpikingConfig(EVERYWHERE, GateEncoding.each_matrix, k=3.0)

SPLITS = {
    "TP 2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "TP 2 + sequence parallel": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "TP 2 + sequence parallel, whole experts": (
        2,
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=1),
    ),
    "PP 2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "EP 2": (2, ParallelConfig(expert_model_parallel_size=2)),
}


def with_rounding(model: ModelConfig, projections: list[Projection], step: float = 0.5) -> ModelConfig:
    """``model`` with rounded weights; the plug-in has to be there."""
    from tests.plugins.rounding import RoundingConfig

    settings: dict[str, Any] = {**vars(model), "rounding": RoundingConfig(projections, step)}
    return with_sections(ModelConfig)(**settings)


def gradients(
    groups: ProcessGroups, model: ModelConfig, parallel: ParallelConfig, rounded: bool = False
) -> tuple[float, list[Any]]:
    """Loss and gradients, read from ``main_grad`` of megatron-core's DDP after several micro-batches."""
    return loss_and_gradients(groups, Case(model), parallel, round_projections if rounded else nothing)


def nothing(model: torch.nn.Module) -> None:
    """Leave the weights as they are."""


def round_projections(model: torch.nn.Module) -> None:
    """Round whole weights of everything that projects."""
    from tests.plugins.rounding_module import naively_rounded

    for name, parameter in model.named_parameters():
        if ".linear_" in name and name.endswith("weight"):
            step = STEP * parameter.double().abs().mean()
            parameter.copy_(naively_rounded(parameter, step))


@pytest.mark.parametrize("spiking", [SpikingConfig(), SPIKES], ids=["alone", "behind spikes"])
def test_gradients_are_those_of_a_plain_model_with_rounded_weights(
    spiking: SpikingConfig, ranks: RankPool
) -> None:
    plain = replace(PLAIN, spiking=spiking)
    one = ParallelConfig()
    ((loss, found),) = ranks.run(
        gradients, with_rounding(plain, EVERYWHERE, STEP), one, world_size=1, parallel=one
    )
    ((expected_loss, expected),) = ranks.run(gradients, plain, one, True, world_size=1, parallel=one)
    ((other_loss, _),) = ranks.run(gradients, plain, one, world_size=1, parallel=one)
    assert loss == expected_loss != other_loss
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.key == theirs.key and torch.equal(ours.value, theirs.value), ours.key
        assert theirs.value.abs().max() > 0, f"{theirs.key} has no gradient to compare"


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_model_rounds_whole_weights(name: str, ranks: RankPool) -> None:
    world_size, parallel = SPLITS[name]
    has_experts = parallel.tensor_model_parallel_size == 1 or parallel.sequence_parallel
    plain = PLAIN if has_experts else replace(PLAIN, feed_forwards=["dense"])
    one = ParallelConfig()
    ((expected_loss, shards),) = ranks.run(gradients, plain, one, True, world_size=1, parallel=one)
    expected = assemble([shards])
    results = ranks.run(
        gradients, with_rounding(plain, EVERYWHERE, STEP), parallel, world_size=world_size, parallel=parallel
    )
    found = assemble([shards for _, shards in results])
    assert results[0][0] == pytest.approx(expected_loss, rel=TOLERANCE)
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert (gradient - expected[key]).abs().max() <= TOLERANCE * expected[key].abs().max(), key


def composed(groups: ProcessGroups, parallel: ParallelConfig) -> tuple[Tensor, ...]:
    """Output and gradients of a column- and a row-parallel linear that read spikes and round weights."""
    from spikingbrain_train.models.linears.parallel_linears import ParallelLinears
    from spikingbrain_train.models.transformer_config import transformer_config

    model = with_rounding(replace(MODEL, spiking=SPIKES), EVERYWHERE, STEP)
    config = transformer_config(MODEL, parallel, Precision.fp32, on_cpu=True)
    linears = ParallelLinears(ParallelLinearBackend.megatron, model)
    kwargs: dict[str, Any] = {"config": config, "init_method": torch.nn.init.zeros_, "bias": False}
    column = linears.column(Projection.mlp_fc1)(24, 64, gather_output=False, **kwargs)
    row = linears.row(Projection.mlp_fc2)(64, 24, input_is_parallel=True, skip_bias_add=False, **kwargs)
    assert list(column.transforms) == ["spiking", "rounding"]
    fc1, fc2, x, grad = mlp_tensors()
    tp = groups.collection.tp
    with torch.no_grad():
        column.weight.copy_(fc1.chunk(tp.size(), dim=0)[tp.rank()])
        row.weight.copy_(fc2.chunk(tp.size(), dim=1)[tp.rank()])
    x.requires_grad_()
    output, _ = row(torch.nn.functional.silu(column(x)[0]))
    leaves = (column.weight, row.weight, x)
    assert all(isinstance(leaf, torch.nn.Parameter) for leaf in leaves[:2])
    return (output.detach(), *torch.autograd.grad(output, leaves, grad))


def mlp_tensors() -> tuple[Tensor, ...]:
    """Two weights, input and output gradient."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((64, 24), (24, 64), (12, 2, 24), (12, 2, 24))
    fc1, fc2, x, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    return fc1 * 24**-0.5, fc2 * 64**-0.5, x, grad


@pytest.mark.parametrize("degree", [1, 2])
def test_linears_compose_spikes_and_rounding(degree: int, ranks: RankPool) -> None:
    from spikingbrain_train.ops.spike_encoding import naive_spike_encoding
    from tests.plugins.rounding_module import naively_rounded

    fc1, fc2, x, grad = mlp_tensors()
    leaves = [
        naively_rounded(weight, STEP * weight.double().abs().mean()).double().requires_grad_()
        for weight in (fc1, fc2)
    ] + [x.double().requires_grad_()]
    hidden = torch.nn.functional.silu(naive_spike_encoding(leaves[2], 3.0) @ leaves[0].T)
    output = naive_spike_encoding(hidden, 3.0) @ leaves[1].T
    expected = (output.detach(), *torch.autograd.grad(output, leaves, grad.double()))

    parallel = ParallelConfig(tensor_model_parallel_size=degree)
    results = ranks.run(composed, parallel, world_size=degree, parallel=parallel)
    outputs, fc1_grads, fc2_grads, x_grads = zip(*results, strict=True)
    found = (outputs[0], torch.cat(fc1_grads), torch.cat(fc2_grads, dim=1), x_grads[0])
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def grouped(groups: ProcessGroups, parallel: ParallelConfig) -> tuple[list[Tensor], bool]:
    """What a stand-in for Transformer Engine's grouped linear multiplies by, and whether it accumulates."""
    from spikingbrain_train.models.linears.parallel_linears import ParallelLinears
    from spikingbrain_train.models.transformer_config import transformer_config

    tp = groups.collection.expt_tp

    class GroupedLinear(torch.nn.Module):
        def __init__(self, num_gemms: int, *, config: Any, is_expert: bool) -> None:
            super().__init__()
            self.tp_group, self._tp_group = None, tp
            self.fuse_wgrad_accumulation = config.gradient_accumulation_fusion
            for index, whole in enumerate(mlp_tensors()[:2]):
                part = whole.reshape(64, 24).chunk(tp.size())[tp.rank()]
                self.register_parameter(f"weight{index}", torch.nn.Parameter(part.clone()))

        def forward(self, x: Tensor, m_splits: list[int]) -> list[Tensor]:
            return [getattr(self, f"weight{index}") for index in range(2)]

    config = transformer_config(MODEL, parallel, Precision.fp32, on_cpu=True)
    linears = ParallelLinears(ParallelLinearBackend.megatron, with_rounding(MODEL, EVERYWHERE, STEP))
    made = linears.transformed(Projection.mlp_fc1, GroupedLinear, weight_split_axis=0)
    linear = made(2, config=config, is_expert=True)
    multiplied = linear(torch.zeros(3, 24), [1, 2])
    assert not any(isinstance(weight, torch.nn.Parameter) for weight in multiplied)
    assert linear.weight0 is dict(linear.named_parameters())["weight0"], "the parameter is back"
    return [weight.detach() for weight in multiplied], linear.fuse_wgrad_accumulation


def test_grouped_linears_round_each_experts_weight_over_its_group(ranks: RankPool) -> None:
    from tests.plugins.rounding_module import naively_rounded

    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    results = ranks.run(grouped, parallel, world_size=2, parallel=parallel)
    assert not any(accumulates for _, accumulates in results), "gradients would pass the transform by"
    for index, whole in enumerate(mlp_tensors()[:2]):
        weight = whole.reshape(64, 24)
        expected = naively_rounded(weight, STEP * weight.double().abs().mean())
        assert torch.equal(torch.cat([weights[index] for weights, _ in results]), expected)


def stored_names(groups: ProcessGroups, model: ModelConfig) -> tuple[list[str], list[str]]:
    """Names of a model's state, and of its sharded state."""
    from spikingbrain_train.models.gpt_model import build_model
    from spikingbrain_train.models.kernels import resolve_kernels
    from spikingbrain_train.models.transformer_config import transformer_config

    config = transformer_config(model, ParallelConfig(), Precision.fp32, on_cpu=True)
    kernels = resolve_kernels(KernelConfig(), groups.accelerator, model=model)
    built = build_model(model, config, kernels, groups.device)
    return list(built.state_dict()), list(built.sharded_state_dict())


def test_checkpoints_have_the_names_of_plain_linears(ranks: RankPool) -> None:
    one = ParallelConfig()
    rounded = with_rounding(replace(PLAIN, spiking=SPIKES), EVERYWHERE)
    (found,) = ranks.run(stored_names, rounded, world_size=1, parallel=one)
    (expected,) = ranks.run(stored_names, PLAIN, world_size=1, parallel=one)
    assert found == expected


def test_a_plan_tells_of_it_and_its_teacher_is_without() -> None:
    model = with_rounding(replace(MODEL, spiking=SPIKES), [Projection.mlp_fc1, Projection.qkv])
    check_model(model)
    run = with_sections(RunConfig)(**vars(run_config(Path("unused"), Path("unused"), model=model)))
    lines = render(plan_run(run, 1)).splitlines()
    spikes = next(number for number, line in enumerate(lines) if "spikes with k 3 in front of" in line)
    assert lines[spikes + 1].strip() == "weights of mlp_fc1, qkv rounded"
    assert without_transforms(model) == with_rounding(MODEL, [])


@pytest.mark.parametrize("level", [Recompute.none, Recompute.moe_activation, Recompute.moe_feed_forward])
def test_copies_of_weights_are_planned(level: Recompute, ranks: RankPool) -> None:
    plain = replace(
        test_activations.EXPERTS, num_layers=2, mixers=["gla", "swa"], feed_forwards=["dense", "moe"]
    )
    case = test_activations.Case(with_rounding(plain, EVERYWHERE), recompute=level)
    ((held,),) = ranks.run(test_activations._kept_by_layers, [case], world_size=1, parallel=ParallelConfig())
    config = case.config()
    copies = [layer_weight_copies(config, layer) for layer in layers(case.model)]
    tokens = test_activations.LENGTH
    planned = [
        layer_activations(config, layer).kept + copy.kept / tokens
        for layer, copy in zip(layers(case.model), copies, strict=True)
    ]
    test_activations._assert_close(held, planned)
    if level is Recompute.none:
        projections = [weight for _, weight in model_weights(case.model) if weight.projection is not None]
        assert sum(copy.kept for copy in copies) == 2 * sum(weight.numel for weight in projections)


def test_experts_without_linears_are_refused_by_its_setting() -> None:
    model = with_rounding(replace(PLAIN, spiking=SpikingConfig([Projection.qkv])), [Projection.mlp_fc2])
    (words,) = in_experts(model)
    limit = EXPERTS.limit("grouped_gemm", ExpertsCall("megatron", (words,)))
    assert limit == "cannot do what model.rounding asks for inside experts (mlp_fc2)"
