"""What pipelines ask Slurm: to take a job, to drop some, and what has become of them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from spikingbrain_train.errors import PlatformError

_SECONDS = 60
_ENDED = {
    "BOOT_FAIL": "failed, as its node did not start",
    "CANCELLED": "was cancelled",
    "COMPLETED": "ended well, but its result is not complete",
    "DEADLINE": "was ended by its deadline",
    "FAILED": "failed",
    "NODE_FAIL": "failed with its node",
    "OUT_OF_MEMORY": "ran out of memory",
    "PREEMPTED": "was preempted",
    "REVOKED": "was revoked",
    "TIMEOUT": "was ended by its time limit",
}
"""States in which a job has left the queue."""


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


@dataclass(frozen=True)
class Jobs:
    """What has become of some jobs."""

    states: Mapping[str, str] = field(default_factory=dict)
    """Job -> PENDING, RUNNING, FAILED ..., of those that Slurm knows."""
    unknown: str = "Slurm no longer knows it"
    """Why nothing is known of the others."""

    def queued(self) -> dict[str, str]:
        """Those that wait or run, with their states."""
        return {job: state for job, state in self.states.items() if state not in _ENDED}

    def end(self, job: str) -> str | None:
        """How a job has left the queue, in words; None where it is there, or nobody knows."""
        state = _ENDED.get(self.states.get(job, ""))
        return state and f"job {job} {state}"

    def describe(self, job: str) -> str:
        """What a job that was submitted does now."""
        state = self.states.get(job)
        doing = f"unknown: {self.unknown}" if state is None else state.lower().replace("_", " ")
        return self.end(job) or f"submitted as job {job} ({doing})"


def ask(jobs: Iterable[str]) -> Jobs:
    """Ask Slurm what has become of some jobs, of all at once.

    Raises:
        PlatformError: Slurm does not say what is in its queue.
    """
    if not (numbers := set(jobs)):
        return Jobs()
    # Not --jobs: it refuses all of them where it has forgotten one. Ended jobs are shown for some minutes.
    said = _call(["squeue", "--noheader", "--states=all", "--format=%A %T"])
    states = {job: state for job, state in map(str.split, said.splitlines()) if job in numbers}
    if forgotten := sorted(numbers - set(states)):
        # Many clusters keep no accounts, or none that users may read.
        with suppress(PlatformError):
            words = ["--noheader", "--allocations", "--parsable2", "--format=JobIDRaw,State"]
            said = _call(["sacct", *words, f"--jobs={','.join(forgotten)}"])
            for job, _, state in (line.partition("|") for line in said.splitlines()):
                states[job] = state.split()[0]  # CANCELLED by 1000
    return Jobs(states)
