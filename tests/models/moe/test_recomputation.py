"""Each level of recomputation gives the same gradients, bit for bit, and keeps less than the one before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spikingbrain_train.config.model import MoEConfig
from spikingbrain_train.config.parallel import ParallelConfig, Recompute
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.pool import RankPool
from tests.models.kept_bytes import kept_bytes
from tests.models.moe.small_layer import EXPERTS, build_layer, gradients, inputs

LEVELS = [Recompute.none, Recompute.moe_activation, Recompute.moe_feed_forward, Recompute.moe_layer]
LENGTH, BATCH = 64, 2


def _gradients_and_statistics(
    groups: ProcessGroups, level: Recompute, parallel: ParallelConfig
) -> tuple[Tensor, dict[str, Tensor], list[float]]:
    moe = MoEConfig(router_topk=2, aux_loss_coeff=0.5, z_loss_coeff=0.2)
    layer = build_layer(groups, moe, replace(parallel, recompute=level))
    output, grads = gradients(layer, *inputs(LENGTH, BATCH))
    return output, grads, layer.router.statistics_sums.tolist()


@pytest.mark.parametrize("level", LEVELS[1:], ids=lambda level: level.value)
@pytest.mark.parametrize("spread", [1, 2], ids=["one rank", "EP 2"])
def test_gradients_and_router_statistics_do_not_change(
    level: Recompute, spread: int, ranks: RankPool
) -> None:
    parallel = ParallelConfig(expert_model_parallel_size=spread)
    kept = ranks.run(
        _gradients_and_statistics, Recompute.none, parallel, world_size=spread, parallel=parallel
    )
    again = ranks.run(_gradients_and_statistics, level, parallel, world_size=spread, parallel=parallel)
    for (output, grads, counted), (expected_output, expected, statistics) in zip(again, kept, strict=True):
        assert torch.equal(output, expected_output)
        assert all(torch.equal(grads[name], expected[name]) for name in expected)
        assert counted == statistics


def _bytes_kept(groups: ProcessGroups, level: Recompute) -> int:
    """What autograd holds on to between the forward and the backward pass, weights aside."""
    layer = build_layer(groups, MoEConfig(), ParallelConfig(recompute=level))
    hidden, direction = inputs(LENGTH, BATCH)
    hidden = hidden.clone().requires_grad_()  # a storage of its own
    kept: list[int] = []
    with kept_bytes(layer, kept):
        output, _ = layer(hidden)
    output.backward(direction)
    return kept[0]


def test_each_level_keeps_less_than_the_one_before(ranks: RankPool) -> None:
    none, activation, feed_forward, whole = [
        ranks.run(_bytes_kept, level, world_size=1, parallel=ParallelConfig())[0] for level in LEVELS
    ]
    tokens, hidden, width = LENGTH * BATCH, 16, 12
    # The routed and the shared expert's silu(gate) * up, which their second projections would keep.
    assert none - activation >= 2 * tokens * width * 4
    # Further the first projections' output, for both; the experts' numbers of tokens are new.
    assert activation - feed_forward >= 2 * tokens * 2 * width * 4 - EXPERTS * 8
    assert feed_forward > whole
    assert whole == tokens * hidden * 4  # the input and nothing else
