"""Killed ranks leave no trace in weights, curves or data. Many kills: benchmarks/interrupted_runs.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from tests.distributed.forked_launch import ForkedLaunch
from tests.distributed.interrupted_runs import (
    Blow,
    Moment,
    differences,
    kill_ranks,
    random_blows,
    settings,
)
from tests.distributed.pool import RankPool

STEPS, SAVE_INTERVAL = 14, 4


def _run(words: list[str]) -> None:
    """What the command runs, on ranks that are there already."""
    from spikingbrain_train.training import trainer

    trainer.run(to_run_config(compose_run(words)))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks in /proc")
def test_ranks_that_are_killed_in_a_save_and_in_a_step_end_as_if_nothing_had_happened(
    ranks: RankPool, tmp_path: Path, text: Path
) -> None:
    """The whole run's ranks have run other tests before, the others begin with it."""
    words = {
        name: settings(
            tmp_path / name,
            text,
            steps=STEPS,
            save_interval=SAVE_INTERVAL,
            more=[
                *("parallel.use_distributed_optimizer=true", "cluster.timeout_minutes=0.5"),
                "data.num_workers=1",
            ],
        )
        for name in ("killed", "whole")
    }
    blows = [Blow(Moment.save, 4, rank=1, delay=0.0), Blow(Moment.step, 9, rank=0, delay=0.02)]
    with ForkedLaunch(tmp_path / "killed", tmp_path / "log", 2, words["killed"], restarts=2) as launch:
        hits = kill_ranks(launch, blows, lambda _: None)
        assert len(hits) == 2 and not launch.wait_for(lambda: False)
        assert launch.process.returncode == 0, launch.tail()
    assert hits[0].was_saving, "the first was to fall into a save"
    for hit in hits:
        assert hit.children, "the loader has processes of its own"
        assert not [pid for pid in hit.children if Path(f"/proc/{pid}").exists()], "they outlive their rank"

    ranks.run(_run, words["whole"], world_size=2, parallel=None)

    assert differences(tmp_path / "killed", tmp_path / "whole", steps=STEPS, ranks=2) == []
    (tmp_path / "killed" / "samples_of_rank_0.jsonl").write_text("")
    assert differences(tmp_path / "killed", tmp_path / "whole", steps=STEPS, ranks=2) != []


def test_of_random_kills_some_fall_into_saves_steps_and_starts_on_every_rank() -> None:
    blows = random_blows(30, steps=200, ranks=4, save_interval=5, seed=1)
    assert [blow.iteration for blow in blows] == sorted(blow.iteration for blow in blows)
    assert {blow.rank for blow in blows} == set(range(4))
    moments = [blow.moment for blow in blows]
    assert [moments.count(moment) for moment in Moment] == [3, 12, 15]
