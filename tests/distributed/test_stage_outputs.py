"""Outputs of pipeline stages that have been sent: their memory goes, their graph stays."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from spikingbrain_train.config.parallel import ParallelConfig
from tests.distributed.gradients import CASES, loss_and_gradients
from tests.distributed.pool import RankPool


def _elements_kept(groups: Any, parallel: ParallelConfig) -> list[int]:
    """Of the outputs that gradients go back from, on one rank."""
    from megatron.core.pipeline_parallel import schedules

    kept = []
    backward = schedules.backward_step

    def seen(input_tensor: Any, output_tensor: Any, *arguments: Any) -> Any:
        (output,) = output_tensor if isinstance(output_tensor, list) else [output_tensor]
        kept.append(output.numel())
        return backward(input_tensor, output_tensor, *arguments)

    with mock.patch.object(schedules, "backward_step", seen):
        loss_and_gradients(groups, CASES["76B-like"], parallel)
    return kept


@pytest.mark.parametrize("virtual", [None, 2])
def test_hidden_states_are_freed_once_they_are_sent(virtual: int | None, ranks: RankPool) -> None:
    """With virtual stages they are not: a send may still read them."""
    parallel = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=virtual)
    first, last = ranks.run(_elements_kept, parallel, world_size=2, parallel=parallel)
    if virtual is None:
        assert first == [1] * 2 and last == [1] * 2, "the last stage's are losses"
    else:
        assert len(first) == 4 and min(first) > 1 and sorted(last)[:2] == [1] * 2 and max(last) > 1
