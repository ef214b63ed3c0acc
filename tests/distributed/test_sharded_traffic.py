"""What collectives of ZeRO and FSDP send in a real step is what the search of a layout reckons with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.config.parallel import EngineKind, FsdpConfig, ParallelConfig, Recompute
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.layer_work import ModelWork
from spikingbrain_train.planning.step_time import sharded_traffic
from spikingbrain_train.training.callbacks.callback import Callback
from tests.distributed.pool import RankPool
from tests.distributed.sharding_engines import case, fsdp, zero
from tests.distributed.small_runs import MODEL, run_config

pytestmark = pytest.mark.slow

RANKS = 2
BUCKET = 4_000
"""Elements; a layer of the model has twice as many, so that ZeRO 3 keeps but a part of it."""
PASSED_ON = {
    **{"all_reduce": 2.0, "all_gather_into_tensor": 1.0, "reduce_scatter_tensor": 1.0},
    **{"all_gather_single": 1.0, "reduce_scatter_single": 1.0},  # as recent releases of torch call them
}
"""Times (ranks - 1) / ranks of the whole tensor: what a rank passes on along a ring."""
_SCALARS = 1_000
"""Bytes; norms and agreements between ranks are smaller, and no part of what is reckoned with."""


class _Sent(Callback):
    """Bytes that this rank passes on in a step, of each function."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        import torch

        self.by = dict.fromkeys(PASSED_ON, 0.0)
        for name in PASSED_ON:
            if hasattr(torch.distributed, name):
                function = getattr(torch.distributed, name)
                patch.setattr(torch.distributed, name, self._counting(name, function))

    def _counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        from torch import Tensor

        def counting(*arguments: Any, **named: Any) -> Any:
            tensors = [each for each in (*arguments, *named.values()) if isinstance(each, Tensor)]
            size = max(each.numel() * each.element_size() for each in tensors)
            if size >= _SCALARS or name != "all_reduce":
                self.by[name] += PASSED_ON[name] * (RANKS - 1) / RANKS * size
            return function(*arguments, **named)

        return counting

    def step_begin(self) -> None:
        self.by.update(dict.fromkeys(PASSED_ON, 0.0))


def _count(groups: ProcessGroups, config: RunConfig) -> dict[str, float]:
    from spikingbrain_train.training.trainer import Trainer

    with pytest.MonkeyPatch.context() as patch:
        if config.parallel.engine is EngineKind.deepspeed:
            patch.setattr("spikingbrain_train.training.engines.deepspeed.REDUCE_BUCKET", BUCKET)
        sent = _Sent(patch)
        Trainer(config, groups, [sent]).train()
    return sent.by


@pytest.mark.parametrize(
    ("parallel", "apart"),
    [
        case(parallel, apart, engine=parallel.engine, name=name)
        for name, parallel, apart in (
            ("ZeRO 1", zero(1), 0.001),
            ("ZeRO 2", zero(2), 0.001),
            # Which weights are kept depends on where modules end.
            ("ZeRO 3", zero(3), 0.03),
            ("ZeRO 3, layers computed again", zero(3, recompute=Recompute.full), 0.07),
            # What it cuts into parts of equal size are rows, of which some matrices have an odd number.
            ("FSDP", fsdp(), 0.001),
            ("FSDP, layers computed again", fsdp(recompute=Recompute.full), 0.001),
            ("FSDP, weights kept", fsdp(fsdp=FsdpConfig(reshard_after_forward=False)), 0.001),
        )
    ],
)
def test_bytes_of_a_step_are_those_that_are_planned(
    parallel: ParallelConfig,
    apart: float,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = run_config(tmp_path, text, model=MODEL, parallel=parallel)
    config.stage = replace(config.stage, train_iters=2)
    micro_batches = config.stage.global_batch_size // config.stage.micro_batch_size // RANKS
    assert micro_batches > 1
    first, second = ranks.run(_count, config, world_size=RANKS, parallel=parallel)
    assert first == second
    monkeypatch.setattr("spikingbrain_train.planning.step_time.REDUCE_BUCKET", BUCKET)
    planned = sharded_traffic(ModelWork(config), config, RANKS)
    of_a_step = micro_batches * (planned.forward + planned.backward) + planned.gradients + planned.weights
    assert sum(first.values()) == pytest.approx(of_a_step, rel=apart)
    sums_parts = parallel.engine is EngineKind.fsdp or parallel.zero.stage == 3
    assert (first["reduce_scatter_tensor"] + first["reduce_scatter_single"] > 0) == sums_parts
