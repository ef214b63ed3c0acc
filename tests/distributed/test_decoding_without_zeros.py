"""Tokens that are generated through feed-forwards with zeros, without the weights that meet these.

In float32, to 2e-5 of the largest logit, as in test_incremental_decoding.py: sums in another order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from spikingbrain_train.config.model import ActivationFunc
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.gradients import model_of_known_weights
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import MODEL
from tests.distributed.test_incremental_decoding import TOLERANCE, text

SPARSE = replace(MODEL, activation_func=ActivationFunc.fatrelu, fatrelu_threshold=1.0)


def _decoded(groups: ProcessGroups, steps: int) -> tuple[Tensor, Tensor, int, int]:
    """Logits at once and token by token, products that left zeros out, copies that training would find."""
    from spikingbrain_train.models.feed_forwards import dense
    from spikingbrain_train.models.incremental_decoding import IncrementalDecoder

    model = model_of_known_weights(groups, SPARSE, ParallelConfig(), torch.float32).eval()
    with torch.no_grad():
        expected = model(text()[:1, :steps])[0, :, : SPARSE.vocab_size]
    skipped, product = 0, dense.active_product

    def counted(*arguments: Any) -> Tensor | None:
        nonlocal skipped
        found = product(*arguments)
        skipped += found is not None
        return found

    dense.active_product = counted
    try:
        decoder = IncrementalDecoder(model)
        decoder.begin()
        logits = [decoder.read(text()[:1, step : step + 1]) for step in range(steps)]
    finally:
        dense.active_product = product
    model.train()
    copies = sum(getattr(each, "_down", None) is not None for each in model.modules())
    found = torch.cat([each for each in logits if each is not None])[:, : SPARSE.vocab_size]
    return expected, found, skipped, copies


def test_generated_tokens_skip_zeros_and_stay_the_same(ranks: RankPool) -> None:
    steps = 20
    ((expected, found, skipped, copies),) = ranks.run(
        _decoded, steps, world_size=1, parallel=ParallelConfig()
    )
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert skipped >= 0.9 * steps * SPARSE.num_layers and copies == 0


def _after_an_update(groups: ProcessGroups) -> float:
    from spikingbrain_train.models.feed_forwards.dense import GatedMLP

    model = model_of_known_weights(groups, SPARSE, ParallelConfig(), torch.float32).eval()
    mlp = next(each for each in model.modules() if isinstance(each, GatedMLP))
    x = torch.randn(1, 1, SPARSE.hidden_size)
    with torch.no_grad():
        mlp(x)
        mlp.linear_fc2.weight.mul_(-3)
        few, _ = mlp(x)
        many, _ = mlp(x.repeat(16, 1, 1))
    return float((few - many[:1]).abs().max() / many.abs().max())


def test_a_copy_of_weights_does_not_outlive_them(ranks: RankPool) -> None:
    (difference,) = ranks.run(_after_an_update, world_size=1, parallel=ParallelConfig())
    assert difference <= 1e-5


@pytest.mark.parametrize("size", [2])
def test_split_feed_forwards_compute_everything(size: int, ranks: RankPool) -> None:
    """Under tensor parallelism the second projection adds up over ranks."""
    parallel = ParallelConfig(tensor_model_parallel_size=size)
    assert ranks.run(_of_a_rank, parallel, world_size=size, parallel=parallel) == [False] * size


def _of_a_rank(groups: ProcessGroups, parallel: ParallelConfig) -> bool:
    from spikingbrain_train.models.feed_forwards.dense import GatedMLP

    model = model_of_known_weights(groups, SPARSE, parallel, torch.float32).eval()
    mlp = next(each for each in model.modules() if isinstance(each, GatedMLP))
    with torch.no_grad():
        return mlp._can_skip_zeros(torch.randn(1, 1, SPARSE.hidden_size))
