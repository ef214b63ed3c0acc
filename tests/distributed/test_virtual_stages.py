"""What reads a model with virtual pipeline stages outside of a step gets what one rank computes.

Tolerance 1e-5: the same fp32 sums in the same order, but for what a rank's kernels choose by their shapes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.checkpoint_request import parallel_of
from tests.distributed.gradients import (
    CASES,
    LENGTH,
    MICRO_BATCH,
    model_of_known_weights,
    whole_batches,
)
from tests.distributed.pool import RankPool

CASE = CASES["76B-like"]
ONE_RANK = ParallelConfig()
VIRTUAL = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)


def _held_out(groups: Any, parallel: ParallelConfig, count: int) -> float:
    from spikingbrain_train.data.loader import local_micro_batch
    from spikingbrain_train.evaluation.held_out import held_out_cross_entropy

    model = model_of_known_weights(groups, CASE.model, parallel)
    sinks = CASE.model.num_sink_tokens
    whole = list(whole_batches(CASE, LENGTH - sinks, 0, 1))
    batches = [local_micro_batch(each, groups.device, num_sink_tokens=sinks) for each in [*whole, whole[0]]]
    losses = held_out_cross_entropy(
        model,
        iter(batches),
        count,
        seq_length=LENGTH - sinks,
        micro_batch_size=MICRO_BATCH,
        groups=groups,
    )
    return losses.mean


@pytest.mark.parametrize("count", [1, 3])
def test_held_out_losses_need_no_multiple_of_the_pipeline_s_ranks(ranks: RankPool, count: int) -> None:
    (expected,) = ranks.run(_held_out, ONE_RANK, count, world_size=1, parallel=ONE_RANK)
    found = ranks.run(_held_out, VIRTUAL, count, world_size=2, parallel=VIRTUAL)
    assert found == pytest.approx([expected] * 2, rel=1e-5)


def _decoded(groups: Any, parallel: ParallelConfig) -> torch.Tensor | None:
    from spikingbrain_train.models.incremental_decoding import IncrementalDecoder

    decoder = IncrementalDecoder(model_of_known_weights(groups, CASE.model, parallel))
    tokens = torch.arange(24).view(2, 12)
    decoder.begin()
    decoder.read(tokens[:, :9], piece_length=5)
    decoder.read(tokens[:, 9:11])
    return decoder.read(tokens[:, 11:])


def test_a_text_is_read_token_by_token(ranks: RankPool) -> None:
    (expected,) = ranks.run(_decoded, ONE_RANK, world_size=1, parallel=ONE_RANK)
    first, last = ranks.run(_decoded, VIRTUAL, world_size=2, parallel=VIRTUAL)
    assert first is None
    torch.testing.assert_close(last, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_commands_that_read_a_checkpoint_want_no_virtual_stages() -> None:
    with pytest.raises(ConfigurationError, match="reading a checkpoint has no such passes; leave it out"):
        parallel_of(["pp2", "virtual_pipeline_model_parallel_size=2"])
