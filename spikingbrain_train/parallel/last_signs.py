"""What a rank last said of itself: how far it was, where its process is, what it was doing.

A rank that is stopped or hangs cannot be asked any more, so each says it all the time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from spikingbrain_train.config.command_line import GIVEN_UP

_FRAMES = 20
"""Innermost frames of a stack that are kept."""
_WAITING = (
    "/torch/distributed/",
    "/megatron/core/distributed/",
    "/megatron/core/optimizer/",
    "/megatron/core/pipeline_parallel/p2p_communication.py",
    "/megatron/core/tensor_parallel/",
    "/spikingbrain_train/parallel/",
    "/spikingbrain_train/runtime/collective_waits.py",
)
"""Files whose functions wait for other ranks."""
_AFTERWARDS = "/spikingbrain_train/parallel/heartbeats.py"
"""Where a rank is that has waited in vain."""
_STATES = {
    "T": "is stopped by a signal",
    "t": "is stopped by a debugger",
    "D": "waits for a disk, a network drive or a driver",
    "Z": "has ended",
}


@dataclass(frozen=True)
class Sign:
    """What a rank has written last."""

    beats: int
    """How often it has written."""
    iteration: int
    """Steps that it had done."""
    host: str = ""
    pid: int = 0
    stack: list[str] = field(default_factory=list)
    """Of its main thread at that moment, the innermost frame last; then of a thread that it waits for."""

    @classmethod
    def of_this_process(cls) -> Sign:
        """Of a process that has said nothing yet."""
        return cls(beats=0, iteration=0, host=socket.gethostname(), pid=os.getpid())

    def next(self, beats: int, iteration: int) -> Sign:
        """The next one of this process."""
        return replace(self, beats=beats, iteration=iteration, stack=stack_of(threading.main_thread()))

    @classmethod
    def read(cls, written: bytes) -> Sign:
        """What :meth:`write` has made."""
        return cls(**json.loads(written))

    def write(self) -> str:
        """As text for the store."""
        return json.dumps(asdict(self))

    @property
    def waits_for_others(self) -> bool:
        """Whether it was in a collective: the one that hangs the others is not."""
        has_waited = any(_AFTERWARDS in frame for frame in self.stack)
        return has_waited or any(part in frame for frame in self.stack[-1:] for part in _WAITING)

    def describe(self, rank: int) -> str:
        """Rank, host, process, last step, and its stack below that."""
        frames = "".join(f"\n  {frame}" for frame in self.stack)
        return (
            f"rank {rank} on {self.host} (process {self.pid}), iteration {self.iteration} done, was last "
            f"seen at:{frames}"
        )

    def state(self, rank: int) -> str | None:
        """What becomes of its process, in words; None where this host cannot tell."""
        if self.host != socket.gethostname():
            return None
        if not self._is_there(rank):
            return f"process {self.pid} has ended" if Path("/proc/self/stat").exists() else None
        with suppress(OSError, IndexError):
            letter = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            return f"process {self.pid} {_STATES.get(letter, 'runs, but does not answer')}"
        return None

    def end(self, rank: int) -> None:
        """End its process if it is on this host: it would not hear that it is asked to end.

        Launchers wait half a minute before they do so.
        """
        if self.host == socket.gethostname() and self._is_there(rank):
            with suppress(OSError):
                os.kill(self.pid, GIVEN_UP)
                os.kill(self.pid, signal.SIGCONT)  # a process that is stopped ends once it goes on

    def _is_there(self, rank: int) -> bool:
        """Whether the process is still that rank of this run; containers of one host name count apart."""
        with suppress(OSError):
            variables = Path(f"/proc/{self.pid}/environ").read_bytes().split(b"\0")
            port = os.environ.get("MASTER_PORT", "")
            return {f"RANK={rank}".encode(), f"MASTER_PORT={port}".encode()} <= set(variables)
        return False


def stack_of(thread: threading.Thread) -> list[str]:
    """File, line and function of a thread's innermost frames, the innermost last; no file is read for it.

    Those of a thread that it joins come behind them: what a rank does that waits for work of its own beside
    the loop is what the work does.
    """
    frame = sys._current_frames().get(thread.ident or 0)
    found: list[str] = []
    joined: threading.Thread | None = None
    while frame is not None and len(found) < _FRAMES:
        code = frame.f_code
        found.append(f"{code.co_filename}:{frame.f_lineno} {code.co_name}")
        if (code.co_filename, code.co_name) == (threading.__file__, "join"):
            joined = frame.f_locals.get("self")
        frame = frame.f_back
    behind = [] if joined is None or joined is thread else stack_of(joined)
    return found[::-1] + behind
