"""Later phases of training: rates and weight decay of every step, and a resumed run that goes through one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import LRDecayStyle, OptimizerConfig, RunConfig
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import Remember, run_config, train

STEPS, BEGIN, FACTOR = 8, 4, 0.25
TWO_PHASES = OptimizerConfig(
    lr=1e-2,
    min_lr=0.0,
    lr_decay_style=LRDecayStyle.linear,
    weight_decay=0.5,
    new_parameter_lr_mult=3.0,
    adam_eps=1e-6,
    phase_starts=[BEGIN / STEPS],
    phase_lr_mults=[FACTOR],
    phase_weight_decays=[0.0],
)


def _groups_of_every_step(groups: ProcessGroups, config: RunConfig) -> list[list[dict[str, float]]]:
    """What AdamW is told in each step of every group that holds parameters."""
    from spikingbrain_train.training.trainer import Trainer

    class Groups(Remember):
        def before_update(self, grad_norm: float) -> None:
            super().before_update(grad_norm)
            found.append(
                [
                    {name: group[name] for name in ("lr", "weight_decay", "lr_mult", "wd_mult")}
                    for group in trainer.state.optimizer.param_groups
                    if group["params"]
                ]
            )

    found: list[list[dict[str, float]]] = []
    trainer = Trainer(config, groups, [Groups()])
    trainer.train()
    return found


def config_of(folder: Path, text: Path, optimizer: OptimizerConfig, **changes: Any) -> RunConfig:
    stage = StageConfig(train_iters=STEPS, seq_length=32, global_batch_size=4)
    return run_config(folder, text, optimizer=optimizer, stage=stage, **changes)


def test_every_group_has_the_rate_and_the_decay_of_the_steps_phase(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    config = config_of(tmp_path / "run", text, TWO_PHASES)
    (found,) = ranks.run(_groups_of_every_step, config, world_size=1, parallel=ParallelConfig())
    assert len(found) == STEPS
    assert {group["lr_mult"] for group in found[0]} == {1.0, 3.0}
    for step, groups in enumerate(found, start=1):
        factor, decay = (1.0, 0.5) if step <= BEGIN else (FACTOR, 0.0)
        for group in groups:
            rate = 1e-2 * (1 - step / STEPS) * factor * group["lr_mult"]
            assert group["lr"] == pytest.approx(rate, rel=1e-12, abs=1e-18)
            assert group["weight_decay"] == decay * group["wd_mult"]


@pytest.mark.parametrize("stop_after", [BEGIN - 1, BEGIN])
def test_a_resumed_run_goes_on_in_its_phase_bit_for_bit(
    stop_after: int, ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    run = {"world_size": 1, "parallel": ParallelConfig()}
    (whole,) = ranks.run(train, config_of(tmp_path / "whole", text, TWO_PHASES), **run)
    config = config_of(tmp_path / "halves", text, TWO_PHASES)
    (first,) = ranks.run(train, config, stop_after, **run)
    (second,) = ranks.run(train, config, **run)
    assert [*first, *second] == whole and len(whole) == STEPS
    one_phase = replace(TWO_PHASES, phase_starts=[], phase_lr_mults=[], phase_weight_decays=[])
    if stop_after == BEGIN:
        (other,) = ranks.run(train, config_of(tmp_path / "one", text, one_phase), **run)
        assert other[: BEGIN + 1] == whole[: BEGIN + 1]  # the loss in front of the first step of the second
        assert other[BEGIN + 1 :] != whole[BEGIN + 1 :]
