"""Runs the steps of a pipeline once.

A second run skips what is finished, and an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from spikingbrain_train.config.command_line import DIVERGED, START_AGAIN, USER_ERROR
from spikingbrain_train.pipelines.pipeline_file import WhenChanged
from spikingbrain_train.pipelines.plan import Pipeline
from spikingbrain_train.pipelines.state import State, StepRecord
from spikingbrain_train.pipelines.steps import Step, printable
from spikingbrain_train.reporting.activity import format_duration
from spikingbrain_train.storage.processes import ProcessName

_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that the running command gets, too: a run saves and ends. Ctrl-C reaches it by itself."""
_PR_SET_PDEATHSIG = 1
"""Of <sys/prctl.h>: the signal that a process gets when its parent dies."""
_GOES_ON = "finished steps are kept, and the same command goes on from here"


def run_pipeline(
    pipeline: Pipeline, state: State, plan_again: Callable[[], Pipeline], *, only: str | None = None
) -> None:
    """Run what is not finished yet.

    Args:
        pipeline: the steps.
        state: of the pipeline; is kept up to date.
        plan_again: makes the pipeline anew, when a step has found out what later ones need.
        only: the one step to run; all that it builds on has to be finished.

    Raises:
        SpikingBrainError: what a step has found out does not fit the later ones.
        SystemExit: a command failed or was interrupted; the sentence is printed, the code is its own.
    """
    pipeline.output.mkdir(parents=True, exist_ok=True)
    number = 0
    while number < len(pipeline.steps):
        step = pipeline.steps[number]
        number += 1
        if only is not None and step.name != only:
            continue
        heading = f"[{number}/{len(pipeline.steps)}] {step.title}"
        if state.is_done(step):
            print(f"{heading}: done ({format_duration(state.records[step.name].seconds)})", flush=True)
            continue
        if step.name in state.records and not state.goes_on(step):
            heading = f"{heading} ({state.describe(step)})"
        begin(step, pipeline, state)
        print(f"\n{heading}\n  {printable(step.command)}\n", flush=True)
        _run(step, state, pipeline.steps)
        if step.values is not None:
            pipeline = plan_again()


def begin(step: Step, pipeline: Pipeline, state: State) -> None:
    """Clear away what stands in a step's way, and remember that it is begun as it is now.

    An interrupted training goes on from its own checkpoints; everything else starts again.
    """
    goes_on = state.goes_on(step)
    # The job itself begins its step; whoever runs it elsewhere has nothing to do with a job of before.
    job = state.records[step.name].job if goes_on else ""
    if job != os.environ.get("SLURM_JOB_ID"):
        job = ""
    if not (goes_on and step.train_iters is not None):
        for path in step.makes:
            # What lies outside of the pipeline's folder may be somebody else's.
            ours = path.resolve().is_relative_to(pipeline.output.resolve())
            if goes_on or (ours and pipeline.when_changed is WhenChanged.remove):
                _remove(path)
            else:
                _set_aside(path)
        state.records[step.name] = StepRecord.of(step)
    state.records[step.name].job = job


def _run(step: Step, state: State, steps: Sequence[Step]) -> None:
    record = state.records[step.name]
    started, before = time.monotonic(), record.seconds
    record.exit_code = None
    # Before the command too, so that what an interrupted one leaves is known as ours.
    state.save(steps)

    def begun(pid: int) -> None:
        record.process = ProcessName.of(pid)
        state.save(steps)

    try:
        code, asked = call(step.command, begun)
        record.exit_code = code
    finally:
        record.process = None
        record.seconds = before + time.monotonic() - started
        state.save(steps)
    if code == 0 and step.is_complete():
        if asked is not None:
            _end(f"stopped by {asked.name} after the step {step.name}", 128 + asked)
        return
    if asked is not None:
        _end(f"the step {step.name} was interrupted by {asked.name}", code or 128 + asked)
    if code == START_AGAIN:
        _end(f"the step {step.name} was interrupted", code)
    if code in (USER_ERROR, DIVERGED):  # the command has printed its sentence
        _end(f"the step {step.name} failed with exit code {code}, see above", code)
    if code == 0:
        _end(f"error: the step {step.name} left no complete result, see above", USER_ERROR)
    if code == -signal.SIGKILL:
        _end(f"error: the step {step.name} was killed, as the system does when memory runs out", code)
    _end(f"error: the step {step.name} failed with exit code {code}, see above", code)


def _end(sentence: str, code: int) -> NoReturn:
    print(f"{sentence}; {_GOES_ON}", file=sys.stderr, flush=True)
    # A command that a signal ended has a negative code here, and this one in a shell.
    raise SystemExit(code if code >= 0 else 128 - code)


def call(
    command: Sequence[str], begun: Callable[[int], None] = lambda pid: None
) -> tuple[int, signal.Signals | None]:
    """Run a command to its end, in the foreground.

    Whoever asks this process to stop asks the command, too, which may have something to save first; a second
    Ctrl-C ends it. Where this process is killed, Linux sends the command SIGTERM.

    Args:
        command: its words.
        begun: is told its process.

    Returns:
        Its exit code, and the signal that asked it to stop.
    """
    asked: list[signal.Signals] = []
    running: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        asked.append(signal.Signals(number))
        for process in running:
            process.send_signal(number)

    def note(number: int, _frame: FrameType | None) -> None:
        asked.append(signal.Signals(number))  # the terminal has sent it to the command, too

    # Before the command starts: a signal in between would leave it behind, alone.
    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, note)
    try:
        early = [*asked]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent()) as process:
            for number in asked:
                if number in _PASSED_ON or number in early:
                    process.send_signal(number)
            running.append(process)
            begun(process.pid)
            process.wait()
        return process.returncode, asked[0] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> Callable[[], None] | None:
    """What a child does before its command begins, so that this process's death ends it; Linux knows how."""
    if sys.platform != "linux":
        return None
    parent, prctl = os.getpid(), ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # it was killed in between
            os._exit(128 + signal.SIGTERM)

    return ask


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _set_aside(path: Path) -> None:
    """Rename what an earlier command has made."""
    if not path.exists():
        return
    number, aside = 1, path.with_name(f"{path.name}.superseded")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.superseded-{number}")
    path.rename(aside)
    print(f"{path} is set aside as {aside.name}", flush=True)
