"""A training run says what it is at, also while no optimizer step is taken."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from unittest import mock

from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import checkpoint_config, run_config, train


def _log(groups: ProcessGroups, config: RunConfig) -> str:
    from spikingbrain_train.reporting import activity

    stream = io.StringIO()
    impatient = {"_QUIET_SECONDS": 0.0, "_TICK_SECONDS": 0.0005}
    with mock.patch.multiple(activity, **impatient), contextlib.redirect_stdout(stream):
        train(groups, config)
    return stream.getvalue()


def test_every_part_of_a_run_speaks_up_and_other_ranks_stay_quiet(
    ranks: RankPool, tmp_path: Path, text: Path, hybrid_checkpoint: Path, dense_checkpoint: Path
) -> None:
    stage = StageConfig(
        kind="align",
        teacher=str(dense_checkpoint),
        train_iters=3,
        seq_length=32,
        global_batch_size=2,
    )
    config = run_config(tmp_path, text, stage=stage, checkpoint=checkpoint_config(load=hybrid_checkpoint))
    config.data.valid = [str(text)]
    first, second = ranks.run(_log, config, world_size=2, parallel=ParallelConfig())
    for what in (
        "building and loading the model ...",
        "evaluating ",
        "starting the new mixers in closed form ",
        "iteration 1/3 ...",
        "saving ...",
    ):
        assert what in first, what
    assert "..." not in second
