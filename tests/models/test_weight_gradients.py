"""Weight gradients that linears add to ``main_grad`` within their own product.

Apex is not here: megatron-core's linears call a product and an addition of torch in its place, which is held
to what the kernel asks for (csrc/megatron/fused_weight_gradient_dense_cuda.cu). What it proves is the rest:
that every gradient arrives once, whoever else has a part in it. What megatron-core returns instead of a
gradient is NaN here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from spikingbrain_train.config.parallel import (
    KernelConfig,
    ParallelConfig,
    Recompute,
    WeightGradientBackend,
)
from spikingbrain_train.config.run import OptimizerConfig, Precision
from tests.distributed.gradients import (
    CASES,
    SEQUENCES,
    Case,
    Shard,
    assemble,
    loss_and_gradients,
    model_of_known_weights,
)
from tests.distributed.pool import RankPool

if TYPE_CHECKING:
    from spikingbrain_train.models.gpt_model import HybridGPTModel
    from spikingbrain_train.parallel.process_groups import ProcessGroups

TOLERANCE = 1e-6
"""Of a tensor's largest gradient: both sums have the same terms in the same order."""


class Kernel:
    """In the place of Apex's fused_weight_gradient_mlp_cuda."""

    def __init__(self) -> None:
        self.products = 0

    def wgrad_gemm_accum_fp32(self, input: Tensor, d_output: Tensor, d_weight: Tensor) -> None:
        """Reads memory row by row, whatever strides say, and every tensor in the first one's dtype."""
        assert input.is_contiguous() and d_output.is_contiguous() and d_weight.is_contiguous()
        assert input.dtype == d_output.dtype and d_weight.dtype == torch.float32
        assert d_weight.shape == (d_output.shape[-1], input.shape[-1]) and len(input) == len(d_output)
        wide = torch.promote_types(input.dtype, torch.float32)
        d_weight += d_output.to(wide).t() @ input.to(wide)
        self.products += 1


@contextmanager
def apex() -> Iterator[Kernel]:
    from megatron.core.tensor_parallel import layers

    kernel = Kernel()
    torch.use_deterministic_algorithms(True)  # torch.empty is NaN
    try:
        with mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", kernel, create=True):
            yield kernel
    finally:
        torch.use_deterministic_algorithms(False)


def by_apex(model: HybridGPTModel) -> None:
    kernels = replace(model.kernels, weight_gradients=WeightGradientBackend.apex)
    for chunk in model.chunks:
        chunk.kernels = kernels


def within_products(
    groups: ProcessGroups, case: Case, parallel: ParallelConfig, fused: bool = True
) -> tuple[float, list[Shard], int, list[str]]:
    """Loss, gradients, how many products added their own, and in which linears; none where not ``fused``."""
    from spikingbrain_train.models import weight_gradients
    from spikingbrain_train.training import build

    names: list[str] = []

    def recorded(model: HybridGPTModel) -> list[str]:
        names.extend(weight_gradients.add_within_products(model))
        return names

    with apex() as kernel, mock.patch.object(build, "add_within_products", recorded):
        loss, shards = loss_and_gradients(groups, case, parallel, by_apex if fused else lambda _: None)
    return loss, shards, kernel.products, names


TIED = {"share_embeddings_and_output_weights": True}
DENSE, EXPERTS = CASES["7B-like, packed documents"], CASES["76B-like, packed documents"]
TP = ParallelConfig(tensor_model_parallel_size=2)
VIRTUAL = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
ONE = ParallelConfig()
PLACES: dict[str, tuple[Case, ParallelConfig]] = {
    "one rank": (DENSE, ONE),
    "one rank, tied": (replace(DENSE, model=replace(DENSE.model, **TIED)), ONE),
    "one rank, experts": (EXPERTS, ONE),
    "one rank, Mamba": (CASES["Mamba, norms and biases, sinks, packed documents"], ONE),
    "one rank, adapters of experts": (CASES["adapters of experts, one frozen"], ONE),
    "one rank, spikes": (CASES["spiking"], ONE),
    "one rank, ternary experts": (CASES["ternary experts, INT8 inputs, spikes"], ONE),
    "all computed again": (EXPERTS, ParallelConfig(recompute=Recompute.full)),
    "experts computed again": (EXPERTS, ParallelConfig(recompute=Recompute.moe_feed_forward)),
    "busy experts computed again": (EXPERTS, ParallelConfig(recompute_expert_tokens=20)),
    "TP 2, tied": (replace(DENSE, model=replace(DENSE.model, **TIED)), TP),
    "TP 2 + sequence parallel, experts": (EXPERTS, replace(TP, sequence_parallel=True)),
    "PP 2 of 2 virtual stages, tied": (replace(EXPERTS, model=replace(EXPERTS.model, **TIED)), VIRTUAL),
    "EP 2": (EXPERTS, ParallelConfig(expert_model_parallel_size=2)),
    "EP 2, replicated experts": (
        EXPERTS,
        ParallelConfig(expert_model_parallel_size=2, replicate_expert_load=1.1),
    ),
    "CP 2": (DENSE, ParallelConfig(context_parallel_size=2)),
}


def run(ranks: RankPool, function: Callable[..., Any], case: Case, parallel: ParallelConfig) -> list[Any]:
    size = max(parallel.model_parallel_size, parallel.expert_model_parallel_size)
    return ranks.run(function, case, parallel, world_size=size, parallel=parallel)


@pytest.mark.parametrize("name", PLACES)
def test_every_gradient_is_that_of_autograd(name: str, ranks: RankPool) -> None:
    case, parallel = PLACES[name]
    plain = run(ranks, loss_and_gradients, case, parallel)
    fused = run(ranks, within_products, case, parallel)
    assert [loss for loss, *_ in fused] == [loss for loss, _ in plain]
    expected, found = assemble([shards for _, shards in plain]), assemble([each[1] for each in fused])
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert (gradient - expected[key]).abs().max() <= TOLERANCE * expected[key].abs().max(), key
    linears = {linear for *_, names in fused for linear in names}
    adds = "adapters" not in name and "ternary" not in name  # there no weight is plain and trains
    assert bool(linears) == adds and all((products > 0) == adds for _, _, products, _ in fused)
    assert not any("output_layer" in linear for linear in linears)
    assert any("local_experts" in linear for linear in linears) == (
        adds and "moe" in case.model.feed_forwards and "replicated" not in name
    )


def test_bfloat16_gradients_are_added_unrounded(ranks: RankPool) -> None:
    """Each of the plain ones is rounded to 8 bits before it is added."""
    case = replace(DENSE, dtype=torch.bfloat16)
    ((_, plain, _, none),) = ranks.run(within_products, case, ONE, False, world_size=1, parallel=ONE)
    ((_, fused, _, names),) = ranks.run(within_products, case, ONE, world_size=1, parallel=ONE)
    assert names and not none
    expected, found = assemble([plain]), assemble([fused])
    changed = {key for key, value in found.items() if not torch.equal(value, expected[key])}
    assert changed and all(key.endswith("weight") and "linear" in key for key in changed)
    for key in changed:
        assert (found[key] - expected[key]).abs().max() <= 2**-8 * expected[key].abs().max(), key


def trained(
    groups: ProcessGroups, case: Case, parallel: ParallelConfig, fused: bool
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of three steps, and the weights behind them."""
    from spikingbrain_train.config.stage import StageConfig
    from spikingbrain_train.data.loader import local_micro_batch
    from spikingbrain_train.training.build import wrap_data_parallel
    from spikingbrain_train.training.current_weights import gather_updated_weights
    from spikingbrain_train.training.optimizer import build_optimizer, update_weights
    from spikingbrain_train.training.stages.pretraining import ContinualPretraining
    from tests.distributed.gradients import LENGTH, whole_batches

    model = model_of_known_weights(groups, case.model, parallel)
    text = LENGTH - case.model.num_sink_tokens
    settings = {"seq_length": text, "micro_batch_size": case.micro_batch, "train_iters": 3}
    stage = ContinualPretraining(StageConfig(global_batch_size=SEQUENCES, **settings), groups)
    losses = []
    with apex() as kernel:
        if fused:
            by_apex(model)
        wrapped = wrap_data_parallel(model, parallel)
        optimizer = build_optimizer(OptimizerConfig(lr=1e-2), parallel, Precision.fp32, wrapped)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        for _ in range(3):
            wrapped.zero_grad_buffer()
            optimizer.zero_grad()
            whole = whole_batches(case, text, groups.data_parallel_rank, groups.data_parallel_size)
            local = SimpleNamespace(
                num_sink_tokens=case.model.num_sink_tokens, context_parallel_rank=0, context_parallel_size=1
            )
            batches = (local_micro_batch(each, groups.device, **vars(local)) for each in whole)
            number = SEQUENCES // (case.micro_batch * groups.data_parallel_size)
            losses.append(stage.forward_backward(wrapped, batches, number).reduced()["train/loss"])
            update_weights(optimizer, lambda norm: None)
        assert (kernel.products > 0) == fused
    gather_updated_weights(wrapped)
    return losses, {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(use_distributed_optimizer=True),
        ParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
        ParallelConfig(use_distributed_optimizer=False, overlap_grad_reduce=True),
    ],
    ids=["distributed optimizer", "with overlap", "whole optimizer, overlapped reduction"],
)
def test_replicas_take_the_same_steps(parallel: ParallelConfig, ranks: RankPool) -> None:
    case = replace(EXPERTS, model=replace(EXPERTS.model, **TIED), micro_batch=1)
    of_two = [
        ranks.run(trained, case, parallel, fused, world_size=2, parallel=parallel) for fused in (False, True)
    ]
    for (losses, weights), (fused_losses, fused_weights) in zip(*of_two, strict=True):
        assert losses[0] > losses[-1] and fused_losses == pytest.approx(losses, rel=TOLERANCE)
        for name, weight in weights.items():
            assert (fused_weights[name] - weight).abs().max() <= TOLERANCE * weight.abs().max(), name


def built(groups: ProcessGroups, backend: WeightGradientBackend) -> tuple[list[str], list[str]]:
    """Linears with Transformer Engine's switch, in a model whose classes have it, that it is turned in; and
    what run_details.txt says."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from spikingbrain_train.models.weight_gradients import add_within_products, describe
    from spikingbrain_train.training.build import wrap_data_parallel

    case = CASES["76B-like"]
    model = model_of_known_weights(groups, case.model, ONE)
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            module.fuse_wgrad_accumulation = False
            del module.gradient_accumulation_fusion
    model.kernels = KernelConfig(weight_gradients=backend)
    assert add_within_products(model) == [], "no weight has a main_grad yet"
    wrap_data_parallel(model, ONE)
    names = [
        name for name, module in model.named_modules() if getattr(module, "fuse_wgrad_accumulation", False)
    ]
    matrices = sum(module.weight.numel() for name, module in model.named_modules() if name in names)
    assert all(f" {matrices:,} of " in line for line in describe(model))
    return names, describe(model)


def test_transformer_engine_is_told_by_its_own_switch(ranks: RankPool) -> None:
    te, none = WeightGradientBackend.transformer_engine, WeightGradientBackend.autograd
    (((names, said),), ((others, nothing),)) = (
        ranks.run(built, backend, world_size=1, parallel=ONE) for backend in (te, none)
    )
    assert not others and len([name for name in names if "local_experts" in name]) == 2 * 2 * 4
    assert "output_layer" not in names and "decoder.layers.0.mlp.linear_fc1" in names
    assert len(said) == 1 and not nothing
