"""The check itself: every rank calls :func:`check_health`, and all come to the same end."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from spikingbrain_train.config.parallel import AcceleratorKind
from spikingbrain_train.errors import PlatformError, SpikingBrainError, first_line
from spikingbrain_train.health import bandwidth, findings
from spikingbrain_train.health.bandwidth import Speeds
from spikingbrain_train.health.facts import HostFacts, Need, RankFacts, nearest_folder, rank_facts
from spikingbrain_train.health.findings import Limits, Seen
from spikingbrain_train.health.meeting import Meeting
from spikingbrain_train.planning.launch import Launch

_MOST = 10
"""Sentences that are printed; a switch that is down makes one of every host."""


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
        meeting.tell("facts", asdict(rank_facts(launch, need)))
        told = meeting.gather("facts")
    ranks = {rank: _facts(values) for rank, values in told.items()}
    seen = Seen(launch.world_size, launch.local_world_size, ranks, {}, hosts)
    sentences = findings.absent(seen, ranks, f"did not come within {meeting.seconds:g} s")
    sentences += findings.of_facts(seen, need, limits)
    # Who waits in vain for a rank or its GPU would hang, as would GPUs that wait for CPUs.
    alike = len({facts.device_total > 0 for facts in ranks.values()}) == 1
    exchange = len(ranks) == launch.world_size and alike and all(facts.device for facts in ranks.values())
    meeting.announce("exchange", exchange)
    stuck = False
    if exchange:
        stuck = not _exchange(meeting, need)
        ended = meeting.gather("speeds")
        spoken = {rank: Speeds(**values) for rank, values in ended.items() if values}
        seen = replace(seen, speeds=spoken)
        # Who hangs or is gone takes the others' exchange along: they have failed, too, and said so.
        blamed = ended if len(ended) < launch.world_size else spoken
        if blamed:
            sentences += findings.absent(seen, blamed, "did not get through the exchange of tensors")
        else:
            sentences.append(
                f"no rank got through the exchange of tensors in {meeting.seconds:g} s; NCCL_DEBUG=INFO says "
                "where it stops, and a larger --timeout gives it longer"
            )
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
    facts = rank_facts(meeting.launch, need)
    if facts.on_host is not None:
        facts = replace(facts, clock_seconds=meeting.clock_seconds())
    meeting.tell("facts", asdict(facts))
    stuck = meeting.hear("exchange", seconds) and not _exchange(meeting, need)
    return Outcome(meeting.hear("outcome", 2 * seconds), stuck=bool(stuck))


def _exchange(meeting: Meeting, need: Need) -> bool:
    """Measure beside this thread, which goes on if that hangs. Whether it ended."""
    from spikingbrain_train.runtime.accelerator import detect

    measured: list[Any] = []

    def measure() -> None:
        try:
            kind = need.accelerator if need.on_gpus else AcceleratorKind.cpu
            # Who waits for a rank that hangs gives up first, and can still say so: the other one is named.
            seconds = meeting.seconds / 2
            measured.append(asdict(bandwidth.measure(meeting.launch, detect(kind), meeting.store, seconds)))
        except (RuntimeError, PlatformError) as error:
            print(f"rank {meeting.launch.rank}: {first_line(error)}", flush=True)
            measured.append(None)

    thread = threading.Thread(target=measure, name="exchange", daemon=True)
    thread.start()
    thread.join(meeting.seconds)
    if measured:
        meeting.tell("speeds", measured[0])
    return bool(measured)


@contextmanager
def _with_token(need: Need) -> Iterator[Need]:
    """Leave the file that other hosts look for; where that cannot be, the facts say so of the folder."""
    token = f".health-check-{uuid.uuid4().hex}"
    path = nearest_folder(need.output_dir) / token
    try:
        path.touch()
    except OSError:
        token = ""
    try:
        yield replace(need, token=token)
    finally:
        with suppress(OSError):
            path.unlink()


def _facts(values: dict[str, Any]) -> RankFacts:
    on_host = values["on_host"]
    return RankFacts(**{**values, "on_host": None if on_host is None else HostFacts(**on_host)})
