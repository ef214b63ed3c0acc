"""What ZeRO's collectives send in a real step is what the search of a layout reckons with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.config.parallel import EngineKind, ParallelConfig, Recompute, ZeroConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.layer_work import ModelWork
from spikingbrain_train.planning.step_time import zero_traffic
from spikingbrain_train.training.callbacks.callback import Callback
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import MODEL, run_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="the extra deepspeed is not installed"
    ),
]

RANKS = 2
BUCKET = 4_000
"""Elements; a layer of the model has twice as many, so that ZeRO 3 keeps but a part of it."""
PASSED_ON = {"all_reduce": 2.0, "all_gather_into_tensor": 1.0, "reduce_scatter_tensor": 1.0}
"""Times (ranks - 1) / ranks of the whole tensor: what a rank passes on along a ring."""
_SCALARS = 1_000
"""Bytes; norms and agreements between ranks are smaller, and no part of what is reckoned with."""


class _Sent(Callback):
    """Bytes that this rank passes on in a step, of each function."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        import torch

        self.by = dict.fromkeys(PASSED_ON, 0.0)
        for name in PASSED_ON:
            patch.setattr(torch.distributed, name, self._counting(name, getattr(torch.distributed, name)))

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
    from spikingbrain_train.training.engines import deepspeed
    from spikingbrain_train.training.trainer import Trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed, "REDUCE_BUCKET", BUCKET)
        sent = _Sent(patch)
        Trainer(config, groups, [sent]).train()
    return sent.by


@pytest.mark.parametrize(
    ("stage", "recompute", "apart"),
    [
        (1, Recompute.none, 0.001),
        (2, Recompute.none, 0.001),
        # Which weights are kept depends on where modules end.
        (3, Recompute.none, 0.03),
        (3, Recompute.full, 0.07),
    ],
)
def test_bytes_of_a_step_are_those_that_are_planned(
    stage: int,
    recompute: Recompute,
    apart: float,
    ranks: RankPool,
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parallel = ParallelConfig(engine=EngineKind.deepspeed, zero=ZeroConfig(stage), recompute=recompute)
    config = run_config(tmp_path, text, model=MODEL, parallel=parallel)
    config.stage = replace(config.stage, train_iters=2)
    micro_batches = config.stage.global_batch_size // config.stage.micro_batch_size // RANKS
    assert micro_batches > 1
    first, second = ranks.run(_count, config, world_size=RANKS, parallel=parallel)
    assert first == second
    monkeypatch.setattr("spikingbrain_train.planning.step_time.REDUCE_BUCKET", BUCKET)
    planned = zero_traffic(ModelWork(config), config, RANKS)
    of_a_step = micro_batches * (planned.forward + planned.backward) + planned.gradients + planned.weights
    assert sum(first.values()) == pytest.approx(of_a_step, rel=apart)
    assert (first["reduce_scatter_tensor"] > 0) == (stage == 3)
