"""The health check on four ranks that stand for two hosts of two: fit, with one missing, and refused."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from spikingbrain_train.config.parallel import AcceleratorKind
from spikingbrain_train.errors import ConfigurationError, PlatformError
from spikingbrain_train.health import bandwidth, meeting
from spikingbrain_train.health.check import Outcome, check_health
from spikingbrain_train.health.facts import Need
from spikingbrain_train.health.findings import Limits
from spikingbrain_train.planning.launch import Launch
from tests.distributed.pool import RankPool

# Four ranks on two cores are not equally fast; whether one is slow is for tests/health to say.
LIMITS = Limits(slow_factor=1e6)


def _told_in_order(refused: bool) -> list[str]:
    """What a check of one rank tells the others, and where it has printed its outcome in between."""
    told: list[str] = []

    def need() -> Need:
        if refused:
            raise ConfigurationError("stage.train_iters=0 does not fit")
        return Need(accelerator=AcceleratorKind.cpu)

    with mock.patch.object(meeting.Meeting, "announce", lambda _self, what, _value: told.append(what)):
        check_health(Launch(), need, LIMITS, 10.0, report=lambda _outcome: told.append("printed"))
    return told


def test_rank_0_has_printed_before_another_rank_can_end_and_have_the_launcher_stop_it() -> None:
    assert _told_in_order(refused=True) == ["printed", "need"]
    assert _told_in_order(refused=False) == ["need", "exchange", "printed", "outcome"]


def _check(output_dir: str, seconds: float, case: str) -> tuple[Outcome, float] | str | None:
    """The outcome and how long it took; None of a rank that does not come."""
    launch = replace(Launch.from_environment(), local_world_size=2)
    launch = replace(launch, local_rank=launch.rank % 2)
    host = ("host-a", "host-b")[launch.rank // 2]
    if case == "missing" and launch.rank == 3:
        return None
    if case == "hangs" and launch.rank == 1:
        return _hang_in_the_exchange(launch, seconds)
    if case == "without rank 0" and launch.rank == 0:
        return None

    def need() -> Need:
        if case == "refused":
            raise ConfigurationError("stage.train_iters=0 does not fit")
        return Need(output_dir, AcceleratorKind.cpu, checkpoint_bytes=1 << 20)

    started = time.monotonic()
    ahead = 30.0 if case == "clock" and host == "host-b" else 0.0
    clock = mock.Mock(wraps=time, time=lambda: time.time() + ahead)
    with mock.patch.dict(os.environ, {"SLURMD_NODENAME": host}), mock.patch.object(meeting, "time", clock):
        try:
            outcome = check_health(launch, need, LIMITS, seconds)
        except PlatformError as error:
            return str(error)
    return outcome, time.monotonic() - started


def test_fit_hosts_pass_on_every_rank_and_leave_nothing_in_the_output_folder(
    ranks: RankPool, tmp_path: Path
) -> None:
    outcomes = ranks.run(_check, str(tmp_path / "not" / "there"), 60.0, "fit", world_size=4)
    assert [list(outcome.sentences) for outcome, _ in outcomes] == [[]] * 4
    assert not any(outcome.stuck for outcome, _ in outcomes)
    first, second = outcomes[0][0].table.splitlines()[1:]
    for line, host, its in ((first, "host-a", "0-1"), (second, "host-b", "2-3")):
        assert line.split()[:2] == [host, its] and "GB/s" in line and "2 x cpu" in line
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_differs_is_measured_and_named_on_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    outcomes = ranks.run(_check, str(tmp_path), 60.0, "clock", world_size=4)
    for outcome, _ in outcomes:
        (sentence,) = outcome.sentences
        assert sentence.startswith("the clock of host-b is 30.0 s ahead of host-a")
    assert "+30.0" in outcomes[0][0].table


def test_a_rank_that_does_not_come_is_named_on_every_other_rank_after_the_time(
    ranks: RankPool, tmp_path: Path
) -> None:
    outcomes = ranks.run(_check, str(tmp_path), 3.0, "missing", world_size=4)
    assert outcomes[3] is None
    for outcome, seconds in outcomes[:3]:
        (sentence,) = outcome.sentences
        assert sentence.startswith("rank 3 on host-b did not come within 3 s") and seconds < 20


def _hang_in_the_exchange(launch: Launch, seconds: float) -> tuple[Outcome, float]:
    ended = threading.Event()
    started = time.monotonic()
    with mock.patch.object(bandwidth, "_all_reduce", lambda *_: float(ended.wait(60))):
        outcome = check_health(launch, Need, LIMITS, seconds)
        ended.set()
        for thread in threading.enumerate():
            if thread.name == "exchange":
                thread.join(30)
    return outcome, time.monotonic() - started


def test_a_rank_that_hangs_in_the_exchange_is_named_and_those_that_wait_for_it_are_not(
    ranks: RankPool, tmp_path: Path
) -> None:
    outcomes = ranks.run(_check, str(tmp_path), 8.0, "hangs", world_size=2)
    for outcome, _ in outcomes:
        (sentence,) = outcome.sentences
        assert sentence.startswith("rank 1 on ") and "did not get through the exchange of tensors" in sentence
    assert [outcome.stuck for outcome, _ in outcomes] == [False, True]


def _hang_together(seconds: float) -> tuple[Outcome, float]:
    """Four ranks on two hosts whose collectives wait for ever, as NCCL's; rank 3 hangs in its first one."""
    launch = replace(Launch.from_environment(), local_world_size=2)
    launch = replace(launch, local_rank=launch.rank % 2)
    ended, all_reduce = threading.Event(), torch.distributed.all_reduce

    def hang(*arguments: object, **settings: object) -> None:
        ended.wait(60)
        all_reduce(*arguments, **settings)

    started = time.monotonic()
    patient = mock.patch.object(bandwidth, "timedelta", lambda seconds: timedelta(seconds=60))
    inside = mock.patch.object(torch.distributed, "all_reduce", hang if launch.rank == 3 else all_reduce)
    with mock.patch.dict(os.environ, {"SLURMD_NODENAME": f"host-{'ab'[launch.rank // 2]}"}), patient, inside:
        need = partial(Need, accelerator=AcceleratorKind.cpu)
        outcome = check_health(launch, need, LIMITS, seconds)
        took = time.monotonic() - started
        ended.set()
        for thread in threading.enumerate():
            if thread.name == "exchange":
                thread.join(60)
    return outcome, took


def test_where_all_hang_together_the_host_of_the_one_that_began_it_is_named_in_time(ranks: RankPool) -> None:
    seconds = 8.0
    for outcome, took in ranks.run(_hang_together, seconds, world_size=4):
        (sentence,) = outcome.sentences
        assert sentence.startswith("ranks 2, 3 on host-b did not get through the exchange of tensors")
        assert outcome.stuck and took < 2 * seconds + 10  # of rank 0 until the others have left


def test_a_rank_0_that_ends_in_between_is_no_defect_of_the_others() -> None:
    gone = mock.Mock(wait=mock.Mock(side_effect=torch.distributed.DistNetworkError("Connection reset")))
    follower = meeting.Meeting(Launch(1, 2, 0, 1, "host-a", 1), gone, 60.0)
    said = "rank 1 on .* has lost rank 0, .* look at its node, host-a"
    with (
        mock.patch.object(meeting.Meeting, "join", lambda *_: follower),
        pytest.raises(PlatformError, match=said),
    ):
        check_health(follower.launch, Need, LIMITS, 60.0)


def test_settings_that_are_refused_end_every_rank_at_once_and_so_does_a_rank_0_that_is_gone(
    ranks: RankPool, tmp_path: Path
) -> None:
    outcomes = ranks.run(_check, str(tmp_path), 60.0, "refused", world_size=4)
    assert [outcome.sentences for outcome, _ in outcomes] == [["stage.train_iters=0 does not fit"]] * 4
    alone = ranks.run(_check, str(tmp_path), 1.0, "without rank 0", world_size=2)
    assert "rank 1 on host-a has heard nothing of rank 0 for 2 s; look at the node of rank 0" in alone[1]


def test_a_full_or_read_only_folder_is_named_before_the_run(ranks: RankPool, tmp_path: Path) -> None:
    if os.access("/proc/sys", os.W_OK) and os.geteuid() != 0:
        pytest.skip("needs a folder that nobody can write to")
    outcomes = ranks.run(_check, "/proc/health", 60.0, "fit", world_size=2)
    assert any("host-a cannot write to output_dir=/proc/health" in s for s in outcomes[0][0].sentences)
    assert outcomes[0][0].sentences == outcomes[1][0].sentences
