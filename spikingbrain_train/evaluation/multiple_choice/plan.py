"""Which tasks are asked, how, and from which files. Checked before torch and lm-eval are imported."""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from spikingbrain_train.errors import ConfigurationError, DataError, PlatformError
from spikingbrain_train.evaluation.multiple_choice.task_files import TASKS, ChoiceTask, Question

_MOST = 2**31


@dataclass(frozen=True)
class AskedTask:
    """A task, and those of its subjects that are asked."""

    task: ChoiceTask
    subjects: tuple[str | None, ...]
    """(None,) where it has none."""

    @property
    def name(self) -> str:
        """Of its result: ``mmlu``, or ``mmlu_anatomy`` where one subject was named."""
        return self.task.name if not self.named else f"{self.task.name}_{self.subjects[0]}"

    named: bool = False
    """Whether the user named one subject alone."""


@dataclass(frozen=True)
class TaskPlan:
    """What is asked of a model."""

    tasks: tuple[AskedTask, ...]
    folder: Path
    """With a folder for each task."""
    num_fewshot: int = 0
    """Solved examples in front of every question."""
    limit: int | None = None
    """Questions of each task, or of each subject; None asks all."""
    permutations: bool = False
    """Whether options with letters are also asked in the three other cyclic orders."""

    @classmethod
    def of(
        cls,
        names: str,
        folder: Path | None,
        *,
        num_fewshot: int = 0,
        limit: int | None = None,
        permutations: bool = False,
    ) -> TaskPlan:
        """What a user asks for.

        Args:
            names: tasks and subjects (``mmlu_anatomy``), with commas between them.
            folder: with a folder for each task.
            num_fewshot: solved examples in front of every question.
            limit: questions of each task, or of each subject.
            permutations: also ask in the other cyclic orders.

        Raises:
            ConfigurationError: there is no such task, or a number does not fit.
            DataError: a file is missing, or a line of it is wrong.
            PlatformError: lm-eval is not installed.
        """
        if folder is None:
            raise ConfigurationError(
                "--tasks reads local files; name the folder that has one folder a task with --task-data"
            )
        if not 0 <= num_fewshot < _MOST:
            raise ConfigurationError(f"--num-fewshot is {num_fewshot}; give 0 or more examples")
        if limit is not None and not 1 <= limit < _MOST:
            raise ConfigurationError(f"--limit is {limit}; give at least 1 question")
        require_lm_eval()
        if not folder.is_dir():
            raise DataError(f"--task-data {folder} is not a folder; name the one that has one folder a task")
        asked = tuple(_asked(name.strip(), folder) for name in names.split(","))
        plan = cls(asked, folder, num_fewshot, limit, permutations)
        plan._check()
        return plan

    def questions(self, asked: AskedTask, subject: str | None) -> list[Question]:
        """Those to ask, as many as ``limit`` lets through."""
        return asked.task.questions(self.folder, asked.task.split, subject)[: self.limit]

    def examples(self, asked: AskedTask, subject: str | None) -> list[Question]:
        """Solved ones to choose from; none where no example is shown.

        Raises:
            DataError: there are fewer than a question shall have.
        """
        if self.num_fewshot == 0:
            return []
        task = asked.task
        found = task.questions(self.folder, task.shots_split, subject)
        if len(found) < self.num_fewshot:
            path = task.path(self.folder, task.shots_split, subject)
            raise DataError(
                f"{task.name}: {path} holds {len(found)} examples, but --num-fewshot is {self.num_fewshot}; "
                f"give {len(found)} or fewer"
            )
        return found

    def _check(self) -> None:
        """Read every file once. What is wrong is said before a model is loaded."""
        names = [asked.name for asked in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ConfigurationError(f"--tasks names {name} more than once; name it once")
        if self.permutations and not any(asked.task.shift for asked in self.tasks):
            shown = ", ".join(name for name, task in TASKS.items() if task.shift)
            raise ConfigurationError(
                f"--permutations changes the order of options that a prompt shows with letters, which "
                f"{', '.join(names)} do not; add one of {shown}, or leave it out"
            )
        for asked in self.tasks:
            for subject in asked.subjects:
                self.questions(asked, subject)
                self.examples(asked, subject)


def require_lm_eval() -> None:
    """Refuse multiple choice where its package is missing; imports nothing.

    Raises:
        PlatformError: it is.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise PlatformError(
            "multiple-choice tasks need the package lm-eval, which is not installed; install the extra "
            "evaluation: pip install 'spikingbrain-train[evaluation]' (in a checkout: pip install -e "
            "'.[evaluation]')"
        )


def _asked(name: str, folder: Path) -> AskedTask:
    if name in TASKS:
        task = TASKS[name]
        subjects = tuple(task.subjects(folder)) if task.has_subjects else (None,)
        for subject in subjects:
            _check_subject(task, subject)
        return AskedTask(task, subjects)
    for task in TASKS.values():
        if task.has_subjects and name.startswith(f"{task.name}_"):
            subject = name.removeprefix(f"{task.name}_")
            _check_subject(task, subject)
            return AskedTask(task, (subject,), named=True)
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigurationError(
        f"--tasks names {name!r}, which is none of {', '.join(TASKS)} and no subject of one, such as "
        f"mmlu_anatomy{hint}"
    )


def definition_of(task: ChoiceTask, subject: str | None) -> Path:
    """File of lm-eval's definition."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.origin is not None, "asked for behind require_lm_eval"
    return Path(spec.origin).parent / "tasks" / task.definition.format(subject=subject)


def known_subjects(task: ChoiceTask) -> list[str]:
    """All subjects that lm-eval defines."""
    before, after = Path(task.definition).name.split("{subject}")
    folder = definition_of(task, "").parent
    found = (path.name for path in folder.glob(f"{before}*{after}"))
    return sorted(name.removeprefix(before).removesuffix(after) for name in found)


def _check_subject(task: ChoiceTask, subject: str | None) -> None:
    if subject is None or definition_of(task, subject).is_file():
        return
    near = difflib.get_close_matches(subject, known_subjects(task), n=1)
    hint = f"did you mean {near[0]}?" if near else "docs/evaluation.md says where the names come from"
    raise ConfigurationError(f"{task.name}: {subject!r} is no subject that lm-eval defines; {hint}")
