"""The check itself: every rank calls :func:`check_health`, and all come to the same end."""

from __future__ import annotations

import faulthandler
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from spikingbrain_train.config.parallel import AcceleratorKind
from spikingbrain_train.errors import PlatformError, SpikingBrainError, first_line
from spikingbrain_train.health import bandwidth, findings
from spikingbrain_train.health.bandwidth import Exchanged, Speeds
from spikingbrain_train.health.facts import HostFacts, Need, RankFacts, nearest_folder, rank_facts
from spikingbrain_train.health.findings import Limits, Seen
from spikingbrain_train.health.meeting import Meeting
from spikingbrain_train.health.probe_files import PREFIX, remove_stale, removed_behind
from spikingbrain_train.planning.launch import Launch

_MOST = 10
"""Sentences that are printed; a switch that is down makes one of every host."""
_WAITING_SHARE = 0.75
"""Of the time for the exchange: after it a rank says that it hangs; rank 0 compares them in the rest."""


@dataclass(frozen=True)
class Outcome:
    """How it ended, the same on all ranks."""

    sentences: Sequence[str]
    """What is out of line; empty where nothing is."""
    table: str = ""
    """On rank 0."""
    stuck: bool = False
    """A collective still hangs in a thread of this process, which can only be left by ``os._exit``."""


def check_health(
    launch: Launch,
    need_of_run: Callable[[], Need],
    limits: Limits,
    seconds: float,
    hosts: Sequence[str] = (),
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Meet the other ranks, tell what is seen here, exchange tensors, and hear what is out of line.

    Args:
        launch: who this process is.
        need_of_run: on rank 0, what the run takes; the errors that the user can fix end the check everywhere.
        limits: what counts as in line.
        seconds: how long a rank is waited for, and the exchange.
        hosts: names of the nodes in the order of ranks, where a scheduler tells them.
        report: is given the outcome on rank 0, before another rank hears of it: a launcher stops all ranks
            when the first one ends with an error, and rank 0 has to have spoken by then.

    Raises:
        PlatformError: rank 0 cannot be reached, or has gone.
    """
    from torch.distributed import DistError

    meeting = Meeting.join(launch, seconds)
    try:
        if launch.rank == 0:
            return _lead(meeting, need_of_run, limits, hosts, report)
        return _follow(meeting)
    except DistError:
        raise meeting.lost() from None
    finally:
        with suppress(RuntimeError):  # rank 0 has gone, which nobody has to wait for
            meeting.leave()


def _lead(
    meeting: Meeting,
    need_of_run: Callable[[], Need],
    limits: Limits,
    hosts: Sequence[str],
    report: Callable[[Outcome], None],
) -> Outcome:
    launch = meeting.launch
    meeting.show_time()
    try:
        need = need_of_run()
    except SpikingBrainError as error:
        sentence = " ".join(str(error).split())
        report(refused := Outcome([sentence]))
        meeting.announce("need", {"refused": sentence})
        return refused
    with _with_token(need) as need:
        meeting.announce("need", asdict(need))
        meeting.tell("facts", asdict(_look(meeting, need)))
        told = meeting.gather("facts", meeting.seconds)
    ranks = {rank: _facts(values) for rank, values in told.items()}
    seen = Seen(launch.world_size, launch.local_world_size, ranks, {}, hosts)
    sentences = findings.absent(seen, ranks, f"did not come within {meeting.seconds:g} s")
    sentences += findings.of_facts(seen, need, limits)
    # Who waits in vain for a rank or its GPU would hang, as would GPUs that wait for CPUs.
    alike = len({facts.device_total > 0 for facts in ranks.values()}) == 1
    fit = all(
        facts.device and not (facts.on_host and facts.on_host.trouble_with_network)
        for facts in ranks.values()
    )
    exchange = len(ranks) == launch.world_size and alike and fit
    meeting.announce("exchange", exchange)
    stuck = False
    if exchange:
        stuck = _exchange(meeting, need)
        told = meeting.gather("exchanged", meeting.seconds * (1 - _WAITING_SHARE))
        exchanged = {rank: _exchanged(values) for rank, values in told.items()}
        seen = replace(
            seen, speeds={rank: each.speeds for rank, each in exchanged.items() if each.speeds is not None}
        )
        if len(seen.speeds) < launch.world_size:
            sentences += findings.behind(seen, exchanged)
        sentences += findings.of_speeds(seen, limits)
    if len(sentences) > _MOST:
        sentences[_MOST:] = [f"{len(sentences) - _MOST} more are out of line, see the table"]
    report(outcome := Outcome(sentences, findings.table(seen), stuck))
    meeting.announce("outcome", sentences)
    return outcome


def _follow(meeting: Meeting) -> Outcome:
    seconds = 2 * meeting.seconds  # rank 0 waits as long for others
    values = meeting.hear("need", seconds)
    if "refused" in values:
        return Outcome([values["refused"]])
    need = Need(**{**values, "accelerator": AcceleratorKind(values["accelerator"])})
    facts = _look(meeting, need)
    if facts.on_host is not None:
        facts = replace(facts, clock_seconds=meeting.clock_seconds())
    meeting.tell("facts", asdict(facts))
    stuck = bool(meeting.hear("exchange", seconds)) and _exchange(meeting, need)
    return Outcome(meeting.hear("outcome", 2 * seconds), stuck=stuck)


def _look(meeting: Meeting, need: Need) -> RankFacts:
    """What this rank sees. A driver or disk that does not answer ends the process, with its stack.

    It does so once the others have gone on without it: a scheduler waits for the last process of a job.
    """
    faulthandler.dump_traceback_later(1.5 * meeting.seconds, exit=True)
    try:
        return rank_facts(meeting.launch, need)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _exchange(meeting: Meeting, need: Need) -> bool:
    """Measure beside this thread, which goes on if that hangs. Whether it does."""
    from spikingbrain_train.runtime.accelerator import detect

    measured: list[Speeds | None] = []
    reached = [0]

    def measure() -> None:
        try:
            kind = need.accelerator if need.on_gpus else AcceleratorKind.cpu
            # Who waits for a rank that hangs gives up first, and can still say so: the other one is named.
            seconds = meeting.seconds / 2
            measured.append(
                bandwidth.measure(meeting.launch, detect(kind), meeting.store, seconds, reached.append)
            )
        except (RuntimeError, PlatformError) as error:
            print(f"rank {meeting.launch.rank}: {first_line(error)}", flush=True)
            measured.append(None)

    thread = threading.Thread(target=measure, name="exchange", daemon=True)
    thread.start()
    thread.join(meeting.seconds * _WAITING_SHARE)
    hangs = not measured
    meeting.tell("exchanged", asdict(Exchanged(None if hangs else measured[0], reached[-1], hangs)))
    return hangs


@contextmanager
def _with_token(need: Need) -> Iterator[Need]:
    """Leave the file that other hosts look for; where that cannot be, the facts say so of the folder."""
    token = f"{PREFIX}{uuid.uuid4().hex}"
    path = nearest_folder(need.output_dir) / token
    with removed_behind(path):
        try:
            path.touch()
            remove_stale(path)
        except OSError:
            token = ""
        yield replace(need, token=token)


def _facts(values: dict[str, Any]) -> RankFacts:
    on_host = values["on_host"]
    return RankFacts(**{**values, "on_host": None if on_host is None else HostFacts(**on_host)})


def _exchanged(values: dict[str, Any]) -> Exchanged:
    speeds = values["speeds"]
    return Exchanged(**{**values, "speeds": None if speeds is None else Speeds(**speeds)})
