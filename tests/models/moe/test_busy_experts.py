"""Experts with many tokens compute again: nothing changes but what a step of unbalanced experts keeps.

Gradients are equal bit for bit where every expert is a product of its own. Where experts share a product, a
weight's gradient is a sum of two, one of which is zero: the same bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.config.lora import LoraConfig
from spikingbrain_train.config.model import MoEConfig
from spikingbrain_train.config.parallel import ParallelConfig, Recompute
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.activations import layer_activations
from tests.distributed.gradients import CASES, Case
from tests.distributed.pool import RankPool
from tests.distributed.test_gradients import assert_equal, result
from tests.models.kept_bytes import kept_bytes
from tests.models.moe.small_layer import EXPERTS, HIDDEN, build_layer, gradients, inputs, model_config
from tests.planning.live_bytes import LiveBytes

LENGTH, BATCH, WIDTH = 64, 4, 12
TOKENS = LENGTH * BATCH
ONE_RANK = ParallelConfig()
FEW = 40
"""Of 256 tokens of an even load: what the busy experts of these tests exceed and the others do not."""


def _unbalanced(groups: ProcessGroups, parallel: ParallelConfig, moe: MoEConfig | None = None) -> Any:
    """A layer whose first expert gets three quarters of all tokens, the second most of the others."""
    layer = build_layer(groups, moe or MoEConfig(router_topk=1, aux_loss_coeff=0.5), parallel)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, 0] = torch.tensor([3.0, 1.0, -1.0, -3.0])
    return layer


def _inputs() -> tuple[Tensor, Tensor]:
    hidden, direction = inputs(LENGTH, BATCH)
    hidden[..., 0] = torch.where(torch.arange(TOKENS).view(LENGTH, BATCH) % 4 < 3, 1.0, -1.0)
    return hidden, direction


def _of_layer(
    groups: ProcessGroups, parallel: ParallelConfig
) -> tuple[Tensor, dict[str, Tensor], list[float]]:
    layer = _unbalanced(groups, parallel)
    output, grads = gradients(layer, *_inputs())
    return output, grads, layer.router.statistics_sums.tolist()


SPLITS = {
    "one rank": (1, ONE_RANK),
    "EP 2": (2, ParallelConfig(expert_model_parallel_size=2)),
    "TP 2": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
}


@pytest.mark.parametrize("level", [Recompute.none, Recompute.moe_activation], ids=lambda level: level.name)
@pytest.mark.parametrize("name", SPLITS)
def test_gradients_and_router_statistics_do_not_change(name: str, level: Recompute, ranks: RankPool) -> None:
    size, parallel = SPLITS[name]
    busy = replace(parallel, recompute=level, recompute_expert_tokens=FEW)
    kept = ranks.run(_of_layer, parallel, world_size=size, parallel=parallel)
    again = ranks.run(_of_layer, busy, world_size=size, parallel=busy)
    for (output, grads, counted), (expected_output, expected, statistics) in zip(again, kept, strict=True):
        assert torch.equal(output, expected_output)
        assert all(torch.equal(grads[name], expected[name]) for name in expected)
        assert counted == statistics


def _kept_of_layer(groups: ProcessGroups, most: int | None, balanced: bool) -> int:
    layer = _unbalanced(groups, replace(ONE_RANK, recompute_expert_tokens=most))
    hidden, direction = _inputs()
    hidden = hidden.clone()
    if balanced:  # as many tokens to each of the two first experts
        hidden[..., 0] = torch.where(torch.arange(TOKENS).view(LENGTH, BATCH) % 2 < 1, 1.0, -1.0)
    kept: list[int] = []
    with kept_bytes(layer, kept):
        output, _ = layer(hidden.requires_grad_())
    output.backward(direction)
    return kept[0]


def test_only_busy_experts_keep_less(ranks: RankPool) -> None:
    """torch's checkpoint hands nothing to hooks outside of it: what is seen is what experts keep."""

    def kept(most: int | None, balanced: bool = False) -> int:
        return ranks.run(_kept_of_layer, most, balanced, world_size=1, parallel=ONE_RANK)[0]

    everything = kept(None)
    assert kept(TOKENS) == everything  # no expert has more
    gate_up_product = TOKENS * 3 // 4 * 3 * WIDTH * 4  # of one expert
    assert everything - kept(TOKENS // 2) >= gate_up_product
    assert kept(TOKENS // 2, balanced=True) == kept(None, balanced=True)  # two of exactly so many


def _memory_of_layers(groups: ProcessGroups, most: int | None) -> tuple[int, int]:
    """Live bytes behind the forward pass of eight layers, and at most until the end of the backward pass."""
    stack = [_unbalanced(groups, replace(ONE_RANK, recompute_expert_tokens=most)) for _ in range(8)]
    for module in (each for layer in stack for each in layer.modules() if hasattr(each, "config")):
        module.config.bias_activation_fusion = True  # as on GPUs
    hidden, direction = _inputs()
    memory = LiveBytes()
    with memory, torch.compiler.set_stance("force_eager"):
        output = hidden.clone().requires_grad_()
        for layer in stack:
            output = output + 0.01 * layer(output)[0]
        between = memory.live
        output.backward(direction)
    return between, memory.peak


def test_an_unbalanced_step_takes_less_memory(ranks: RankPool) -> None:
    """Allocated bytes, by torch's dispatcher, of eight layers whose experts with tokens are all busy.

    Behind the forward pass gate, up and product of all of them are not there, as it is planned; 3 % are for
    numbers of tokens and other small change. The backward pass has those of one expert at a time.
    """
    (between, peak) = ranks.run(_memory_of_layers, None, world_size=1, parallel=ONE_RANK)[0]
    (between_with, peak_with) = ranks.run(_memory_of_layers, FEW, world_size=1, parallel=ONE_RANK)[0]
    planned = [
        TOKENS * layer_activations(_run(most), layers(_run(most).model)[0]).kept for most in (None, FEW)
    ]
    assert planned[0] - planned[1] == TOKENS * 3 * WIDTH * 4
    assert between - between_with == pytest.approx(8 * (planned[0] - planned[1]), rel=0.03)
    assert peak - peak_with >= 7 * (planned[0] - planned[1])


def _run(most: int | None) -> RunConfig:
    return RunConfig(
        model=model_config(MoEConfig(router_topk=1)),
        parallel=replace(ONE_RANK, recompute_expert_tokens=most),
        precision=Precision.fp32,
        stage=StageConfig(seq_length=LENGTH, micro_batch_size=BATCH, global_batch_size=BATCH, train_iters=1),
        output_dir="run",
    )


MODELS = {
    name: CASES[name]
    for name in (
        "ReLU, experts, L1",
        "ternary experts, INT8 inputs, spikes",
        "adapters of experts, one frozen",
        "76B-like, packed documents",
    )
}
TOPOLOGIES = {
    "one rank": ONE_RANK,
    "EP 2": ParallelConfig(expert_model_parallel_size=2),
    "PP 2 x EP 2": ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2),
    "TP 2 + SP": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_models_with_transforms_have_the_same_loss_and_gradients(
    name: str, topology: str, ranks: RankPool
) -> None:
    parallel = TOPOLOGIES[topology]
    busy = replace(parallel, recompute_expert_tokens=20)
    assert_equal(result(ranks, MODELS[name], busy), result(ranks, MODELS[name], parallel))


def test_a_dropped_input_of_an_adapter_is_drawn_again(ranks: RankPool) -> None:
    """On one rank, where nothing else can differ: the model-parallel generator goes back for it."""
    model = replace(CASES["adapters of experts, one frozen"].model)
    model = replace(model, lora=LoraConfig(names=["one"], ranks=[4], dropout=0.5))
    every = replace(ONE_RANK, recompute_expert_tokens=1)
    assert_equal(result(ranks, Case(model), every), result(ranks, Case(model), ONE_RANK))


def _counted(groups: ProcessGroups, most: int | None) -> list[list[float]]:
    """What activations and spikes have counted in a forward and a backward pass."""
    from spikingbrain_train.models.feed_forwards.gated_activation import activations_in
    from spikingbrain_train.models.linears.whole_model import collect_statistics
    from tests.distributed.gradients import model_of_known_weights

    parallel = replace(ONE_RANK, recompute_expert_tokens=most)
    counted = []
    for name in ("ReLU, experts, L1", "ternary experts, INT8 inputs, spikes"):
        case = CASES[name]
        model = model_of_known_weights(groups, case.model, parallel, case.dtype).train()
        for activation in activations_in(model):
            activation.l1_factor = case.l1_factor
            activation.reset(is_counting=True)
        tokens = torch.arange(48).unsqueeze(0) % case.model.vocab_size
        with collect_statistics(model, case.model, groups.device, None) as found:
            loss, _ = model(tokens, tokens)
            loss.sum().backward()
        counted += [[*each.counts.tolist(), each.sums.item()] for each in activations_in(model)]
        counted += [each.counts.flatten().tolist() for of_layers in found.values() for each in of_layers]
    return counted


def test_nothing_is_counted_twice(ranks: RankPool) -> None:
    (once,) = ranks.run(_counted, None, world_size=1, parallel=ONE_RANK)
    (again,) = ranks.run(_counted, 1, world_size=1, parallel=ONE_RANK)
    assert any(sum(each) for each in once)
    assert again == once


class _Products:
    """Experts that share a product, as grouped GEMMs do: weights [experts, ...], whatever their tokens."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.w1 = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * WIDTH, generator=generator))
        self.w2 = torch.nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN, generator=generator))
        self.calls: list[tuple[list[int], bool]] = []
        self.activation_recompute = True

    def forward(self, hidden: Tensor, sizes: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        self.calls.append((sizes.tolist(), self.activation_recompute))
        expert = torch.repeat_interleave(torch.arange(EXPERTS), sizes)
        gate, up = torch.einsum("th,thf->tf", hidden, self.w1[expert]).chunk(2, -1)
        product = torch.nn.functional.silu(gate) * up * probs.unsqueeze(-1)
        return torch.einsum("tf,tfh->th", product, self.w2[expert]), None


def _grouped(most: int | None, sizes: list[int]) -> tuple[list[Tensor], list[Any], list[int]]:
    from types import SimpleNamespace

    from spikingbrain_train.models.feed_forwards.moe.experts import _RoutedExperts

    class Parts(_Products, torch.nn.Module):
        pass

    class Grouped(_RoutedExperts, Parts):
        pass

    experts: Any = Grouped().train()
    experts.config = SimpleNamespace(recompute=Recompute.none, most_expert_tokens=most)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(sum(sizes), HIDDEN, generator=generator).requires_grad_()
    probs = torch.rand(sum(sizes), generator=generator).requires_grad_()
    arrived: list[int] = []
    experts.w1.register_post_accumulate_grad_hook(lambda _: arrived.append(1))
    output, bias = experts(hidden, torch.tensor(sizes), probs)
    assert bias is None
    output.square().sum().backward()
    tensors = [output.detach(), hidden.grad, probs.grad, experts.w1.grad, experts.w2.grad]
    return tensors, experts.calls, arrived


@pytest.mark.parametrize("sizes", [[3, 9, 0, 8], [9, 8, 9, 8], [0, 9, 1, 0], [1, 2, 3, 0]], ids=str)
def test_grouped_experts_are_computed_in_two_groups(sizes: list[int]) -> None:
    expected, _, _ = _grouped(None, sizes)
    found, calls, arrived = _grouped(5, sizes)
    # float32; a product over other rows may be summed in another order.
    assert all(torch.allclose(x, y, rtol=1e-6, atol=1e-5) for x, y in zip(found, expected, strict=True))
    busy, few = [size * (size > 5) for size in sizes], [size * (size <= 5) for size in sizes]
    once = [(few, True)] if any(few) else []
    twice = [(busy, False)] * 2 if any(busy) else []
    assert sorted(calls) == sorted(once + twice)
    assert arrived == [1]  # data parallelism counts the gradients that arrive
