"""Busy experts on all expert-parallel ranks: the same mathematics, and a load that is more even.

Tolerance 1e-5 of the largest entry, in float32: the order of sums over tokens differs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spikingbrain_train.config.model import MoEConfig
from spikingbrain_train.config.parallel import ParallelConfig, Recompute
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.gradients import CASES
from tests.distributed.pool import RankPool
from tests.distributed.test_gradients import assert_equal, result
from tests.models.moe.small_layer import build_layer, gradients, inputs

EP_2 = ParallelConfig(expert_model_parallel_size=2)
MODELS = (
    "ReLU, experts, L1",
    "ternary experts, INT8 inputs, spikes",
    "adapters of experts, one frozen",
    "76B-like, packed documents",
)
TOPOLOGIES = {
    "EP 2": EP_2,
    "EP 2, experts recomputed": replace(EP_2, recompute=Recompute.moe_feed_forward),
    "EP 2, recomputed": replace(EP_2, recompute=Recompute.full),
    "EP 2 over CP 2": replace(EP_2, context_parallel_size=2),
    "TP 2 + SP, EP 2 of whole experts": replace(
        EP_2, tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=1
    ),
    "PP 2 x EP 2": replace(EP_2, pipeline_model_parallel_size=2),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_loss_and_gradients_are_those_of_one_rank(name: str, topology: str, ranks: RankPool) -> None:
    parallel = replace(TOPOLOGIES[topology], replicate_expert_load=1.0)
    assert_equal(result(ranks, CASES[name], parallel), result(ranks, CASES[name], ParallelConfig()))


def _skewed(
    groups: ProcessGroups, parallel: ParallelConfig
) -> tuple[Tensor, dict[str, Tensor], list[float], set[str]]:
    """A layer whose first expert gets seven eighths of all tokens."""
    layer = build_layer(groups, MoEConfig(router_topk=1), parallel)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, 0] = torch.tensor([3.0, 1.0, -1.0, -3.0])
    hidden, direction = inputs(32, 4)
    hidden = hidden + groups.collection.ep.rank()  # ranks have other tokens
    hidden[..., 0] = torch.where(torch.arange(128).view(32, 4) % 8 < 7, 1.0, -1.0)
    output, grads = gradients(layer, hidden, direction)
    sums = layer.load_sums.tolist() if parallel.replicate_expert_load else []
    return output, grads, sums, {*layer.state_dict(), *layer.sharded_state_dict()}


def test_the_busiest_rank_has_fewer_tokens_and_the_same_results(ranks: RankPool) -> None:
    plain = ranks.run(_skewed, EP_2, world_size=2, parallel=EP_2)
    copied = replace(EP_2, replicate_expert_load=2.0)
    found = ranks.run(_skewed, copied, world_size=2, parallel=copied)
    for (output, grads, sums, stored), (expected_output, expected, _, stored_before) in zip(
        found, plain, strict=True
    ):
        # 256 tokens of two ranks: 224 to the first expert, 32 to the fourth. Of the busiest rank before and
        # after, of a mean one; copies, micro-batches.
        assert sums == [224.0, 144.0, 128.0, 1.0, 1.0]
        assert stored == stored_before
        for value, want in [(output, expected_output), *((grads[name], expected[name]) for name in expected)]:
            assert (value - want).abs().max() <= 1e-5 * want.abs().max()
