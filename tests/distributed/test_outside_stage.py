"""A kind of stage of another package is two files: planned, checked, trained, saved and resumed like ours."""

from __future__ import annotations

from pathlib import Path

from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import checkpoint_config, run_config, train

ONE_RANK = ParallelConfig()


def _train(groups: ProcessGroups, config: RunConfig) -> tuple[list[tuple[float, float]], int]:
    """Steps, and how many parameters the plan holds optimizer state for."""
    from spikingbrain_train.config.plugins import load_plugins
    from spikingbrain_train.planning.checks import check_run_config
    from spikingbrain_train.planning.planner import plan_run

    load_plugins(config.plugins)
    check_run_config(config, groups.world_size)
    return train(groups, config), plan_run(config, groups.world_size).checkpoint_bytes


def test_it_goes_through_the_trainer(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path
) -> None:
    def config(name: str, kind: str) -> RunConfig:
        run = run_config(
            tmp_path / name,
            text,
            checkpoint=checkpoint_config(hybrid_checkpoint),
            plugins=["tests.training.stages.outside"],
        )
        run.stage.kind, run.stage.train_iters = kind, 6
        return run

    ((ours, size),) = ranks.run(_train, config("ours", "cpt"), world_size=1, parallel=ONE_RANK)
    ((theirs, same_size),) = ranks.run(_train, config("theirs", "outside"), world_size=1, parallel=ONE_RANK)
    assert size == same_size  # its kind says nothing else
    assert theirs[0][0] == ours[0][0], "the same model on the same tokens"
    assert theirs[0][1] < ours[0][1], "fewer gradients"
    assert theirs[-1][0] < theirs[0][0], "and it learns"

    longer = config("theirs", "outside")
    longer.stage.train_iters = 8
    ((resumed, _),) = ranks.run(_train, longer, world_size=1, parallel=ONE_RANK)
    assert len(resumed) == 2
