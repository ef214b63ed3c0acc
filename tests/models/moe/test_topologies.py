"""A mixture-of-experts layer gives the same output and gradients however its experts and tokens are spread.

Tolerance 1e-5 of the largest entry of a tensor, in float32: only the order of sums over ranks differs (errors
of a few 1e-7 are seen). Weights are not copied between topologies: each initialises its own, and they agree
exactly.

Dropping is per rank, so it equals one rank's only where every rank sees as many whole sequences as it does
there: under expert and data parallelism with one micro-batch of the same size, not where a sequence is split.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spikingbrain_train.config.model import MoEConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.pool import RankPool
from tests.models.moe.small_layer import EXPERTS, build_layer, gradients, inputs

MOE = MoEConfig(router_topk=2, aux_loss_coeff=0.5, z_loss_coeff=0.2)
SPLIT_TENSOR = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)

TOPOLOGIES: dict[str, tuple[int, ParallelConfig]] = {
    "EP 2": (2, ParallelConfig(expert_model_parallel_size=2)),
    "EP 4": (4, ParallelConfig(expert_model_parallel_size=4)),
    "EP 2 x DP 2": (4, ParallelConfig(expert_model_parallel_size=2)),
    "TP 2 + SP": (2, SPLIT_TENSOR),
    "TP 2 + SP, whole experts": (2, replace(SPLIT_TENSOR, expert_tensor_parallel_size=1)),
    "TP 2 + SP, EP 2 of whole experts": (
        2,
        replace(SPLIT_TENSOR, expert_tensor_parallel_size=1, expert_model_parallel_size=2),
    ),
    "TP 2 + SP, EP 2": (4, replace(SPLIT_TENSOR, expert_model_parallel_size=2)),
    "CP 2": (2, ParallelConfig(context_parallel_size=2)),
    "EP 2 over CP 2": (2, ParallelConfig(context_parallel_size=2, expert_model_parallel_size=2)),
    "EP 4 over CP 2 x DP 2": (4, ParallelConfig(context_parallel_size=2, expert_model_parallel_size=4)),
}


def _on_this_topology(
    groups: ProcessGroups, moe: MoEConfig, parallel: ParallelConfig
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Output, gradients and router statistics of the global batch, put together from all ranks."""
    layer = build_layer(groups, moe, parallel)
    mine = _share_of_tokens(groups, parallel)
    hidden, direction = inputs()
    output, grads = gradients(layer, hidden[mine].contiguous(), direction[mine].contiguous())
    statistics = layer.router.statistics_sums.clone()
    torch.distributed.all_reduce(statistics)
    return (
        _assembled(hidden, mine, output),
        {
            "input": _assembled(hidden, mine, grads["input"]),
            **_whole_weights(groups, parallel, {name: grads[name] for name, _ in layer.named_parameters()}),
        },
        statistics,
    )


def _share_of_tokens(groups: ProcessGroups, parallel: ParallelConfig) -> tuple[slice, slice]:
    """This rank's part of [T, B]: slices of T over context- and sequence-parallel ranks, B over replicas."""
    length, batch = inputs()[0].shape[:2]
    pieces, piece = parallel.context_parallel_size, groups.context_parallel_rank
    if parallel.sequence_parallel:
        pieces *= parallel.tensor_model_parallel_size
        piece = piece * parallel.tensor_model_parallel_size + groups.tensor_model_parallel_rank
    rows = batch // groups.data_parallel_size
    return (
        slice(piece * (length // pieces), (piece + 1) * (length // pieces)),
        slice(groups.data_parallel_rank * rows, (groups.data_parallel_rank + 1) * rows),
    )


def _assembled(like: Tensor, mine: tuple[slice, slice], value: Tensor) -> Tensor:
    whole = torch.zeros_like(like)
    whole[mine] = value
    torch.distributed.all_reduce(whole)
    return whole


def _whole_weights(
    groups: ProcessGroups, parallel: ParallelConfig, local: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Gradients of whole weights, summed over ranks as training sums them; those of all experts in one."""
    collection = groups.collection
    router = local["router.weight"].clone()
    for group in (collection.dp_cp, collection.tp):
        torch.distributed.all_reduce(router, group=group)
    whole = {"router": router}
    size, rank = groups.expert_tensor_parallel_size, collection.expt_tp.rank()
    per_rank = EXPERTS // parallel.expert_model_parallel_size
    for linear in ("linear_fc1", "linear_fc2"):
        experts: list[Tensor] = []
        for expert in range(EXPERTS):
            index = expert - groups.expert_model_parallel_rank * per_rank
            here = 0 <= index < per_rank
            part = local[f"experts.local_experts.{index if here else 0}.{linear}.weight"].clone()
            torch.distributed.all_reduce(part, group=collection.expt_dp)
            experts.append(_unsplit(linear, part, rank, size) * here)
        stacked = torch.stack(experts)
        torch.distributed.all_reduce(stacked, group=collection.tp_ep)
        whole[f"experts.{linear}"] = stacked
        shared = local[f"shared_experts.{linear}.weight"].clone()
        torch.distributed.all_reduce(shared, group=collection.dp_cp)
        shared = _unsplit(
            linear, shared, groups.tensor_model_parallel_rank, groups.tensor_model_parallel_size
        )
        torch.distributed.all_reduce(shared, group=collection.tp)
        whole[f"shared_experts.{linear}"] = shared
    return whole


def _unsplit(linear: str, part: Tensor, rank: int, size: int) -> Tensor:
    """A rank's part at its place among zeros; a split fc1 holds gate rows, then up rows of every rank."""
    if linear == "linear_fc2":
        pieces = [torch.zeros_like(part)] * size
        pieces[rank] = part
        return torch.cat(pieces, dim=1)
    gate, up = part.chunk(2)
    gates, ups = [torch.zeros_like(gate)] * size, [torch.zeros_like(up)] * size
    gates[rank], ups[rank] = gate, up
    return torch.cat(gates + ups)


@pytest.fixture(scope="module")
def one_rank(ranks: RankPool) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    [result] = ranks.run(_on_this_topology, MOE, ParallelConfig(), world_size=1, parallel=ParallelConfig())
    return result


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_output_and_gradients_equal_those_of_one_rank(
    name: str, ranks: RankPool, one_rank: tuple[Tensor, dict[str, Tensor], Tensor]
) -> None:
    world_size, parallel = TOPOLOGIES[name]
    expected_output, expected, statistics = one_rank
    for output, grads, counted in ranks.run(
        _on_this_topology, MOE, parallel, world_size=world_size, parallel=parallel
    ):
        _assert_close("output", output, expected_output)
        assert grads.keys() == expected.keys()
        for weight, grad in grads.items():
            _assert_close(weight, grad, expected[weight])
        # Counts of tokens exactly, sums of losses to float32's rounding.
        assert counted[:-2].tolist() == statistics[:-2].tolist()
        torch.testing.assert_close(counted, statistics, rtol=1e-5, atol=0.0)


def _assert_close(name: str, found: Tensor, expected: Tensor) -> None:
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error <= 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("pad", [False, True], ids=["dropping", "dropping and padding"])
def test_each_rank_drops_from_its_own_tokens(pad: bool, ranks: RankPool) -> None:
    """Two replicas with their experts spread over both equal two replicas that hold all experts."""
    moe = replace(MOE, capacity_factor=0.75, pad_to_capacity=pad)
    spread = ParallelConfig(expert_model_parallel_size=2)
    results = ranks.run(_on_this_topology, moe, spread, world_size=2, parallel=spread)
    alone = ranks.run(_on_this_topology, moe, ParallelConfig(), world_size=2, parallel=ParallelConfig())

    (output, grads, counted), (expected_output, expected, statistics) = results[0], alone[0]
    _assert_close("output", output, expected_output)
    for weight, grad in grads.items():
        _assert_close(weight, grad, expected[weight])
    assert counted[:-2].tolist() == statistics[:-2].tolist()
    assert counted[EXPERTS] > 0  # something was dropped
