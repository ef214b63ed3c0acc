"""What pipelines ask Slurm: to take a job, to drop some, and which of them are still in the queue."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence

from spikingbrain_train.errors import PlatformError

_SECONDS = 60


def _call(command: Sequence[str]) -> str:
    """What one of Slurm's programs prints.

    Raises:
        PlatformError: it is not installed, does not answer, or refuses.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except FileNotFoundError:
        raise PlatformError(
            f"{command[0]} is not installed here; go to a login node of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise PlatformError(f"{command[0]} has not answered for {_SECONDS} s; try again later") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise PlatformError(f"{command[0]} refuses: {said}")
    return done.stdout.strip()


def submit(words: Sequence[str]) -> str:
    """Submit a job and return its number. Raises PlatformError."""
    return _call(["sbatch", "--parsable", *words]).partition(";")[0]


def release(job: str) -> None:
    """Let a job that was submitted with --hold wait its turn. Raises PlatformError."""
    _call(["scontrol", "release", job])


def cancel(jobs: Iterable[str]) -> None:
    """Take jobs out of the queue. Raises PlatformError."""
    if numbers := list(jobs):
        _call(["scancel", *numbers])


def states(jobs: Iterable[str]) -> dict[str, str]:
    """Job -> its state (PENDING, RUNNING ...), for those that are still in the queue.

    Raises:
        PlatformError: Slurm does not say.
    """
    if not (numbers := set(jobs)):
        return {}
    # Not --jobs: it refuses all of them where it has forgotten one.
    lines = _call(["squeue", "--noheader", "--format=%A %T"]).splitlines()
    return {job: state for job, state in (line.split() for line in lines) if job in numbers}
