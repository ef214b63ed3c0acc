"""How every command of this project presents itself, and how it ends.

One line ``error: <sentence>`` and exit code 2 for what a user can fix, 3 for a run that diverged, a traceback
for what is a defect of ours.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from spikingbrain_train.errors import NumericalError, SpikingBrainError

USER_ERROR = 2
"""Exit code for an error that the user can fix (argparse's own code for a wrong command line)."""
DIVERGED = 3
"""Exit code of a run that met NaN or infinity: started again as it is, it would meet them again."""
START_AGAIN = 75
"""Exit code of a run that was asked to stop and has saved: the same command goes on (EX_TEMPFAIL)."""
GIVEN_UP = signal.SIGALRM
"""Ends a rank that its peers have named as lost; SIGKILL is what the system sends when memory runs out."""

_ADVICE = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "raise the quota or choose another folder",
    errno.EACCES: "change its permissions or choose another path",
    errno.EPERM: "change its permissions or choose another path",
    errno.EROFS: "choose a path on a writable file system",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another path",
    errno.EISDIR: "a folder stands where a file is needed; choose another path",
    errno.EEXIST: "remove it or choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def called_as() -> str:
    """What a usage line calls the running command: the file or the words that started it."""
    return sys.argv[0].rpartition(os.sep)[2]


def command_parser(description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser for the running command, whose help shows both texts as they are written."""
    return argparse.ArgumentParser(
        prog=called_as(),
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def sentence_of(error: BaseException) -> str | None:
    """The sentence for an error that the user can fix, None for any other.

    Besides SpikingBrainError these are operating-system errors over a named file (missing, forbidden ...) and
    a full disk, which the system reports without a name.
    """
    if isinstance(error, SpikingBrainError):
        return " ".join(str(error).split())
    if not isinstance(error, OSError) or error.errno not in _ADVICE:
        return None
    advice = _ADVICE[error.errno]
    if error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}; {advice}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror} while writing; {advice}"
    return None


def interrupts_end_at_once() -> None:
    """From here on Ctrl-C ends the process with 130, wherever it is: for what has nothing to undo.

    Raised among imports, or while libraries compose settings, KeyboardInterrupt may come out as another error
    or get lost. A handler of the caller's own stays, as does that of a command in the background.
    """
    _set_interrupt(_end_at_once)


def _end_at_once(_number: int, _frame: FrameType | None) -> None:
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\n")  # behind the status line and the terminal's ^C
    os._exit(128 + signal.SIGINT)


def _set_interrupt(handler: Callable[[int, FrameType | None], object]) -> Any:
    """Set the handler of SIGINT where Python's or this module's is; returns that, None where none was set."""
    before = signal.getsignal(signal.SIGINT)
    if before not in (signal.default_int_handler, _end_at_once):
        return None
    if threading.current_thread() is not threading.main_thread():
        return None
    signal.signal(signal.SIGINT, handler)
    return before


def _say(sentence: str) -> None:
    # One write call, so that the lines of several ranks do not run into each other.
    sys.stderr.write(f"error: {sentence}\n")
    sys.stderr.flush()


@contextmanager
def user_errors(same_on_all_ranks: bool = False) -> Iterator[None]:
    """End the process with one sentence and an exit code when the body raises an error that the user can fix.

    Args:
        same_on_all_ranks: the body decides from the command line and shared files only, so every rank of a
            node comes to the same end by itself. Then only local rank 0 prints, and SIGTERM waits until the
            body is through: a launcher that stops all ranks when the first one ends would else stop rank 0
            before it has spoken. Ctrl-C ends the process at once, as it has nothing to undo. Otherwise every
            rank that fails prints, because no other may know, and Ctrl-C raises KeyboardInterrupt.

    Raises:
        SystemExit: code 2 for errors that the user can fix, 3 for NumericalError, 130 for an interrupt from
            the keyboard, 141 when the reader of standard output has left.
        Exception: any other error, unchanged.
    """
    # Without a launcher there is no rank to wait for.
    hold = same_on_all_ranks and "LOCAL_RANK" in os.environ
    if hold:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    handler = _set_interrupt(_end_at_once if same_on_all_ranks else signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:
        # The reader of our output (`| head`) has left; Python would complain again as it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        rank = os.environ.get("RANK")
        if not same_on_all_ranks:
            _say(f"{sentence} (rank {rank})" if rank not in (None, "0") else sentence)
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            _say(sentence)
        # SIGTERM stays held back: every rank leaves with its own exit code.
        raise SystemExit(DIVERGED if isinstance(error, NumericalError) else USER_ERROR) from None
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
    if hold:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
