"""Flags of spikingbrain-evaluate for multiple-choice tasks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.measurement import Measurement, Part
from spikingbrain_train.evaluation.multiple_choice.plan import TaskPlan
from spikingbrain_train.evaluation.multiple_choice.task_files import TASKS

if TYPE_CHECKING:
    from spikingbrain_train.evaluation.language_model import LanguageModel


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Add them, in a group of their own."""
    group = parser.add_argument_group(
        "multiple choice",
        "the likeliest option is the answer, by lm-eval's definitions of the tasks (the extra evaluation "
        "installs it), on local files",
    )
    group.add_argument(
        "--tasks",
        metavar="A,B",
        help=f"of {', '.join(TASKS)}, or one subject of a task of many: mmlu_anatomy",
    )
    group.add_argument(
        "--task-data",
        type=Path,
        metavar="DIR",
        help="folder with JSON lines in DIR/<task>/<split>.jsonl or, of a task of many subjects, in "
        "DIR/<task>/<split>/<subject>.jsonl (docs/evaluation.md has the fields)",
    )
    group.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="solved examples in front of every question, of the split dev or train (default: 0)",
    )
    group.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="ask the first N questions of each task or subject (default: all)",
    )
    group.add_argument(
        "--permutations",
        action="store_true",
        help="also ask mmlu, cmmlu and ceval with their options in the three other cyclic orders: what is "
        "right in all four is knowledge, the rest position bias",
    )


def tasks_of(arguments: argparse.Namespace) -> TaskMeasurement | None:
    """What the flags ask for, None without ``--tasks``.

    Raises:
        SpikingBrainError: a value that does not fit, a file that is not there, or a flag that nothing reads.
    """
    given = {"--task-data": arguments.task_data, "--num-fewshot": arguments.num_fewshot}
    given |= {"--limit": arguments.limit, "--permutations": arguments.permutations or None}
    if arguments.tasks is None:
        for flag, value in given.items():
            if value is not None:
                raise ConfigurationError(f"{flag} is read with --tasks only; name tasks, or leave it out")
        return None
    plan = TaskPlan.of(
        arguments.tasks,
        arguments.task_data,
        num_fewshot=arguments.num_fewshot or 0,
        limit=arguments.limit,
        permutations=arguments.permutations,
    )
    return TaskMeasurement(plan)


class TaskMeasurement(Measurement):
    """The part ``tasks`` of a report."""

    def __init__(self, plan: TaskPlan) -> None:
        self.plan = plan

    def measure(self, model: LanguageModel) -> Part:
        from spikingbrain_train.evaluation.multiple_choice.measure import measure_tasks
        from spikingbrain_train.evaluation.multiple_choice.result import describe

        results = measure_tasks(model, self.plan)
        return Part("tasks", {name: each.as_json() for name, each in results.items()}, describe(results))
