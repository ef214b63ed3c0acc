"""lm-eval's own definitions of tasks on questions from local files: prompts, options and metrics."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy

from spikingbrain_train.evaluation.multiple_choice.plan import definition_of
from spikingbrain_train.evaluation.multiple_choice.task_files import ChoiceTask, Question

_FEWSHOT_SEED = 1234
"""What lm-eval's command line draws examples with."""


@contextmanager
def _offline() -> Iterator[None]:
    """lm-eval imports ``datasets``, which decides then whether it may ask the hub."""
    name = "HF_DATASETS_OFFLINE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


with _offline():
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml


@dataclass(frozen=True)
class DefinedTask:
    """A task as lm-eval defines it, on its questions."""

    task: Any
    """lm-eval's own object: prompts, requests, metrics."""
    documents: list[Question]
    """The questions as its definition hands them on."""


def lm_eval_task(
    task: ChoiceTask, subject: str | None, questions: Sequence[Question], examples: Sequence[Question]
) -> DefinedTask:
    """Questions under lm-eval's definition; nothing is drawn from the process's random generators.

    Args:
        task: which.
        subject: of it.
        questions: of the split that is asked.
        examples: solved ones to choose from; none where a prompt shows none.
    """
    with _undisturbed():
        splits = {task.split: questions, **({task.shots_split: examples} if examples else {})}
        held = {split: datasets.Dataset.from_list(list(rows)) for split, rows in splits.items()}
        config = {
            **load_yaml(definition_of(task, subject)),
            "custom_dataset": lambda **_: held,
            "dataset_kwargs": None,
        }
        for name in ("tag", "group", "task_list"):  # of lm-eval's index, not of a task
            config.pop(name, None)
        for name in ("training_split", "validation_split", "test_split", "fewshot_split"):
            if config.get(name) not in held:
                config[name] = None
        made = ConfigurableTask(config=config)
        made.set_fewshot_seed(_FEWSHOT_SEED)
        return DefinedTask(made, list(made.eval_docs))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without what lm-eval and ``datasets`` show and log, and with random generators as they were."""
    logger = logging.getLogger("lm_eval")
    level, drawn, drawn_by_numpy = logger.level, random.getstate(), numpy.random.get_state()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        random.setstate(drawn)
        numpy.random.set_state(drawn_by_numpy)
