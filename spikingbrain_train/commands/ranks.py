"""Several ranks from one command: ``spikingbrain-train --nproc-per-node 8 ...``.

torchrun's agent (torch.distributed.run) starts and watches the ranks, in a thread of this process. What
differs from torchrun is the end: a signal is handed on to the ranks, which save however long that takes, and
this process ends with their exit code and without a traceback of the agent's own.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from spikingbrain_train.commands.start_signals import HANDED_ON, hold_back
from spikingbrain_train.config.command_line import DIVERGED, GIVEN_UP, START_AGAIN, USER_ERROR
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.reporting.activity import activity

if TYPE_CHECKING:
    import psutil
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

NPROC, NNODES = "nproc-per-node", "nnodes"
FLAGS = {
    NPROC: "ranks on this machine",
    NNODES: "machines; the same command runs on each",
    "node-rank": "which of them this is, from 0",
    "master-addr": "host of the first machine",
    "master-port": "a free port there",
    "rdzv-backend": "as torchrun",
    "rdzv-endpoint": "as torchrun",
    "rdzv-id": "as torchrun",
    "rdzv-conf": "as torchrun",
    "local-addr": "as torchrun",
    "log-dir": "folder of the ranks' output, with --redirects or --tee",
    "redirects": "as torchrun",
    "tee": "as torchrun",
    "local-ranks-filter": "as torchrun",
}
"""Flags of torchrun that are taken, each with a value. Not max-restarts: it would undo a request to stop."""
_ANNOUNCED = (USER_ERROR, DIVERGED, START_AGAIN, 128 + signal.SIGINT)
"""Exit codes of ranks that have said why they end."""


@dataclass(frozen=True)
class Ranks:
    """The launcher's part of a command line."""

    flags: dict[str, str]
    """Flag without its dashes -> value."""

    @property
    def words(self) -> list[str]:
        """The flags as torchrun takes them."""
        return [f"--{name}={value}" for name, value in self.flags.items()]

    def world_size(self) -> int | None:
        """Ranks in all, None where torchrun has yet to count devices or wait for machines.

        Raises:
            ConfigurationError: a number is none, or below 1.
        """
        size = 1
        for name, elastic in ((NPROC, ("auto", "cpu", "gpu", "xpu")), (NNODES, ())):
            value = self.flags.get(name, "1")
            if value in elastic or (name == NNODES and ":" in value):
                return None
            if not value.isdecimal() or int(value) < 1:
                raise ConfigurationError(f"--{name} is {value}; give a whole number of at least 1")
            size *= int(value)
        return size


def split(words: Sequence[str]) -> tuple[Ranks | None, list[str]]:
    """Take the launcher's flags out of a command line.

    Returns:
        The launcher's part, None where there is none, and all other words in their order.

    Raises:
        ConfigurationError: a flag lacks its value.
    """
    flags: dict[str, str] = {}
    others: list[str] = []
    waiting = iter(words)
    for word in waiting:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("_", "-")
        if not flag.startswith("--") or name not in FLAGS:
            others.append(word)
            continue
        if not equals:
            value = next(waiting, "")
        if not value or value.startswith("-"):
            raise ConfigurationError(f"--{name} needs a value: {FLAGS[name]}")
        flags[name] = value
    return (Ranks(flags) if flags else None), others


def launcher_of_command_line() -> Ranks | None:
    """The launcher's part of ``sys.argv``; the rest of it stays there.

    Raises:
        ConfigurationError: a flag lacks its value, or this process is a rank already.
    """
    launched, words = split(sys.argv[1:])
    if launched is not None and "RANK" in os.environ:
        flag = next(iter(launched.flags))
        raise ConfigurationError(
            f"--{flag} starts ranks, but a launcher has started this process as one; give it to that launcher"
        )
    sys.argv = [sys.argv[0], *words]
    return launched


def run_ranks(ranks: Ranks, command: Sequence[str]) -> None:
    """Start the ranks and wait for their end.

    Args:
        ranks: how many, and where they meet.
        command: name and arguments of a command of :mod:`spikingbrain_train.commands.table`.

    Raises:
        SystemExit: the exit code of the rank that failed first, 128 and more for one that a signal ended; 75
            where all that ended had saved and want to be started again.
        ConfigurationError: torchrun refuses the flags.
    """
    ended: list[BaseException] = []
    # Before torch is imported: an interrupt in the middle of that may be lost.
    with _Signals() as signals:
        with activity("importing torch"):
            from torch.distributed import run as torchrun
            from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        _quiet()
        arguments = torchrun.parse_args([*ranks.words, "-m", "spikingbrain_train", *command])

        def watch() -> None:
            hold_back()
            try:
                torchrun.run(arguments)
            except BaseException as error:
                ended.append(error)

        if signals.waiting:
            raise SystemExit(128 + signals.waiting[0])
        # In a thread the agent installs no handlers, which would raise in the middle of its work.
        agent = threading.Thread(target=watch, name="agent")
        agent.start()
        while agent.is_alive():
            agent.join(0.2)
            signals.hand_on()
    for error in ended:
        if isinstance(error, ChildFailedError):
            raise SystemExit(exit_code(error))
        if isinstance(error, ValueError):  # what it says of wrong flags
            raise ConfigurationError(" ".join(str(error).split())) from error
        raise error


def _quiet() -> None:
    """The agent's log repeats what the ranks have said; LOGLEVEL, its own variable, brings it back."""
    if "LOGLEVEL" in os.environ:
        return
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(
            ("torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.run")
        ):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def exit_code(error: ChildFailedError) -> int:
    """The code to end with; a rank that has not said why it ends is named."""
    failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
    # Of the others the agent ends with SIGTERM those that have no handler yet: they are no cause.
    causes = [failure for failure in failures if failure[1].exitcode != -signal.SIGTERM]
    failures = causes or failures
    # Who has missed a rank says so, and ends it if it is still there.
    if any(failure[1].exitcode == USER_ERROR for failure in failures):
        failures = [failure for failure in failures if failure[1].exitcode != -GIVEN_UP]
    unannounced = [failure for failure in failures if failure[1].exitcode not in _ANNOUNCED]
    others = [failure for failure in failures if failure[1].exitcode != START_AGAIN]
    rank, failure = (unannounced or others or failures)[0]
    code = failure.exitcode
    if code < 0:
        name = signal.Signals(-code).name
        why = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
        _say(f"rank {rank} was ended by {name}{why}; the other ranks were stopped")
        return 128 - code
    if code not in _ANNOUNCED:
        _say(f"rank {rank} failed with exit code {code}, see above; the other ranks were stopped")
    return code


def _say(sentence: str) -> None:
    sys.stderr.write(f"error: {sentence}\n")
    sys.stderr.flush()


class _Signals:
    """Hands signals on to the ranks: each stands in a session of its own, so this process alone gets them."""

    def __init__(self) -> None:
        self.waiting: list[signal.Signals] = []
        """What no rank has got yet."""
        self._before: dict[int, object] = {}

    def __enter__(self) -> _Signals:
        for number in HANDED_ON:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def hand_on(self) -> None:
        """Send what has come to the ranks, as soon as there are some."""
        import psutil

        if not self.waiting:
            return
        # Others that this process has started, or a rank that is being started, would take it with them.
        started = [child for child in psutil.Process().children() if _is_rank(child)]
        while started and self.waiting:
            number = self.waiting.pop(0)
            for rank in started:
                with suppress(psutil.NoSuchProcess):
                    rank.send_signal(number)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.waiting.append(HANDED_ON[signal.Signals(number)])


def _is_rank(process: psutil.Process) -> bool:
    import psutil

    with suppress(psutil.Error):
        return "LOCAL_RANK" in process.environ()
    return False
