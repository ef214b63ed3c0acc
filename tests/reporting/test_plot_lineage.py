"""Which runs are laid end to end, in which order, and what is said where they are not."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.reporting.plots.recording import Axis, Recording
from spikingbrain_train.reporting.plots.rows import Arrangement, Row, arrange
from tests.reporting.recordings import checkpoint_of, write_run


def arranged(*folders: Path, axis: Axis = Axis.tokens, compare: bool = False) -> Row:
    return arrange([Recording.read(folder) for folder in folders], axis, compare=compare)


def chain(folder: Path, *names: str) -> list[Path]:
    runs: list[Path] = []
    for name in names:
        load = checkpoint_of(runs[-1]) if runs else folder / "hybrid" / "iter_0000000"
        runs.append(write_run(folder / name, load=load))
    return runs


def test_stages_follow_their_lineage_whatever_the_order_of_arguments(tmp_path: Path) -> None:
    runs = chain(tmp_path, "z_align", "m_cpt", "a_long")
    for order in permutations(runs):
        row = arranged(*order)
        assert row.arrangement is Arrangement.sequence
        assert [run.name for run in row.runs] == ["z_align", "m_cpt", "a_long"]
        assert [(run.start, run.end) for run in row.runs] == [(0, 3000), (3000, 6000), (6000, 9000)]


def test_a_stage_that_started_in_the_middle_of_another_is_joined_there(tmp_path: Path) -> None:
    align = write_run(tmp_path / "align")
    cpt = write_run(tmp_path / "cpt", load=checkpoint_of(align, 20))
    first, second = arranged(cpt, align).runs
    assert (first.until, first.end, second.start) == (20, 2000, 2000)
    assert [x for x, _ in first.series("train/loss")] == [1000, 2000]


def test_folders_that_were_moved_still_follow_each_other(tmp_path: Path) -> None:
    align, cpt = chain(tmp_path, "align", "cpt")
    (tmp_path / "copied").mkdir()
    align, cpt = (run.rename(tmp_path / "copied" / run.name) for run in (align, cpt))
    assert [run.name for run in arranged(cpt, align).runs] == ["align", "cpt"]


def test_runs_without_event_lines_follow_by_the_configs_of_their_checkpoints(tmp_path: Path) -> None:
    write_run(
        tmp_path / "align",
        has_events=False,
        settings={"output_dir": "outputs/align", "checkpoint": {"load": "outputs/hybrid"}},
    )
    write_run(
        tmp_path / "cpt",
        has_events=False,
        settings={"output_dir": "outputs/cpt", "checkpoint": {"load": "outputs/align/checkpoints"}},
    )
    assert [run.name for run in arranged(tmp_path / "cpt", tmp_path / "align").runs] == ["align", "cpt"]


def refusal(*folders: Path) -> str:
    with pytest.raises(ConfigurationError) as error:
        arranged(*folders)
    assert "--compare" in str(error.value)
    return str(error.value)


def test_strangers_are_never_laid_end_to_end(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", load="/x/hybrid/iter_0000000")
    other = write_run(tmp_path / "other", load="/y/hybrid/iter_0000000")
    sentence = refusal(one, other)
    assert f"{other} does not follow {one}: it starts from /y/hybrid/iter_0000000" in sentence
    row = arranged(one, other, compare=True)
    assert row.arrangement is Arrangement.comparison and [run.start for run in row.runs] == [0, 0]


def test_a_stage_that_is_left_out_is_missed(tmp_path: Path) -> None:
    align, cpt, last = chain(tmp_path, "align", "cpt", "last")
    assert f"it starts from {checkpoint_of(cpt)}; name the run between them" in refusal(align, last)


def test_two_that_start_from_the_same_one_are_no_row(tmp_path: Path) -> None:
    align, cpt = chain(tmp_path, "align", "cpt")
    other = write_run(tmp_path / "other", load=checkpoint_of(align))
    assert f"both start from {align}" in refusal(align, cpt, other)
    assert "both start from" not in refusal(cpt, other)


def test_a_run_that_does_not_say_its_start_is_not_guessed(tmp_path: Path) -> None:
    align = write_run(tmp_path / "align", has_events=False)
    cpt = write_run(tmp_path / "cpt", has_events=False)
    assert "does not say what it started from" in refusal(align, cpt)


def test_a_run_from_random_weights_follows_none(tmp_path: Path) -> None:
    assert "random weights" in refusal(write_run(tmp_path / "a"), write_run(tmp_path / "b"))


def test_a_run_is_named_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(ConfigurationError, match="is named twice"):
        arranged(run, run)


def test_hours_leave_out_the_time_between_attempts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", resumed={20: {}})
    row = arranged(run, axis=Axis.hours)
    assert [x for x, _ in row.runs[0].series("train/loss")] == [1.0, 2.0, 3.0]


def test_steps_and_tokens_are_those_of_the_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", valid={0: 6.0, 20: 5.0})
    for axis, places in ((Axis.steps, [0, 20]), (Axis.tokens, [0, 2000])):
        assert [x for x, _ in arranged(run, axis=axis).runs[0].series("valid/cross_entropy")] == places
