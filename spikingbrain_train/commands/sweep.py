"""``spikingbrain-train --multirun``: a process a job, one after the other, or an array of Slurm jobs.

Every job is checked before the first one starts. A job that fails leaves the others their turn; what has
ended well is not repeated when the same command is given again, and what was interrupted goes on.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from spikingbrain_train.commands.ranks import Ranks
from spikingbrain_train.commands.sweep_jobs import Job, plan_jobs
from spikingbrain_train.config.command_line import START_AGAIN, user_errors
from spikingbrain_train.errors import ConfigurationError, PlatformError
from spikingbrain_train.pipelines.runner import call
from spikingbrain_train.pipelines.steps import own_command, printable
from spikingbrain_train.reporting.activity import format_duration
from spikingbrain_train.storage.durable_files import write_text_durably

SUBMIT = "--submit"
ARGUMENTS_FOLDER = "SWEEP_ARGUMENTS"
"""Variable for scripts/slurm/launch.sh: the folder with ``<task>.args``, an argument a line."""
_SHOWING = (
    "--cfg",
    "-c",
    "--info",
    "--hydra-help",
    "--help",
    "-h",
    "--shell-completion",
    "-sc",
    "--run",
    "-r",
)


def sweep(words: Sequence[str], ranks: Ranks | None, *, dry_run: bool) -> None:
    """Run the jobs that a command line asks for, or list them.

    Args:
        words: the command line behind ``spikingbrain-train``, ``--submit`` among it.
        ranks: what each job starts.
        dry_run: list the jobs and start nothing.

    Raises:
        SpikingBrainError: a job cannot run as it is; none has been started.
        SystemExit: the exit code of the first job that failed; 130 after Ctrl-C; 75 where a job was asked to
            stop and has saved.
    """
    if "RANK" in os.environ:
        raise ConfigurationError(
            "--multirun starts a process a job, and a launcher has started this process as one rank; start "
            "spikingbrain-train --multirun --nproc-per-node N ... without it: every job gets N ranks"
        )
    submit, words = _submit(words)
    for word in words:
        if word.partition("=")[0] in _SHOWING:
            raise ConfigurationError(f"{word} shows one run; leave --multirun and the lists of values out")
    dry_run = dry_run or "dry_run=true" in words
    settings = [word for word in words if not word.startswith("dry_run=")]
    jobs = plan_jobs(settings, ranks, elsewhere=submit is not None)
    if submit is not None:
        _submit_array(jobs, submit, ranks, dry_run)
    elif dry_run:
        for number, job in enumerate(jobs, start=1):
            print(f"# [{number}/{len(jobs)}] {' '.join(job.varied)}\n{printable(_command(job, ranks))}")
    else:
        with user_errors():
            _run(jobs, ranks)


def _command(job: Job, ranks: Ranks | None) -> list[str]:
    return own_command("train", *(ranks.words if ranks is not None else ()), *job.words)


def _run(jobs: list[Job], ranks: Ranks | None) -> None:
    ended: list[tuple[int, float]] = []
    asked = None
    for number, job in enumerate(jobs, start=1):
        command = _command(job, ranks)
        print(f"\n[{number}/{len(jobs)}] {' '.join(job.varied)}\n  {printable(command)}\n", flush=True)
        started = time.monotonic()
        code, asked = call(command)
        ended.append((code if code >= 0 else 128 - code, time.monotonic() - started))
        if asked is not None or code == START_AGAIN:
            break
    print(_summary(jobs, ended), flush=True)
    last = ended[-1][0]
    if asked is signal.SIGINT:
        _say("interrupted: the sweep ends here; the same command goes on, and repeats nothing that is done")
        raise SystemExit(128 + signal.SIGINT)
    if asked is not None or last == START_AGAIN:
        _say("a job was asked to stop: the sweep ends here; the same command goes on")
        raise SystemExit(last or 128 + (asked or 0))
    failed = [code for code, _ in ended if code]
    if failed:
        raise SystemExit(failed[0])


def _summary(jobs: list[Job], ended: list[tuple[int, float]]) -> str:
    rows = []
    for job, end in zip(jobs, [*ended, *[None] * len(jobs)], strict=False):
        state = "not started" if end is None else _state(end[0])
        took = "" if end is None else format_duration(end[1])
        rows.append((state, took, str(job.output_dir), " ".join(job.varied)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows]
    done = [job for job, (code, _) in zip(jobs, ended, strict=False) if code == 0]
    if len(done) > 1:
        command = ["spikingbrain-plot", "--compare", *(str(job.output_dir) for job in done)]
        lines.append(f"compare them: {shlex.join(command)}")
    return "\n".join([f"\n{len(done)} of {len(jobs)} jobs are done", *lines])


def _state(code: int) -> str:
    return {0: "done", START_AGAIN: "stopped, saved", 130: "interrupted"}.get(code, f"failed ({code})")


def _submit(words: Sequence[str]) -> tuple[list[str] | None, list[str]]:
    """The words of ``--submit``, and all others."""
    others: list[str] = []
    found: str | None = None
    waiting = iter(words)
    for word in waiting:
        flag, equals, value = word.partition("=")
        if flag == SUBMIT:
            found = value if equals else next(waiting, "")
        else:
            others.append(word)
    if found is None:
        return None, others
    command = shlex.split(found)
    if len(command) < 2:
        raise ConfigurationError(
            f"{SUBMIT} takes what submits one run, quoted: 'sbatch --nodes=4 scripts/slurm/nvidia.sbatch'"
        )
    return command, others


def _submit_array(jobs: list[Job], submit: list[str], ranks: Ranks | None, dry_run: bool) -> None:
    """One array of Slurm jobs, of which each task finds its arguments in a file of its own."""
    if ranks is not None:
        flag = next(iter(ranks.flags))
        raise ConfigurationError(
            f"--{flag} does not go with {SUBMIT}, whose script starts as many ranks as Slurm gives it GPUs"
        )
    folder = jobs[0].output_dir.parent / "sweep"
    command = [submit[0], f"--array=0-{len(jobs) - 1}", f"--export=ALL,{ARGUMENTS_FOLDER}={folder.resolve()}"]
    command += submit[1:]
    if dry_run:
        for number, job in enumerate(jobs):
            print(f"# task {number}: {' '.join(job.varied)}\n#   {shlex.join(job.words)}")
        print(shlex.join(command))
        return
    if shutil.which(submit[0]) is None:
        raise PlatformError(
            f"{SUBMIT} names {submit[0]}, which is not installed here; submit from a login node"
        )
    for number, job in enumerate(jobs):
        write_text_durably(_made(folder) / f"{number}.args", "\n".join(job.words) + "\n")
    print(f"{len(jobs)} jobs, their arguments in {folder}/*.args\n{shlex.join(command)}", flush=True)
    raise SystemExit(subprocess.run(command).returncode)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _say(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()
