"""A pipeline as a chain of Slurm jobs: one submission, and nobody has to stay logged in.

Every step that is not finished is a job, which begins when the one before has ended well (``afterok``). A job
that is preempted, warned of its time limit or loses its node is requeued under its number, and the next one
goes on waiting; where one fails, Slurm drops all behind it (``--kill-on-invalid-dep``). An array would not
do: its tasks share nodes and time, and it goes on behind a task that has failed.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.pipelines import slurm
from spikingbrain_train.pipelines.pipeline_file import PipelineFile, checkout
from spikingbrain_train.pipelines.plan import Pipeline
from spikingbrain_train.pipelines.runner import begin
from spikingbrain_train.pipelines.state import State
from spikingbrain_train.pipelines.steps import Step, own_command

SBATCH = "sbatch"
_STEP_SCRIPT = "scripts/slurm/step.sbatch"
_WAIT = ("--wait", "-W")


def submit_pipeline(
    file: PipelineFile, pipeline: Pipeline, state: State, words: Sequence[str], options: Sequence[str]
) -> list[tuple[Step, str]]:
    """Submit what is not finished.

    Args:
        file: the pipeline's.
        pipeline: its steps.
        state: of the pipeline; is told the jobs.
        words: name and overrides of the pipeline, as they were given: a job calls it by them.
        options: of sbatch, for steps that have no batch script of their own.

    Returns:
        The steps with the numbers of their jobs.

    Raises:
        ConfigurationError: a step finds out what later ones need, jobs are in the queue already, or this
            is no checkout.
        PlatformError: Slurm does not take a job; those before it are dropped again.
    """
    root = checkout()
    if root is None or root != Path.cwd():
        raise ConfigurationError(
            "the jobs call scripts/slurm of a checkout; submit from the root of one, as sbatch itself"
        )
    steps = [step for step in pipeline.steps if not state.is_done(step)]
    for step in steps:
        if step.values is not None:
            raise ConfigurationError(
                f"the step {step.name} finds out what later steps are told, which has to be known "
                f"before they are submitted; run that first (spikingbrain-pipeline run --step {step.name})"
            )
    refuse_queued(pipeline, state)
    for step in steps:
        begin(step, pipeline, state)
    jobs: list[str] = []
    try:
        for step in steps:
            jobs.append(slurm.submit(job_words(step, file, words, options, jobs[-1] if jobs else None)))
            state.records[step.name].job = jobs[-1]
        state.save(pipeline.steps)
        if jobs:
            slurm.release(jobs[0])
    except BaseException:
        for step in steps:
            state.records[step.name].job = ""
        slurm.cancel(jobs)
        state.save(pipeline.steps)
        raise
    return list(zip(steps, jobs, strict=True))


def refuse_queued(pipeline: Pipeline, state: State) -> None:
    """Nobody fills a folder that jobs in the queue are going to fill.

    Raises:
        ConfigurationError: naming them.
        PlatformError: steps that are not done were submitted, and Slurm does not say what is in its queue.
    """
    steps = state.jobs(pipeline.steps)
    if queued := slurm.ask(steps).queued():
        listed = ", ".join(f"{steps[job]} ({job}, {name.lower()})" for job, name in queued.items())
        raise ConfigurationError(
            f"steps of this pipeline are in Slurm's queue: {listed}; wait for them, or take them out "
            f"with scancel {' '.join(queued)}"
        )


def job_words(
    step: Step, file: PipelineFile, words: Sequence[str], options: Sequence[str], after: str | None
) -> list[str]:
    """What sbatch is given for a step.

    Args:
        step: of the pipeline.
        file: the pipeline's.
        words: name and overrides of the pipeline.
        options: of sbatch, for steps that have no batch script of their own.
        after: the job that has to end well before; None for the first one, which is held until all are in.
    """
    chain = [f"--job-name={Path(file.path).stem}-{step.name}"]
    chain += ["--hold"] if after is None else [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    if step.command[0] == SBATCH:  # its own script requeues itself; --wait is for those who wait
        return [*chain, *step.sbatch, *(word for word in step.command[1:] if word not in _WAIT)]
    run = own_command("pipeline", "run", *words, "--step", step.name)
    return [*chain, *options, *step.sbatch, _STEP_SCRIPT, *run]


def show_submission(
    file: PipelineFile, pipeline: Pipeline, state: State, words: Sequence[str], options: Sequence[str]
) -> None:
    """Print what would be submitted."""
    after = None
    for step in pipeline.steps:
        if state.is_done(step):
            continue
        command = [SBATCH, *job_words(step, file, words, options, after)]
        print(f"# {step.name}: {step.title}\n{shlex.join(command)}\n")
        after = f"<{step.name}>"
