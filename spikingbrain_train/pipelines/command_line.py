"""Arguments of ``spikingbrain-pipeline``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from spikingbrain_train.config.command_line import command_parser, user_errors
from spikingbrain_train.errors import ConfigurationError, PlatformError
from spikingbrain_train.pipelines import slurm
from spikingbrain_train.pipelines.pipeline_file import PipelineFile, load_pipeline
from spikingbrain_train.pipelines.plan import Pipeline, plan_pipeline, resolved_variables
from spikingbrain_train.pipelines.references import did_you_mean
from spikingbrain_train.pipelines.runner import run_pipeline
from spikingbrain_train.pipelines.state import State
from spikingbrain_train.pipelines.steps import printable
from spikingbrain_train.pipelines.submission import refuse_queued, show_submission, submit_pipeline
from spikingbrain_train.reporting.activity import format_duration
from spikingbrain_train.storage.run_lock import run_lock

_DESCRIPTION = """\
Run the steps that a YAML file lists: preprocess, convert, train, evaluate, export ... Every step is a command
that is printed before it runs and that can be run alone. A second call skips what is finished, goes on where
the first one stopped, and does again what has changed, with all that builds on it.
"""

_EXAMPLES = """\
examples:
  # what `make demo` runs
  spikingbrain-pipeline run conf/pipeline/demo.yaml output=outputs/mine budget=30

  # the steps of the 7B with their commands, and what is missing for them
  spikingbrain-pipeline dry-run conf/pipeline/spikingbrain_7b.yaml

  # its steps as a chain of Slurm jobs, each of which waits for the one before
  spikingbrain-pipeline submit spikingbrain_7b --sbatch='--gpus-per-node=1 --cpus-per-task=16' model=...

  # how far it is
  spikingbrain-pipeline status conf/pipeline/demo.yaml output=outputs/mine

The name of a file in conf/pipeline does instead of its path. Arguments name=value set variables of the
pipeline, its output folder, or settings of a step: steps.<step>.<setting>=<value>.
"""


def pipelines_parser() -> argparse.ArgumentParser:
    """The commands of ``spikingbrain-pipeline``."""
    parser = command_parser(_DESCRIPTION, _EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{run,submit,dry-run,status}")
    runs = commands.add_parser("run", help="run the steps that are not finished")
    runs.add_argument("--dry-run", action="store_true", help="the same as the command dry-run")
    runs.add_argument("--fresh", action="store_true", help="start over: no step counts as finished")
    runs.add_argument("--step", metavar="NAME", help="run this one only, if what it builds on is finished")
    submits = commands.add_parser("submit", help="submit the steps that are not finished as Slurm jobs")
    submits.add_argument(
        "--sbatch",
        default="",
        metavar="OPTIONS",
        help="of sbatch, for steps without a batch script of their own: '--time=02:00:00 --gpus-per-node=1'",
    )
    submits.add_argument(
        "--dry-run", action="store_true", help="print the calls of sbatch and submit nothing"
    )
    dry_runs = commands.add_parser("dry-run", help="list the steps with their commands and run nothing")
    statuses = commands.add_parser("status", help="list the steps and how far they are")
    for command in (runs, submits, dry_runs, statuses):
        command.add_argument("pipeline", help="YAML file, or the name of one in conf/pipeline")
        command.add_argument("overrides", nargs="*", metavar="name=value", help="variables and settings")
    return parser


def pipelines(arguments: Sequence[str] | None = None) -> None:
    """``spikingbrain-pipeline``."""
    parsed = pipelines_parser().parse_args(arguments)
    with user_errors():
        file = load_pipeline(parsed.pipeline, parsed.overrides)
        if parsed.command == "status":
            show_status(file)
        elif parsed.command == "submit":
            words = [parsed.pipeline, *parsed.overrides]
            submit(file, words, _options(parsed.sbatch), dry_run=parsed.dry_run)
        elif parsed.command == "dry-run" or parsed.dry_run:
            show_plan(file)
        else:
            run(file, fresh=parsed.fresh, only=parsed.step)


def run(file: PipelineFile, *, fresh: bool = False, only: str | None = None) -> None:
    """Run a pipeline, then print what it shows.

    Args:
        file: the pipeline.
        fresh: nothing counts as finished.
        only: a step that is run alone, as in the job that a submission made of it.

    Raises:
        SpikingBrainError: the pipeline cannot be run as it is.
        SystemExit: a step failed.
    """
    state = _state_of(file)

    def plan() -> Pipeline:
        return plan_pipeline(file, state.is_done)

    pipeline = plan()
    if only is None:
        refuse_queued(pipeline, state)
    if fresh:
        state.records.clear()
        pipeline = plan()
    if only is not None:
        _check_alone(pipeline, state, only)
    with run_lock(pipeline.output):
        State(pipeline.output).refuse_running()
        if not fresh:
            state.read()  # another pipeline may have ended in between
        run_pipeline(pipeline, state, plan, only=only)
        if only is not None:
            return
        if pipeline.show is None:
            print(f"\nall {len(pipeline.steps)} steps are done, in {pipeline.output}", flush=True)
        else:
            print(f"\n{pipeline.show.read_text(encoding='utf-8').rstrip()}", flush=True)


def _check_alone(pipeline: Pipeline, state: State, name: str) -> None:
    """Raises ConfigurationError where there is no such step, or what it builds on is not finished."""
    steps = {step.name: step for step in pipeline.steps}
    if name not in steps:
        raise ConfigurationError(
            f"{pipeline.path}: there is no step {name}{did_you_mean(name, steps) or ';'} there are "
            f"{', '.join(steps)}"
        )
    waiting = [other for other in steps[name].needs if other in steps and not state.is_done(steps[other])]
    if waiting:
        raise ConfigurationError(
            f"{pipeline.path}: the step {name} builds on {' and '.join(waiting)}, which is not "
            "finished; run that first"
        )


def submit(
    file: PipelineFile, words: Sequence[str], options: Sequence[str], *, dry_run: bool = False
) -> None:
    """Submit a pipeline to Slurm, a job a step, and print the jobs.

    Args:
        file: the pipeline.
        words: its name and overrides, as they were given.
        options: of sbatch, for steps that have no batch script of their own.
        dry_run: print what would be submitted.

    Raises:
        SpikingBrainError: the pipeline cannot be run as it is, or Slurm does not take it.
    """
    state = _state_of(file)
    pipeline = plan_pipeline(file, state.is_done, incomplete=dry_run)
    if dry_run:
        show_submission(file, pipeline, state, words, options)
        for sentence in pipeline.lacking:
            print(f"missing: {sentence}")
        return
    with run_lock(pipeline.output):
        state.read()  # another submission may have come in between
        jobs = submit_pipeline(file, pipeline, state, words, options)
    if not jobs:
        print(f"all {len(pipeline.steps)} steps are done, in {pipeline.output}", flush=True)
        return
    width = max(len(step.name) for step, _ in jobs)
    for step, job in jobs:
        print(f"{step.name.ljust(width)}  job {job}")
    done = len(pipeline.steps) - len(jobs)
    print(
        f"{len(jobs)} jobs, each behind the one before; {done} steps are done. Take all back: scancel "
        f"{' '.join(job for _, job in jobs)}",
        flush=True,
    )


def show_plan(file: PipelineFile) -> None:
    """Print every step with its command and how far it is, and what is missing for a run."""
    pipeline, state = _looked_at(file)
    for number, step in enumerate(pipeline.steps, start=1):
        print(f"# [{number}/{len(pipeline.steps)}] {step.name}: {step.title} ({state.describe(step)})")
        print(f"{printable(step.command)}\n")
    if any(step.values is not None and not state.is_done(step) for step in pipeline.steps):
        finds = next(step.name for step in pipeline.steps if step.values is not None)
        print(f"# What the step {finds} finds out is assumed: later commands may change with it.")
    for sentence in pipeline.lacking:
        print(f"missing: {sentence}")


def show_status(file: PipelineFile) -> None:
    """Print a line a step: how far it is, and how long it has taken."""
    pipeline, state = _looked_at(file)
    try:
        jobs = slurm.ask(state.jobs(pipeline.steps))
    except PlatformError as error:
        jobs = slurm.Jobs(unknown=str(error))
    width = max(len(step.name) for step in pipeline.steps)
    done = 0
    for step in pipeline.steps:
        record = state.records.get(step.name)
        took = f" ({format_duration(record.seconds)})" if record is not None and record.seconds else ""
        done += state.is_done(step)
        print(f"{step.name.ljust(width)}  {state.describe(step, jobs)}{took}")
    print(f"{done} of {len(pipeline.steps)} steps are done, in {pipeline.output}")


def _options(text: str) -> list[str]:
    """The words of --sbatch. Raises ConfigurationError where a quote is left open."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigurationError(
            f"--sbatch={text} is not a list of options ({error}); close the quote"
        ) from None


def _state_of(file: PipelineFile) -> State:
    return State(Path(str(resolved_variables(file)["output"])))


def _looked_at(file: PipelineFile) -> tuple[Pipeline, State]:
    state = _state_of(file)
    return plan_pipeline(file, state.is_done, incomplete=True), state
