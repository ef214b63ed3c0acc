"""Autograd across ranks: what the first rank sends comes back as the sum of all gradients."""

from __future__ import annotations

import pytest
import torch

from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.parallel.context_parallel.communication import broadcast_from_first_rank
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.pool import RankPool


def _broadcast(groups: ProcessGroups, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rank = groups.collection.cp.rank()
    x = torch.full((3, 2), float(rank + 1), dtype=dtype)
    if rank == 0:
        x = torch.arange(6, dtype=dtype).view(2, 3).t()  # strides that the other ranks do not have
        x.requires_grad_()
    received = broadcast_from_first_rank(x, groups.collection.cp)
    (received * (rank + 1) ** 2).sum().backward()
    none = torch.zeros(0)
    return received.detach(), none if x.grad is None else x.grad, x.detach()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_rank_gets_the_first_ranks_tensor_and_sends_its_gradient(
    ranks: RankPool, dtype: torch.dtype
) -> None:
    results = ranks.run(_broadcast, dtype, world_size=3, parallel=ParallelConfig(context_parallel_size=3))
    for received, _, _ in results:
        assert torch.equal(received, results[0][2])
    assert torch.equal(results[0][1], torch.full((3, 2), 1.0 + 4.0 + 9.0, dtype=dtype))
    assert results[1][1].numel() == results[2][1].numel() == 0


def test_without_ranks_the_tensor_itself_comes_back() -> None:
    x = torch.ones(2)
    assert broadcast_from_first_rank(x, None) is x
